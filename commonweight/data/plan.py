"""From the index to shards: duplicates go, the rest is shuffled within its bucket and dealt out, by a seed."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from commonweight.data.index import Row
from commonweight.data.pictures import Bucket, closest
from protocol.errors import UsageError

_DOMAIN: Final = b"commonweight/prepare/v1\0"
_MOST_HELDOUT: Final = 512
_PART_HELDOUT: Final = 10
"""One of so many is held out, where nothing else is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The pictures of one shard, in order; all of one bucket.

    `heldout`: they are measured on, by whoever need not have the text encoders that training has.
    """

    bucket: Bucket
    rows: tuple[Row, ...]
    heldout: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What becomes of every picture: training shards, the held-out one, and what is left out."""

    shards: tuple[Planned, ...]
    heldout: Planned
    skipped: tuple[Row, ...]


def plan(
    rows: Iterable[Row],
    *,
    seed: bytes,
    sample_bytes: Callable[[str, Bucket], int],
    shard_bytes: int,
    heldout: int | None,
    least_in_bucket: int,
    families: Sequence[tuple[Bucket, ...]] = (),
) -> Plan:
    """Deal out pictures; the same rows give the same plan.

    Args:
        rows: the index.
        seed: of the shuffling.
        sample_bytes: what a caption and its picture take in a shard.
        shard_bytes: about how large a shard is to be.
        heldout: pictures kept for validation, of the fullest bucket; of several families of the last one's.
            None is a tenth of that bucket, at least 1 and at most 512.
        least_in_bucket: buckets with fewer pictures are given up, and their pictures cut to the next best.
        families: for runs that go from smaller to larger pictures, the buckets of each size; every picture is in all
            that it is large enough for. None is one family, of the buckets that the index has.

    Raises:
        UsageError: fewer pictures than would fill a shard beside the held-out one.
    """
    taken, skipped = _without_duplicates(rows)
    sized = _families(taken, families, least_in_bucket)
    if not sized or not sized[-1]:
        raise UsageError(f"No picture is left: {_counted(skipped)}. See --licence, --accept and --least-side.")
    last = sized[-1]
    fullest = max(sorted(last), key=lambda bucket: len(last[bucket]))
    kept = sorted(last[fullest], key=lambda row: _rank(seed, b"heldout", row))
    if heldout is None:
        heldout = min(_MOST_HELDOUT, max(1, len(kept) // _PART_HELDOUT))
    if len(kept) <= heldout or heldout < 1:
        raise UsageError(
            f"{heldout} held-out pictures of {len(kept)} of size {fullest}: at least one must be held out, and one "
            f"left to train on; set --heldout lower, or add pictures. Skipped were: {_counted(skipped)}."
        )
    hidden = {row.key for row in kept[:heldout]}  # in no size may they be trained on
    shards = [
        Planned(bucket=bucket, rows=part)
        for by_bucket in sized
        for bucket in sorted(by_bucket)
        for part in _dealt(
            [row for row in by_bucket[bucket] if row.key not in hidden], bucket, seed, sample_bytes, shard_bytes
        )
    ]
    return Plan(
        shards=tuple(shards),
        heldout=Planned(bucket=fullest, rows=tuple(kept[:heldout]), heldout=True),
        skipped=tuple(skipped),
    )


def _without_duplicates(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Keep the first of pictures that are the same pixel for pixel."""
    seen: dict[str, str] = {}
    taken, skipped = [], []
    for row in rows:
        if row.skipped:
            skipped.append(row)
        elif row.pixels in seen:
            skipped.append(replace(row, skipped="duplicate", detail=f"of {seen[row.pixels]}"))
        else:
            seen[row.pixels] = row.key
            taken.append(row)
    return taken, skipped


def _families(rows: Sequence[Row], families: Sequence[tuple[Bucket, ...]], least: int) -> list[dict[Bucket, list[Row]]]:
    """Return the pictures by bucket, of each family by itself."""
    if not families:
        return [_buckets(rows, least)]
    found = []
    for family in families:
        side = min(max(bucket.height, bucket.width) for bucket in family)  # of the square one
        large = [row for row in rows if family is families[0] or min(row.width, row.height) >= side]
        found.append(_buckets([replace(row, bucket=closest(row.width, row.height, family)) for row in large], least))
    return found


def _buckets(rows: Sequence[Row], least: int) -> dict[Bucket, list[Row]]:
    counts = Counter(row.bucket for row in rows if row.bucket is not None)
    full = tuple(sorted(bucket for bucket, count in counts.items() if count >= least))
    # A small set keeps the bucket that it fills most.
    kept = full or tuple(bucket for bucket, _ in counts.most_common(1))
    found: dict[Bucket, list[Row]] = {}
    for row in rows:
        assert row.bucket is not None  # it was not skipped
        bucket = row.bucket if row.bucket in kept else closest(row.width, row.height, kept)
        found.setdefault(bucket, []).append(row)
    return found


def _dealt(
    rows: Sequence[Row], bucket: Bucket, seed: bytes, sample_bytes: Callable[[str, Bucket], int], shard_bytes: int
) -> list[tuple[Row, ...]]:
    """Cut shuffled pictures into shards of equal numbers, each at most about `shard_bytes` large."""
    ordered = sorted(rows, key=lambda row: _rank(seed, b"order", row))
    if not ordered:
        return []
    count = -(-sum(sample_bytes(row.caption, bucket) for row in ordered) // shard_bytes)
    count = min(count, len(ordered))
    ends = [len(ordered) * (number + 1) // count for number in range(count)]
    return [tuple(ordered[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _rank(seed: bytes, purpose: bytes, row: Row) -> tuple[bytes, str]:
    return hashlib.sha256(_DOMAIN + purpose + seed + row.key.encode() + row.sha256.encode()).digest(), row.key


def _counted(skipped: Sequence[Row]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in skipped_by_reason(skipped).items()) or "none"


def skipped_by_reason(skipped: Iterable[Row]) -> Mapping[str, int]:
    """Return how many pictures were left out for each reason, the most common first."""
    return dict(Counter(row.skipped for row in skipped).most_common())
