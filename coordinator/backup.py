"""Backing up a run while it is served, and restoring it.

A backup is a plain directory: the run's files under their own names, and BACKUP.json, written last, with the SHA-256
of each. It holds the coordinator's secrets, so it is readable by its owner only. It does not hold unfinished uploads:
their workers send them again.

Order makes it consistent. The database is copied first; the files that it speaks of were on the disk before their
rows were, so whatever is copied after it holds them. What is published meanwhile of rounds whose merge the copied
database has not fixed is left out: the coordinator that is restored may merge something else, and nobody may find two
histories in one directory.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from coordinator.directory import PUBLIC_FOLDERS, RunDirectory, disk_trouble_explained, sync, write_file
from coordinator.sqlite_file import backup_database, newest_fixed_round
from protocol import layout
from protocol.canonical import canonical_json, parse_json
from protocol.documents import RunId
from protocol.errors import BackupDamaged, DirectoryNotEmpty, PayloadInvalid, UsageError
from protocol.limits import GIB
from verify.plain_files import open_plain, read_plain

LIST: Final = "BACKUP.json"
FORMAT: Final = 1
_CHUNK: Final = 1 << 20
_MOST_LIST_BYTES: Final = 1 * GIB
_HEX_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_IMMUTABLE: Final = ("blobs/", "public/shards/", "public/checkpoints/", "public/deltas/", "public/takedowns/")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackedUp:
    """One file of a backup: its path below the run's directory, SHA-256 and size in bytes."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupReport:
    """What a backup holds."""

    run: RunId
    files: int
    size: int


def backup(directory: RunDirectory, target: Path) -> BackupReport:
    """Copy a run to the new directory `target`; the run may be served meanwhile.

    Files that never change are hard-linked where that is possible.

    Raises:
        DirectoryNotARun: `directory` holds no run, or its database is damaged.
        DirectoryNotEmpty: `target` holds something already.
        UsageError: `target` lies inside the run's directory.
        DiskFull, LocalProblem: the backup could not be written; what was written of it is removed.
    """
    target = target.absolute()
    run = directory.trust().run
    if target.is_relative_to(directory.root):
        raise UsageError(f"The backup {target} would lie inside the run's directory; choose a place outside.")
    with disk_trouble_explained("No backup was made"):
        _make_empty(target)
        with _removed_on_failure(target):
            newest = 0
            if directory.database.exists():
                backup_database(directory.database, target / directory.database.name)
                newest = newest_fixed_round(target / directory.database.name)
            copies = _Copies(directory.root, target)
            for path in _files(directory, newest):
                copies.add(path)
            _point_to_newest(target / directory.public.name)
            listed = _described(target)
            for path in target.rglob("*"):
                sync(path)
            content = {"format": FORMAT, "run": run, "files": [asdict(entry) for entry in listed]}
            write_file(target / LIST, canonical_json(content), mode=0o600)
    return BackupReport(run=run, files=len(listed), size=sum(entry.size for entry in listed))


def restore(source: Path, directory: RunDirectory) -> BackupReport:
    """Copy a backup back to `directory`, which must not exist or be empty, checking every byte.

    Raises:
        BackupDamaged: unfinished, or a file is missing or changed.
        DirectoryNotEmpty: the directory holds something already.
        DiskFull, LocalProblem: files could not be written.
        Refusal, KeyUnreadable: the files are as they were backed up, but do not make a run.
    """
    run, listed = _read_list(source)
    root = directory.root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DirectoryNotEmpty(f"{root} is not empty; nothing was restored. Choose a new directory.")
    place = root.with_name(f".{root.name}.restoring")
    with disk_trouble_explained("Nothing was restored"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, mode=0o755)
        with _removed_on_failure(place):
            for entry in listed:
                _restore_file(source, place, entry)
            for name in PUBLIC_FOLDERS:
                (place / "public" / name).mkdir(parents=True, exist_ok=True)
            if RunDirectory(place).identity().run != run:
                raise BackupDamaged(f"{source} is listed as a backup of run {run[:12]}, but holds another run.")
            for path in (*place.rglob("*"), place):
                sync(path)
            place.rename(root)
            sync(root.parent)
    return BackupReport(run=run, files=len(listed), size=sum(entry.size for entry in listed))


