"""Finding what a person means: by a path a checkpoint, a run's newest one, or its public directory; by a text a run."""

import re
from pathlib import Path

from protocol import layout
from protocol.documents import RunId
from protocol.errors import UsageError
from protocol.join import JoinString

_NUMBER = re.compile(r"[0-9]{6,}")
_RUN_ID = re.compile(r"[0-9a-f]{64}")


def public_directory(path: Path) -> Path:
    """Return the public directory of a run directory, or `path` itself if it is one or a mirror of one.

    Raises:
        UsageError: it is neither.
    """
    _require_directory(path)
    for candidate in (path / "public", path):
        if (candidate / "checkpoints").is_dir():
            return candidate
    raise UsageError(f"{path} is neither a run's directory nor its public directory: there are no checkpoints in it.")


def checkpoint_directory(path: Path) -> Path:
    """Return `path` if it is a checkpoint directory, else the newest checkpoint of the run that it is.

    Raises:
        UsageError: it is neither, or the run has no checkpoint.
    """
    _require_directory(path)
    if (path / layout.MANIFEST).is_file() or (path / layout.WEIGHTS).is_file():
        return path
    try:
        folder = public_directory(path) / "checkpoints"
    except UsageError:
        raise UsageError(f"{path} is neither a checkpoint nor a run's directory.") from None
    published = [
        (int(entry.name), entry)
        for entry in folder.iterdir()
        if _NUMBER.fullmatch(entry.name) and (entry / layout.MANIFEST).is_file()
    ]
    if not published:
        raise UsageError(f"{folder} holds no published checkpoint.")
    return max(published)[1]


def run_id(text: str | None) -> RunId | None:
    """Return the run that a person names by its id or its join string; None for None.

    Raises:
        UsageError: it is neither.
    """
    if text is None or _RUN_ID.fullmatch(text):
        return None if text is None else RunId(text)
    if text.startswith("cw1:"):
        return JoinString.parse(text).run
    raise UsageError(f"--run {text[:80]!r} is no run id: it has 64 hex digits, and is the last part of a join string.")


def _require_directory(path: Path) -> None:
    if path.is_file():
        raise UsageError(
            f"{path} is a file. A single file of weights does not say how captions become numbers; give a checkpoint's "
            "directory, such as the one that it was made from."
        )
    if not path.is_dir():
        raise UsageError(f"There is no directory {path}.")
