"""Where pictures and captions come from: folders, WebDataset tars, parquet tables. Nothing is decoded here.

A source gives its items in one fixed order, so that a preparation that was broken off goes on where it stopped. An item
says where its bytes lie; they are read later, by another process.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import PackageMissing, UsageError

PICTURES: Final = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
TAR: Final = ".tar"
PARQUET: Final = ".parquet"
_MOST_SIDECAR_BYTES: Final = 1 << 20
_MOST_PICTURE_BYTES: Final = 256 << 20
_CAPTIONS: Final = ("caption", "text", "prompt", "description")
_ROWS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a picture's bytes lie: a whole file, a part of one (a tar), or a row of a parquet table."""

    path: str
    offset: int = 0
    size: int = -1
    row: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One picture as its source describes it. `caption`, `licence` and `source` are None where it says nothing."""

    key: str
    place: Place
    caption: str | None
    licence: str | None
    source: str | None


def list_sources(path: Path) -> list[Path]:
    """Return the files that a source consists of, sorted; a folder of pictures is one file: itself.

    Raises:
        UsageError: there is nothing here that can be read.
    """
    if path.is_file() and path.suffix in (TAR, PARQUET):
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a .tar or .parquet file.")
    packed = sorted(found for found in path.rglob("*") if found.suffix in (TAR, PARQUET) and found.is_file())
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


def read_place(place: Place) -> bytes:
    """Return a picture's bytes.

    Raises:
        OSError: they can't be read.
        ValueError: they are more than any picture should have.
    """
    if place.row >= 0:
        return _parquet_bytes(place)
    with Path(place.path).open("rb") as file:
        file.seek(place.offset)
        content = file.read(_MOST_PICTURE_BYTES + 1 if place.size < 0 else place.size)
    if len(content) > _MOST_PICTURE_BYTES:
        raise ValueError(f"it has more than {_MOST_PICTURE_BYTES:,} bytes")
    return content


# --- folders -------------------------------------------------------------------------------------------------


def _folder(root: Path) -> Iterator[Item]:
    for path in sorted(found for found in root.rglob("*") if found.suffix.lower() in PICTURES and found.is_file()):
        described = _described(
            _sidecar(path.with_suffix(".json")), _sidecar(path.with_suffix(".txt")), path.relative_to(root).as_posix()
        )
        yield Item(place=Place(path=str(path)), **described)


def _sidecar(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_SIDECAR_BYTES)
    except OSError:
        return None


def _described(json_raw: bytes | None, text_raw: bytes | None, key: str) -> dict[str, Any]:
    """Return what the files beside a picture say; those that can't be read say nothing."""
    said: Mapping[str, Any] = {}
    if json_raw is not None:
        try:
            parsed = json.loads(json_raw)
            said = parsed if isinstance(parsed, dict) else {}
        except (ValueError, RecursionError):
            said = {}
    caption = next((said[name] for name in _CAPTIONS if isinstance(said.get(name), str)), None)
    if caption is None and text_raw is not None:
        caption = text_raw.decode("utf-8", errors="replace")
    return {
        "key": key,
        "caption": None if caption is None else _plain(caption),
        "licence": _text(said, "license", "licence"),
        "source": _text(said, "source", "url"),
    }


def _text(said: Mapping[str, Any], *names: str) -> str | None:
    found = next((said[name] for name in names if isinstance(said.get(name), str) and said[name].strip()), None)
    return None if found is None else _plain(found)[:200]


def _plain(text: str) -> str:
    """One line, single spaces, no characters that UTF-8 can't hold."""
    return " ".join(text.encode("utf-8", errors="replace").decode("utf-8").replace("\0", " ").split())


# --- tars ----------------------------------------------------------------------------------------------------


def _tar(path: Path) -> Iterator[Item]:
    """Neighbouring members whose names differ only after the first dot belong together, as WebDataset has it."""
    stem, parts = "", dict[str, tarfile.TarInfo]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                first, _, extension = name.partition(".")
                found = f"{folder}/{first}" if folder else first
                if found != stem:
                    yield from _tar_item(path, tar, stem, parts)
                    stem, parts = found, {}
                parts[f".{extension.lower()}"] = member
            yield from _tar_item(path, tar, stem, parts)
    except tarfile.TarError as error:
        raise UsageError(f"{path} can't be read as an uncompressed tar: {error}.") from None


def _tar_item(path: Path, tar: tarfile.TarFile, stem: str, parts: Mapping[str, tarfile.TarInfo]) -> Iterator[Item]:
    picture = next((parts[extension] for extension in sorted(parts) if extension in PICTURES), None)
    if picture is None:
        return
    read = {name: _member(tar, parts[name]) for name in (".json", ".txt") if name in parts}
    described = _described(read.get(".json"), read.get(".txt"), f"{path.name}/{stem}")
    yield Item(place=Place(path=str(path), offset=picture.offset_data, size=picture.size), **described)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    file = tar.extractfile(member)
    return None if file is None else file.read(_MOST_SIDECAR_BYTES)


# --- parquet -------------------------------------------------------------------------------------------------


def _pyarrow() -> Any:  # it has no types
    try:
        import pyarrow.parquet
    except ImportError:
        raise PackageMissing(
            "Parquet tables need pyarrow, which is not installed; `pip install 'commonweight[data]'` installs it."
        ) from None
    return pyarrow.parquet


def _parquet(path: Path, pictures: Path | None) -> Iterator[Item]:
    """PD12M's columns: id, url, caption, width, height, mime_type, hash, license, source; or an `image` with bytes."""
    table = _pyarrow().ParquetFile(path)
    names = set(table.schema_arrow.names)
    inside = "image" in names
    if not inside and pictures is None:
        raise UsageError(f"{path} holds links, no pictures; fetch them into a folder, named by id, and name it too.")
    by_name = {} if pictures is None else {found.stem: found for found in sorted(pictures.rglob("*"))}
    wanted = [name for name in ("id", "url", *_CAPTIONS, "license", "licence", "source") if name in names]
    row = 0
    for batch in table.iter_batches(batch_size=_ROWS, columns=wanted):
        for said in batch.to_pylist():
            identity = str(said.get("id") or said.get("url") or row)
            described = _described(json.dumps(said, default=str).encode(), None, f"{path.name}/{identity}")
            if inside:
                yield Item(place=Place(path=str(path), row=row), **described)
            else:
                file = by_name.get(identity, by_name.get(Path(str(said.get("url") or "")).stem))
                # A picture that was not fetched is skipped later like one that can't be read.
                yield Item(place=Place(path=str(file or f"{pictures}/{identity}")), **described)
            row += 1


def _parquet_bytes(place: Place) -> bytes:
    table = _pyarrow().ParquetFile(place.path)
    row = place.row
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row < rows:
            value = table.read_row_group(group, columns=["image"]).column("image")[row].as_py()
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise ValueError("the row holds no picture")
            return content
        row -= rows
    raise ValueError("there is no such row")