class _Copies:
    """Copies files one by one; a file that has two names in the source is stored once in the target, too."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source = source
        self._target = target
        self._seen: dict[tuple[int, int], Path] = {}

    def add(self, path: Path) -> None:
        """Link or copy a file; one that is gone by now (pruned, replaced) is left out."""
        relative = path.relative_to(self._source).as_posix()
        target = self._target / relative
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            status = path.stat()
            if not relative.startswith(_IMMUTABLE):
                shutil.copy(path, target)
                return
            first = self._seen.setdefault((status.st_dev, status.st_ino), target)
            _link_or_copy(path if first == target else first, target)
        except FileNotFoundError:
            return


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        # Another disk, or a file system without hard links.
        shutil.copy(source, target)


def _files(directory: RunDirectory, newest: int) -> Iterator[Path]:
    """Yield the files to copy; of checkpoints, logs and measurements those up to the checkpoint `newest`."""
    yield directory.run_file
    if directory.settings_file.exists():
        yield directory.settings_file
    yield from sorted(directory.keys.iterdir())
    for top in (directory.blobs, directory.takedowns, directory.public):
        for folder, folders, names in os.walk(top):
            # Names with a dot are work in progress, and so is a checkpoint that has no manifest yet.
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if Path(folder).parent == directory.public / "checkpoints" and (
                layout.MANIFEST not in names or _is_later(Path(folder), newest)
            ):
                folders.clear()
                continue
            numbered = Path(folder) in (directory.public / "log", directory.public / "metrics")
            for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
                if not (numbered and _is_later(path, newest)):
                    yield path


def _is_later(path: Path, newest: int) -> bool:
    """Whether a path is named by the number of a later checkpoint, as its directory, log and measurements are."""
    return path.stem.isdecimal() and int(path.stem) > newest


def _point_to_newest(public: Path) -> None:
    """Let `latest.json` be the manifest of the newest checkpoint that was copied."""
    manifests = sorted(public.glob(f"checkpoints/*/{layout.MANIFEST}"), key=lambda path: int(path.parent.name))
    write_file(public / layout.LATEST, manifests[-1].read_bytes())


def _described(target: Path) -> list[BackedUp]:
    entries = []
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        sha256, size = _digest(path)
        entries.append(BackedUp(path=path.relative_to(target).as_posix(), sha256=sha256, size=size))
    return entries


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def _read_list(source: Path) -> tuple[RunId, list[BackedUp]]:
    listing = source / LIST
    try:
        content: object = parse_json(read_plain(listing, _MOST_LIST_BYTES))
    except OSError as error:
        raise BackupDamaged(
            f"{source} holds no finished backup ({LIST}: {error.strerror}); choose another, or take a new one."
        ) from None
    except PayloadInvalid as error:
        raise BackupDamaged(f"{listing} can't be read: {error.message}") from None
    match content:
        case {"format": int(version), **_rest} if version != FORMAT:
            raise BackupDamaged(f"{listing} has format {version}; this version reads format {FORMAT}.")
        case {"format": int(), "run": str(run), "files": list(rows)} if _HEX_DIGEST.fullmatch(run):
            listed = [_listed(listing, row) for row in rows]
        case _:
            raise BackupDamaged(f"{listing} can't be read: it is no list of a backup.")
    if len({PurePosixPath(entry.path) for entry in listed}) != len(listed):
        raise BackupDamaged(f"{listing} lists a file twice.")
    return RunId(run), listed


def _listed(listing: Path, row: object) -> BackedUp:
    match row:
        case {"path": str(path), "sha256": str(sha256), "size": int(size)} if _HEX_DIGEST.fullmatch(sha256):
            parts = PurePosixPath(path).parts
            if not parts or parts[0] == "/" or ".." in parts or "\0" in path or not _is_unicode(path):
                # Stops a doctored list from writing outside of the directory.
                raise BackupDamaged(f"{listing} lists {path[:200]!r}, which is no path inside a run.")
            return BackedUp(path=path, sha256=sha256, size=size)
        case _:
            raise BackupDamaged(f"{listing} can't be read: an entry names no path, SHA-256 and size.")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False
    return True


def _restore_file(source: Path, place: Path, entry: BackedUp) -> None:
    target = place / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if entry.path.startswith("keys/"):
        target.parent.chmod(0o700)
    try:
        file = open_plain(source / entry.path, follow=False)
    except FileNotFoundError:
        raise BackupDamaged(f"{source} lacks the file {entry.path}; nothing was restored.") from None
    except OSError as error:
        raise BackupDamaged(f"{source / entry.path} can't be read ({error.strerror}); nothing was restored.") from None
    with file:
        # The size comes first: what is larger than listed is not copied at all.
        same_size = os.fstat(file.fileno()).st_size == entry.size
        if not same_size or _copy(file, target, entry.size) != entry.sha256:
            raise BackupDamaged(f"{source / entry.path} was changed since the backup; nothing was restored.")


def _copy(file: BinaryIO, target: Path, size: int) -> str:
    """Copy `size` bytes and the permissions to a new file; return the SHA-256 of what was copied."""
    hasher = hashlib.sha256()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as copied:
        while size and (chunk := file.read(min(size, _CHUNK))):
            copied.write(chunk)
            hasher.update(chunk)
            size -= len(chunk)
        os.fchmod(copied.fileno(), os.fstat(file.fileno()).st_mode & 0o777)
    return hasher.hexdigest()


def _make_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DirectoryNotEmpty(f"{target} is not empty; no backup was made. Choose a new directory.")
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    target.chmod(0o700)


@contextmanager
def _removed_on_failure(place: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
