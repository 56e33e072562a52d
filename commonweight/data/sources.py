"""Where pictures and captions come from: folders, WebDataset tars, parquet tables. Nothing is decoded here.

A source gives its items in one fixed order, so that a preparation that was broken off goes on where it stopped. An item
says where its bytes lie; they are read later, by another process.

A source may have come from a stranger. Only plain files that lie in it are read: a link or an id that leads elsewhere
would put a curator's own files into a public data set.
"""

import errno
import functools
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from commonweight.extras import not_installed
from protocol.errors import UsageError
from verify.plain_files import open_plain

PICTURES: Final = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
TAR: Final = ".tar"
PARQUET: Final = ".parquet"
_MOST_SIDECAR_BYTES: Final = 1 << 20
_MOST_PICTURE_BYTES: Final = 256 << 20
_CAPTIONS: Final = ("caption", "text", "prompt", "description")
_ROWS: Final = 256
_LICENCE: Final = ("license", "licence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a picture's bytes lie: a whole file, a part of one (a tar), or a row of a parquet table."""

    path: str
    offset: int = 0
    size: int = -1
    row: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One picture as its source describes it. `caption`, `licence` and `source` are None where it says nothing.

    `problem` says why nothing can be known of it, if so: a default licence must not stand in for an unreadable one.
    `reason` is the word for that in the list of what is skipped.
    """

    key: str
    place: Place
    caption: str | None = None
    licence: str | None = None
    source: str | None = None
    problem: str | None = None
    reason: str = "unreadable"


def list_sources(path: Path) -> list[Path]:
    """Return the files that a source consists of, sorted; a folder of pictures is one file: itself.

    Raises:
        UsageError: there is nothing here that can be read.
    """
    if path.is_file() and path.suffix in (TAR, PARQUET):
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a .tar or .parquet file.")
    packed = sorted(found for found in path.rglob("*") if found.suffix in (TAR, PARQUET) and _is_plain(found))
    if packed:
        return packed
    if not any(found.suffix.lower() in PICTURES for found in path.rglob("*")):
        raise UsageError(f"{path} holds no pictures, no .tar and no .parquet files.")
    return [path]


def items_of(path: Path, pictures: Path | None) -> Iterator[Item]:
    """Yield the items of one file of `list_sources`, in a fixed order.

    Args:
        path: a folder of pictures, a tar or a parquet file.
        pictures: for parquet tables that hold links instead of pictures: the folder with the files, named by id.

    Raises:
        PackageMissing: pyarrow is needed.
        UsageError: a tar that is none, or a table without the columns that are needed.
    """
    if path.is_dir():
        return _folder(path)
    if path.suffix == TAR:
        return _tar(path)
    return _parquet(path, pictures)


def count_items(path: Path) -> int:
    """Return how many items `items_of` will give for a file of `list_sources`; no picture is read for it.

    Raises:
        PackageMissing, UsageError: as `items_of`.
    """
    if path.is_dir():
        return sum(1 for _ in _pictures_in(path))
    if path.suffix == TAR:
        return sum(1 for _ in _tar_groups(path))
    rows: int = _open_table(path).metadata.num_rows
    return rows


def read_place(place: Place) -> bytes:
    """Return a picture's bytes.

    Raises:
        OSError: they can't be read.
        ValueError: they are more than any picture should have.
    """
    if place.row >= 0:
        return _parquet_bytes(place)
    with open_plain(Path(place.path), follow=False) as file:
        size = os.fstat(file.fileno()).st_size - place.offset if place.size < 0 else place.size
        if size > _MOST_PICTURE_BYTES:
            raise ValueError(f"it has more than {_MOST_PICTURE_BYTES:,} bytes")
        file.seek(place.offset)
        return file.read(size)


# --- folders -------------------------------------------------------------------------------------------------


def _pictures_in(root: Path) -> Iterator[Path]:
    return (found for found in root.rglob("*") if found.suffix.lower() in PICTURES and _is_plain(found))


def _folder(root: Path) -> Iterator[Item]:
    for path in sorted(_pictures_in(root)):
        key, place = path.relative_to(root).as_posix(), Place(path=str(path))
        try:
            said, text = _sidecar(path.with_suffix(".json")), _sidecar(path.with_suffix(".txt"))
        except OSError as error:
            yield Item(key=_plain(key), place=place, problem=f"{error.filename}: {error.strerror}")
            continue
        yield _item(key, place, said, text)


def _is_plain(path: Path) -> bool:
    return not path.is_symlink() and path.is_file()


def _sidecar(path: Path) -> bytes | None:
    """Return a small file's bytes, None if there is none; raise OSError for a link, a pipe or a large one."""
    try:
        with open_plain(path, follow=False) as file:
            raw = file.read(_MOST_SIDECAR_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(raw) > _MOST_SIDECAR_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MOST_SIDECAR_BYTES:,} bytes", str(path))
    return raw


def _item(key: str, place: Place, json_raw: bytes | None, text_raw: bytes | None) -> Item:
    """Return an item as the files beside its picture describe it."""
    said: Mapping[str, Any] = {}
    if json_raw is not None:
        try:
            parsed = json.loads(json_raw)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            return Item(key=_plain(key), place=place, problem="its .json file is no JSON object")
        said = parsed
    return _described(key, place, said, text_raw)


def _described(key: str, place: Place, said: Mapping[Any, Any], text_raw: bytes | None) -> Item:
    words = {name.lower(): value for name, value in said.items() if isinstance(name, str)}
    caption = next((words[name] for name in _CAPTIONS if isinstance(words.get(name), str)), None)
    if caption is None and text_raw is not None:
        try:
            caption = text_raw.decode("utf-8")
        except UnicodeDecodeError as error:
            detail = f"its .txt is not UTF-8 from byte {error.start} on; save it as UTF-8"
            return Item(key=_plain(key), place=place, problem=detail, reason="caption not UTF-8")
    named = [words[name] for name in _LICENCE if words.get(name) is not None]
    if any(not isinstance(licence, str) for licence in named):
        return Item(key=_plain(key), place=place, problem="its licence is no text")
    return Item(
        key=_plain(key),
        place=place,
        caption=None if caption is None else _plain(caption),
        licence=_text(words, *_LICENCE),
        source=_text(words, "source", "url"),
    )


def _text(said: Mapping[str, Any], *names: str) -> str | None:
    found = next((said[name] for name in names if isinstance(said.get(name), str) and said[name].strip()), None)
    return None if found is None else _plain(found)[:200]


def _plain(text: str) -> str:
    """One line, single spaces, no characters that UTF-8 can't hold (Python has those of odd file names as well)."""
    return " ".join(text.encode("utf-8", errors="replace").decode("utf-8").replace("\0", " ").split())


# --- tars ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A picture of a tar with what is said of it: the members' names differ only after the first dot."""

    stem: str
    picture: tarfile.TarInfo
    said: Mapping[str, tarfile.TarInfo]


def _tar(path: Path) -> Iterator[Item]:
    try:
        with tarfile.open(path, "r:") as tar:
            for group in _groups(tar):
                yield _tar_item(path, tar, group)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise _no_tar(path, error) from None


def _tar_groups(path: Path) -> Iterator[_Group]:
    """Yield what the headers of a tar tell of; its contents are passed over."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield from _groups(tar)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise _no_tar(path, error) from None


def _no_tar(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} can't be read as an uncompressed tar: {error}.")


def _groups(tar: tarfile.TarFile) -> Iterator[_Group]:
    """Neighbouring members whose names differ only after the first dot belong together, as WebDataset has it."""
    stem, parts = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        if not member.isreg() or member.issparse():
            continue
        folder, _, name = member.name.rpartition("/")
        first, _, extension = name.partition(".")
        found = f"{folder}/{first}" if folder else first
        if found != stem:
            yield from _group(stem, parts)
            stem, parts = found, {}
        parts[f".{extension.lower()}"] = member
    yield from _group(stem, parts)


def _group(stem: str, parts: Mapping[str, tarfile.TarInfo]) -> Iterator[_Group]:
    picture = next((parts[extension] for extension in sorted(parts) if extension in PICTURES), None)
    if picture is not None:
        yield _Group(
            stem=stem, picture=picture, said={name: parts[name] for name in (".json", ".txt") if name in parts}
        )


def _tar_item(path: Path, tar: tarfile.TarFile, group: _Group) -> Item:
    key = f"{path.name}/{group.stem}"
    place = Place(path=str(path), offset=group.picture.offset_data, size=group.picture.size)
    if any(member.size > _MOST_SIDECAR_BYTES for member in group.said.values()):
        return Item(key=_plain(key), place=place, problem="what is said of it is too long")
    read = {name: _member(tar, member) for name, member in group.said.items()}
    return _item(key, place, read.get(".json"), read.get(".txt"))


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    file = tar.extractfile(member)
    return None if file is None else file.read(_MOST_SIDECAR_BYTES)


# --- parquet -------------------------------------------------------------------------------------------------


def _pyarrow() -> Any:  # it has no types
    try:
        import pyarrow.parquet
    except ImportError:
        raise not_installed("Parquet tables need pyarrow", "data") from None
    return pyarrow.parquet


def _parquet(path: Path, pictures: Path | None) -> Iterator[Item]:
    """PD12M's columns: id, url, caption, width, height, mime_type, hash, license, source; or an `image` with bytes."""
    table = _open_table(path)
    names = set(table.schema_arrow.names)
    inside = "image" in names
    if not inside and pictures is None:
        raise UsageError(f"{path} holds links, no pictures; fetch them into a folder, named by id, and name it too.")
    by_name = (
        {} if pictures is None else {found.stem: found for found in sorted(pictures.rglob("*")) if _is_plain(found)}
    )
    wanted = [name for name in sorted(names) if name.lower() in ("id", "url", *_CAPTIONS, *_LICENCE, "source")]
    for row, said in enumerate(_rows(path, table, wanted)):
        identity = str(said.get("id") or said.get("url") or row)
        key = f"{path.name}/{identity}"
        if inside:
            yield _described(key, Place(path=str(path), row=row), said, None)
            continue
        # Only what lies in the folder is looked for: an id may be any text.
        file = by_name.get(identity, by_name.get(Path(str(said.get("url") or "")).stem))
        if file is None:
            yield Item(key=_plain(key), place=Place(path=str(pictures)), problem="it was not fetched")
        else:
            yield _described(key, Place(path=str(file)), said, None)


def _open_table(path: Path) -> Any:
    module = _pyarrow()
    try:
        return module.ParquetFile(path)
    except Exception as error:  # its errors have no common root, and a table may have come from anybody
        raise UsageError(f"{path} can't be read as parquet: {type(error).__name__}.") from None


def _rows(path: Path, table: Any, wanted: list[str]) -> Iterator[Mapping[str, Any]]:
    try:
        for batch in table.iter_batches(batch_size=_ROWS, columns=wanted):
            yield from batch.to_pylist()
    except Exception as error:  # as above
        raise UsageError(f"{path} can't be read as parquet: {type(error).__name__}.") from None


@functools.lru_cache(maxsize=2)
def _row_group(path: str, group: int) -> list[Any]:
    """Return the pictures of a row group; neighbours are asked for one after the other."""
    column: list[Any] = _open_table(Path(path)).read_row_group(group, columns=["image"]).column("image").to_pylist()
    return column


@functools.lru_cache(maxsize=64)
def _group_sizes(path: str) -> tuple[int, ...]:
    table = _open_table(Path(path))
    return tuple(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups))


def _parquet_bytes(place: Place) -> bytes:
    row = place.row
    for group, rows in enumerate(_group_sizes(place.path)):
        if row < rows:
            try:
                value = _row_group(place.path, group)[row]
            except Exception as error:  # as above
                raise ValueError(f"the row can't be read: {type(error).__name__}") from None
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes) or len(content) > _MOST_PICTURE_BYTES:
                raise ValueError("the row holds no picture")
            return content
        row -= rows
    raise ValueError("there is no such row")
