"""What an operator is told of an auditor that ended."""

import json
from pathlib import Path

import pytest

from coordinator.auditor_log import last_words

FAILED = {"event": "failed", "code": "NETWORKS_MISSING", "sentence": "The networks are not there."}
SAID = "error: The networks are not there. [NETWORKS_MISSING]"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            [json.dumps({"event": "connected"}), json.dumps(FAILED), SAID],
            "The networks are not there. [NETWORKS_MISSING]",
        ),
        (['{"event": "ready"}', "Traceback", "MemoryError", ""], "MemoryError"),
        (['{"event": "failed", "code": 3}', "{half a li"], "{half a li"),
        ([json.dumps({**FAILED, "sentence": "\x1b[2J"})], "?[2J [NETWORKS_MISSING]"),
        (['{"event": "waiting", "reason": "nothing to judge"}'], ""),
        ([], ""),
    ],
)
def test_the_last_words_of_an_auditor_are_its_sentence_or_its_last_line(
    tmp_path: Path, lines: list[str], told: str
) -> None:
    log = tmp_path / "auditor.log"
    log.write_text("\n".join(lines))
    assert last_words(log, 0) == told


def test_what_an_earlier_auditor_said_is_not_told_again(tmp_path: Path) -> None:
    log = tmp_path / "auditor.log"
    log.write_text(json.dumps(FAILED) + "\n")
    assert last_words(log, log.stat().st_size) == ""
    assert last_words(tmp_path / "gone", 0) == ""
