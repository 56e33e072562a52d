"""The digits that ship with scikit-learn as a run's data: 1,797 grey pictures of 8 x 8 pixels, captioned.

Nothing is downloaded. The split is the same everywhere: of each digit, the pictures are ordered by the SHA-256 of their
content and place, and the first fifth is held out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from commonweight.extras import not_installed
from coordinator.settings_sections import DataSettings
from diloco.shards import Halves, ShardInfo, pack_shard

NAMES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELDOUT_SHARE: Final = 5
"""One picture in so many is held out."""
SOURCE: Final = DataSettings().source
LICENCE: Final = DataSettings().licence
_LARGEST_PIXEL: Final = 16.0

Pixels = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Pictures [N, 8, 8], fp32 in 0..1, and which digit [N] each of them shows."""

    pixels: Pixels
    labels: Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """The whole set, cut in two."""

    train: Split
    heldout: Split


def caption(digit: int) -> str:
    """Return the caption of a digit: "a handwritten seven"."""
    return f"a handwritten {NAMES[digit]}"


def load_digits() -> Digits:
    """Return the digits, one fifth of each held out; the same split on every machine.

    Raises:
        PackageMissing: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise not_installed("The digits come with scikit-learn", "demo") from None
    bunch = datasets.load_digits()
    pixels = (np.asarray(bunch.images) / _LARGEST_PIXEL).astype(np.float32)
    labels = np.asarray(bunch.target).astype(np.int64)
    heldout = np.zeros(len(labels), dtype=np.bool_)
    for digit in range(len(NAMES)):
        ranked = sorted(np.flatnonzero(labels == digit).tolist(), key=lambda i: _rank(pixels[i], i))
        heldout[ranked[: len(ranked) // HELDOUT_SHARE]] = True
    return Digits(
        train=Split(pixels=pixels[~heldout], labels=labels[~heldout]),
        heldout=Split(pixels=pixels[heldout], labels=labels[heldout]),
    )


def shard_bytes(split: Split, indices: Sequence[int]) -> bytes:
    """Return a shard of some pictures: latent = 2 * pixel - 1 as fp16 [n, 1, 8, 8], with their captions."""
    latents: Halves = (split.pixels[indices][:, None] * np.float32(2) - np.float32(1)).astype(np.float16)
    captions = [caption(int(digit)) for digit in split.labels[indices]]
    return pack_shard(latents, ShardInfo(licence=LICENCE, source=SOURCE), captions=captions)


def write_digits(directory: Path, *, shards: int) -> tuple[list[Path], Path]:
    """Write `shards` training shards and the held-out one; return their paths. Each shard has every digit.

    Raises:
        PackageMissing: scikit-learn is not installed.
        ValueError: there are fewer pictures than shards.
    """
    digits = load_digits()
    order = np.argsort(digits.train.labels, kind="stable")
    if not 1 <= shards <= len(order):
        raise ValueError(f"{len(order)} pictures cannot be cut into {shards} shards")
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        path = directory / f"{shard:04d}.safetensors"
        # Dealt like cards from a deck sorted by digit, so that every shard has its share of each.
        path.write_bytes(shard_bytes(digits.train, order[shard::shards].tolist()))
        paths.append(path)
    heldout = directory / "heldout.safetensors"
    heldout.write_bytes(shard_bytes(digits.heldout, list(range(len(digits.heldout.labels)))))
    return paths, heldout


def _rank(picture: Pixels, place: int) -> bytes:
    return hashlib.sha256(b"commonweight/digits/v1\0" + picture.astype("<f4").tobytes() + b"%d" % place).digest()
