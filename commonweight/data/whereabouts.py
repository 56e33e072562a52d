"""Where each picture lies, by its key: which shard, and which sample of it. The curator's own list, for takedowns.

Keys are names of the curator's files, or ids of somebody's collection: the list is nothing to publish.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from commonweight.data.layout import SKIPPED, WHEREABOUTS
from commonweight.data.plan import Planned
from protocol.canonical import canonical_json
from protocol.documents import PreparedShard
from protocol.errors import DatasetInvalid, UsageError
from verify.plain_files import open_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One sample: a picture in one size. `height` and `width` count pixels, `sample` from 0."""

    key: str
    shard: str
    sample: int
    height: int
    width: int


def list_of(planned: Sequence[Planned], made: Sequence[PreparedShard]) -> bytes:
    """Return the list, a line of JSON for each sample, in the order of the shards."""
    return b"".join(
        canonical_json(
            asdict(Placed(key=row.key, shard=shard.sha256, sample=sample, height=shard.height, width=shard.width))
        )
        + b"\n"
        for plan, shard in zip(planned, made, strict=True)
        for sample, row in enumerate(plan.rows)
    )


def find(directory: Path, part: str) -> Iterator[Placed]:
    """Yield the samples whose keys hold `part`, in all sizes, sorted by key and then by size.

    Raises:
        UsageError: the data set has no such list.
        DatasetInvalid: the list can't be read.
    """
    path = directory / WHEREABOUTS
    if not path.is_file():
        raise UsageError(
            f"{directory} has no {WHEREABOUTS}, which says where pictures lie: an older version prepared it, or it was "
            "published without. `commonweight coordinator takedown --caption` finds pictures by their captions."
        )
    try:
        with open_plain(path) as file:
            found = [placed for line in file if part in (placed := Placed(**json.loads(line))).key]
    except (OSError, ValueError, TypeError) as error:
        raise DatasetInvalid(f"{path} can't be read: {type(error).__name__}.") from None
    yield from sorted(found, key=lambda placed: (placed.key, placed.height * placed.width, placed.shard))


def left_out(directory: Path, part: str) -> Iterator[str]:
    """Yield a line for each picture that was left out whose key holds `part`: a copy's says what it is a copy of.

    Raises:
        DatasetInvalid: the list of what was left out can't be read.
    """
    path = directory / SKIPPED
    if not path.is_file():
        return
    try:
        with open_plain(path) as file:
            for row in map(json.loads, file):
                if part in row["key"]:
                    yield f"{row['key']}: left out, {row['reason']} {row['detail']}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DatasetInvalid(f"{path} can't be read: {type(error).__name__}.") from None
