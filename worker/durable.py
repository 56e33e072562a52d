"""Writing files so that they are either not there or whole, whatever happens to the power or to the disk's space."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from protocol.errors import DiskFull, LocalProblem

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def trouble_with(path: object, error: OSError) -> LocalProblem:
    """Return what the operating system said about a file, as an error for a person: `DiskFull` or `LocalProblem`."""
    if error.errno in _FULL:
        return DiskFull(f"The disk that holds {path} is full. Free some space and try again.")
    return LocalProblem(f"{path} can't be used: {error.strerror or error}.")


@contextmanager
def disk_named(path: Path) -> Iterator[None]:
    """Turn a full disk into `DiskFull`, and any other trouble with writing into `LocalProblem`, naming the path."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"The disk that holds {path} is full; nothing was lost. Free some space; the worker tries again."
            ) from error
        raise LocalProblem(f"{path} can't be written: {error.strerror or error}.") from error


def sync_directory(path: Path) -> None:
    """Wait until the disk has the directory's entries: names made, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace the file at `path` in one step, and return when the disk has it.

    Raises:
        DiskFull: there is no space; the old file, if any, is untouched.
        LocalProblem: the file cannot be written for another reason.
    """
    draft = path.with_name(path.name + ".new")
    with disk_named(path):
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def move_durably(source: Path, target: Path) -> None:
    """Rename a file or directory within one file system, and return when the disk has the new name."""
    with disk_named(target):
        source.rename(target)
        sync_directory(target.parent)
        sync_directory(source.parent)
