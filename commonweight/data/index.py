"""The first pass over a source: every picture is decoded once, and one line says what it is or why it is left out.

The lines lie in a file in the order of the source. A preparation that was broken off counts them and goes on after the
last whole one; its first line says what was asked for, so that two preparations are never mixed.
"""

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from commonweight.data.pictures import Bucket, PictureSkipped, decode, look_hash, pixel_digest
from commonweight.data.sources import Item, Place, read_place
from protocol.canonical import canonical_json
from protocol.errors import UsageError

_AT_ONCE: Final = 32
"""Pictures of one task of a process."""
_AHEAD: Final = 3
"""Tasks for each process that are handed out before the oldest is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which pictures are taken and how they are cut.

    Args:
        among: the sizes to choose from.
        channels: 1 for grey, 3 for RGB.
        least_side: of a picture before it is resized.
        licence, source: of pictures whose source says nothing of them.
        licences: those that are taken; None takes all that say one, or have the default.
        most_caption: characters; longer captions are cut.
    """

    among: tuple[Bucket, ...]
    channels: int
    least_side: int
    licence: str | None
    source: str
    licences: tuple[str, ...] | None
    most_caption: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One picture in the index: taken, or skipped for a reason."""

    key: str
    place: Place
    caption: str = ""
    licence: str = ""
    source: str = ""
    sha256: str = ""
    pixels: str = ""
    look: str = ""
    bucket: Bucket | None = None
    width: int = 0
    height: int = 0
    skipped: str = ""
    detail: str = ""

    def to_json(self) -> bytes:
        """Return the row's line, with its newline."""
        return (
            canonical_json({name: value for name, value in asdict(self).items() if value not in ("", 0, None)}) + b"\n"
        )

    @classmethod
    def from_json(cls, line: bytes) -> "Row":
        """Read a line."""
        values = json.loads(line)
        place = Place(**values.pop("place"))
        bucket = values.pop("bucket", None)
        return cls(place=place, bucket=None if bucket is None else Bucket(**bucket), **values)


def look(item: Item, rules: Rules) -> Row:
    """Decode one picture and return its row."""
    try:
        return _look(item, rules)
    except PictureSkipped as skipped:
        return Row(key=item.key, place=item.place, skipped=skipped.reason, detail=skipped.detail)


def _look(item: Item, rules: Rules) -> Row:
    if item.problem is not None:
        raise PictureSkipped(item.reason, item.problem[:200])
    if not item.caption:
        nothing = "neither beside it nor in it" if item.caption is None else "the text that it has is empty"
        raise PictureSkipped("no caption", nothing)
    licence = item.licence or rules.licence
    if licence is None:
        raise PictureSkipped("no licence", "its source names none, and there is no default")
    if rules.licences is not None and licence not in rules.licences:
        raise PictureSkipped("licence", licence)
    try:
        content = read_place(item.place)
    except (OSError, ValueError) as error:
        raise PictureSkipped("unreadable", str(error)[:200]) from None
    picture = decode(content, rules.among, channels=rules.channels, least_side=rules.least_side)
    return Row(
        key=item.key,
        place=item.place,
        caption=item.caption[: rules.most_caption],
        licence=licence,
        source=item.source or rules.source,
        sha256=hashlib.sha256(content).hexdigest(),
        pixels=pixel_digest(picture.pixels),
        look=look_hash(picture.pixels),
        bucket=picture.bucket,
        width=picture.width,
        height=picture.height,
    )


def _look_at_all(items: Sequence[Item], rules: Rules) -> bytes:
    return b"".join(look(item, rules).to_json() for item in items)


def write_index(
    path: Path,
    items: Iterable[Item],
    rules: Rules,
    asked: dict[str, Any],
    pool: ProcessPoolExecutor,
    *,
    processes: int,
    on_rows: Callable[[int], None],
) -> None:
    """Write the index, or go on with it: pictures whose keys stand there already are not looked at again.

    Args:
        path: of the index.
        items: all of them, in the source's order.
        rules: which are taken.
        asked: what identifies this preparation; JSON.
        pool: the processes that decode.
        processes: how many there are.
        on_rows: called with the number of rows, as they come.

    Raises:
        UsageError: the file belongs to another preparation.
    """
    keys = _resume(path, asked)
    done = len(keys)
    on_rows(done)
    remaining = _after(iter(items), keys, path)
    with path.open("ab") as file:
        waiting: deque[tuple[int, Future[bytes]]] = deque()
        for batch in _batches(remaining):
            waiting.append((len(batch), pool.submit(_look_at_all, batch, rules)))
            if len(waiting) >= _AHEAD * processes:
                done += _take(file, waiting)
                on_rows(done)
        while waiting:
            done += _take(file, waiting)
            on_rows(done)
        file.flush()
        os.fsync(file.fileno())


def _take(file: Any, waiting: "deque[tuple[int, Future[bytes]]]") -> int:
    count, future = waiting.popleft()
    file.write(future.result())
    return count


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    while batch := list(itertools.islice(items, _AT_ONCE)):
        yield batch


def _after(items: Iterator[Item], keys: Sequence[str], path: Path) -> Iterator[Item]:
    """Pass over the items that the index has, which must still be the source's first ones; return the others."""
    for key in keys:
        item = next(items, None)
        if item is None or item.key != key:
            raise _other_preparation(path)
    return items


def _other_preparation(path: Path) -> UsageError:
    return UsageError(
        f"{path.parent.parent} holds the beginning of another preparation, or of another state of the source; "
        "--restart throws it away."
    )


def _resume(path: Path, asked: dict[str, Any]) -> list[str]:
    """Return the keys of the rows that are there; cut off a row that is not whole."""
    head = canonical_json(asked) + b"\n"
    if not path.exists():
        path.write_bytes(head)
        return []
    with path.open("r+b") as file:
        if file.readline() != head:
            raise _other_preparation(path)
        keys: list[str] = []
        whole = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                break
            keys.append(Row.from_json(line).key)
            whole += len(line)
        file.truncate(whole)
    return keys


def read_index(path: Path) -> Iterator[Row]:
    """Yield the rows of a whole index."""
    with path.open("rb") as file:
        file.readline()
        for line in file:
            yield Row.from_json(line)
