"""`commonweight coordinator takedown`, as an operator types it."""

import json
from pathlib import Path

import pytest

from coordinator.directory import RunDirectory
from coordinator.takedowns import read_asked
from diloco.shards import Shard
from protocol.layout import shard_path
from tests.commonweight.test_cli_coordinator import ok, refused

WHY = ("--reason", "its maker asked for it")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> RunDirectory:
    ok(capsys, "coordinator", "init", tmp_path / "run", "--shards", "2")
    return RunDirectory(tmp_path / "run")


def test_a_picture_is_shown_and_taken_down_by_its_number(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    shard = run.config().data.shards[1].sha256
    caption = Shard.open(run.public / shard_path(shard)).caption(5)
    place = ("coordinator", "takedown", run.root, "--shard", shard[:10], "--sample", 5, *WHY)
    code, error = refused(capsys, *place)
    assert (code, "[CONSENT_NEEDED]" in error, run.takedowns.exists()) == (1, True, False)

    shown = ok(capsys, *place, "--yes")
    assert f'shard {shard[:12]}, sample 5: "{caption}"' in shown
    assert "1 picture taken down: units of round 2 and later leave it out" in shown
    for said in ("what was learnt stays in the", "stay published under their digests"):
        assert said in shown
    (asked,) = read_asked(run.takedowns)
    assert (asked.shard, asked.sample, asked.reason) == (shard, 5, WHY[1])
    assert "pictures taken down: 0, 1 more with the next checkpoint" in ok(capsys, "coordinator", "status", run.root)
    assert json.loads(ok(capsys, "coordinator", "status", run.root, "--json"))["to_take_down"] == 1

    code, error = refused(capsys, *place, "--yes")
    assert code == 1
    assert "is taken down already. [TAKEDOWN_REFUSED]" in error


def test_pictures_are_found_by_a_part_of_their_caption_once(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = run.config().data.shards[0].sha256
    opened = Shard.open(run.public / shard_path(shard))
    word = str(opened.caption(0))
    wanted = [number for number in range(opened.n) if word.casefold() in str(opened.caption(number)).casefold()]
    assert 0 < len(wanted) < opened.n
    search = ("coordinator", "takedown", run.root, "--shard", shard, "--caption", word.upper(), *WHY, "--yes")
    assert f"{len(wanted):,} pictures taken down" in ok(capsys, *search)
    assert [asked.sample for asked in read_asked(run.takedowns)] == wanted
    code, error = refused(capsys, *search)
    assert code == 1
    assert f"but {len(wanted)} that are taken down already" in error


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "Name a picture by --shard and --sample"),
        (("--sample", "3"), 2, "Name a picture by --shard and --sample"),
        (("--sample", "3", "--caption", "x", "--shard", "SHARD"), 2, "Name a picture"),
        (("--caption", ""), 2, "Name a picture"),
        (("--shard", "ab", "--sample", "3"), 1, "give 8 or more digits"),
        (("--shard", "ab" * 32, "--sample", "3"), 1, "is the beginning of 0 of the run's 3 shards"),
        (("--shard", "SHARD", "--sample", "99999"), 1, "There is no sample 99999"),
        (("--caption", "a picture that nobody took"), 1, "nothing was taken down. [TAKEDOWN_REFUSED]"),
    ],
)
def test_what_can_not_be_taken_down_is_one_sentence_and_changes_nothing(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    shard = run.config().data.shards[0].sha256
    given = [shard if argument == "SHARD" else argument for argument in arguments]
    found, error = refused(capsys, "coordinator", "takedown", run.root, *given, *WHY, "--yes")
    assert (found, words in error) == (code, True), error
    assert not run.takedowns.exists()
