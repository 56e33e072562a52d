"""Why the run's own auditor ended: its last words in DIR/auditor/auditor.log, for the operator's own log."""

import json
from pathlib import Path
from typing import Final

from protocol.printing import printable

_MOST_BYTES: Final = 64 * 1024
_MOST_CHARACTERS: Final = 600


def last_words(log: Path, since: int) -> str:
    """Return the sentence and the code that an auditor failed with, else its last line that is no event; empty if none.

    Args:
        log: JSON lines of events, and whatever else a dying process writes.
        since: bytes that were in it before this auditor was started.
    """
    try:
        with log.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(since, end - _MOST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        match _event(line):
            case {"event": "failed", "code": str(code), "sentence": str(sentence)}:
                return printable(f"{sentence[:_MOST_CHARACTERS]} [{code}]")
            case _:
                pass
    said = (line for line in reversed(lines) if line.strip() and _event(line) is None)
    return printable(next(said, "")[:_MOST_CHARACTERS])


def _event(line: str) -> object:
    try:
        return json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return None
