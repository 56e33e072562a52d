"""A data shard: latents and text conditioning of some thousands of pictures, as one canonical safetensors file.

Tensors: `text_offsets` [N + 1] int64, `latent` [N, C, H, W] fp16, `pooled` [N, P] fp16, `text` [sum of L, D] fp16.
Text is stored without padding: sample i owns rows text_offsets[i] to text_offsets[i + 1].
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch

from diloco.layout import DTYPES, LENGTH_BYTES, Entry, Layout, parse_layout
from protocol.canonical import canonical_json, parse_json
from protocol.errors import PayloadInvalid, ShardCorrupt
from protocol.limits import MAX_SHARD_HEADER_BYTES

FORMAT: Final = 1
Halves = npt.NDArray[np.float16]
Offsets = npt.NDArray[np.int64]

# Widest element first, so that every tensor starts at a multiple of its element's size.
_ORDER: Final = ("text_offsets", "latent", "pooled", "text")
_DTYPES: Final = {"text_offsets": "I64", "latent": "F16", "pooled": "F16", "text": "F16"}
_RANKS: Final = {"text_offsets": 1, "latent": 4, "pooled": 2, "text": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """Where a shard comes from, as its header says: licence, source, and optionally a digest of the captions."""

    licence: str
    source: str
    captions_digest: str | None = None

    def to_json(self, n: int) -> dict[str, object]:
        """Return the metadata object of a shard of `n` samples."""
        described: dict[str, object] = {"format": FORMAT, "licence": self.licence, "n": n, "source": self.source}
        if self.captions_digest is not None:
            described["captions_digest"] = self.captions_digest
        return described


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture's training data, fp16: latent [C, H, W], text [L, D] without padding, pooled [P]."""

    latent: Halves
    text: Halves
    pooled: Halves


def write_shard(
    latent_NCHW: Halves, texts_LD: Sequence[Halves], pooled_NP: Halves, info: ShardInfo
) -> bytes:  # fmt: skip
    """Return the bytes of a shard; equal content gives equal bytes.

    Args:
        latent_NCHW: fp16 latents.
        texts_LD: one fp16 [L, D] array for each sample, without padding; L may be 0.
        pooled_NP: fp16 pooled text vectors.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    n = len(latent_NCHW)
    if not n or len(texts_LD) != n or len(pooled_NP) != n:
        raise ValueError(f"a shard of {n} latents needs as many texts ({len(texts_LD)}) and vectors ({len(pooled_NP)})")
    offsets = np.cumsum([0, *(len(text) for text in texts_LD)], dtype=np.int64)
    arrays: dict[str, npt.NDArray[Any]] = {
        "text_offsets": offsets,
        "latent": latent_NCHW,
        "pooled": pooled_NP,
        "text": np.concatenate(texts_LD, axis=0),
    }
    for name, array in arrays.items():
        if array.dtype != DTYPES[_DTYPES[name]] or array.ndim != _RANKS[name]:
            raise ValueError(
                f"{name} is {array.dtype}{array.shape}; a shard holds {_DTYPES[name]} of rank {_RANKS[name]}"
            )
    entries = tuple(Entry(name=name, dtype=_DTYPES[name], shape=arrays[name].shape) for name in _ORDER)
    metadata = ("shard", canonical_json(info.to_json(n)).decode("utf-8"))
    data = (np.ascontiguousarray(arrays[name]).astype(DTYPES[_DTYPES[name]], copy=False).tobytes() for name in _ORDER)
    return Layout(entries=entries, metadata=metadata).prefix() + b"".join(data)


class Shard:
    """A shard whose header is canonical and whose tensors fit each other; a path is mapped, not read."""

    __slots__ = ("info", "latent", "n", "pooled", "text", "text_offsets")

    def __init__(self, info: ShardInfo, tensors: dict[str, npt.NDArray[Any]]) -> None:
        self.info = info
        self.latent: Halves = tensors["latent"]
        self.pooled: Halves = tensors["pooled"]
        self.text: Halves = tensors["text"]
        self.text_offsets: Offsets = tensors["text_offsets"]
        self.n = len(self.latent)

    @classmethod
    def open(cls, source: Path | bytes) -> Self:
        """Check header, size, shapes, offsets and finiteness.

        Raises:
            ShardCorrupt: something is not what `write_shard` writes.
        """
        try:
            return cls._parse(memoryview(_mapped(source)))
        except (ValueError, PayloadInvalid) as error:
            name = "the shard" if isinstance(source, bytes) else source.name
            raise ShardCorrupt(f"Shard {name} is damaged: {error}. It must be fetched again.") from None

    @classmethod
    def _parse(cls, raw: memoryview) -> Self:
        length = int.from_bytes(raw[:LENGTH_BYTES], "little")
        if len(raw) < LENGTH_BYTES or length > min(MAX_SHARD_HEADER_BYTES, len(raw) - LENGTH_BYTES):
            raise ValueError(f"it announces a header of {length:,} bytes")
        layout = parse_layout(bytes(raw[LENGTH_BYTES : LENGTH_BYTES + length]), _ORDER)
        data = raw[LENGTH_BYTES + length :]
        if len(data) != layout.data_bytes():
            raise ValueError(f"it holds {len(data):,} bytes of data where its header says {layout.data_bytes():,}")
        tensors = dict(_tensors(layout, data))
        info = _read_info(layout, len(tensors["latent"]))
        _check_fit(tensors)
        return cls(info, tensors)

    @property
    def widths(self) -> tuple[int, ...]:
        """(C, H, W, D, P): what all shards of a unit must share."""
        return (*self.latent.shape[1:], self.text.shape[1], self.pooled.shape[1])

    def sample(self, i: int) -> Sample:
        """Return sample `i`."""
        start, stop = int(self.text_offsets[i]), int(self.text_offsets[i + 1])
        return Sample(latent=self.latent[i], text=self.text[start:stop], pooled=self.pooled[i])


class ShardSet:
    """The shards of a unit, in the unit's order, as one list of samples."""

    __slots__ = ("_starts", "n", "shards")

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise ValueError("a set of shards needs at least one shard")
        if len({shard.widths for shard in shards}) != 1:
            raise ShardCorrupt("The unit's shards hold latents or texts of different shapes; they cannot be mixed.")
        self.shards = tuple(shards)
        self._starts = np.cumsum([0, *(shard.n for shard in shards)])
        self.n = int(self._starts[-1])

    def sample(self, i: int) -> Sample:
        """Return sample `i` of all shards' samples."""
        if not 0 <= i < self.n:
            raise IndexError(f"sample {i} of {self.n}")
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.shards[shard].sample(i - int(self._starts[shard]))

    def batch(self, indices: Sequence[int], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (latent [B, C, H, W], text [B, max_tokens, D], pooled [B, P]), fp32 on the CPU, text zero padded.

        Raises:
            ShardCorrupt: a sample has more than `max_tokens` tokens.
        """
        channels, height, width, token_dim, pooled_dim = self.shards[0].widths
        latent = np.empty((len(indices), channels, height, width), dtype=np.float32)
        text = np.zeros((len(indices), max_tokens, token_dim), dtype=np.float32)
        pooled = np.empty((len(indices), pooled_dim), dtype=np.float32)
        for row, i in enumerate(indices):
            sample = self.sample(i)
            if len(sample.text) > max_tokens:
                raise ShardCorrupt(f"Sample {i} has {len(sample.text)} text tokens; the run's limit is {max_tokens}.")
            latent[row] = sample.latent
            text[row, : len(sample.text)] = sample.text
            pooled[row] = sample.pooled
        return torch.from_numpy(latent), torch.from_numpy(text), torch.from_numpy(pooled)


def _mapped(source: Path | bytes) -> bytes | mmap.mmap:
    if isinstance(source, bytes):
        return source
    # Without O_NONBLOCK the opening of a named pipe, which has no size to be mapped, would wait for a writer.
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # an empty file is a ValueError


def _tensors(layout: Layout, data: memoryview) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    starts = layout.starts()
    for entry in layout.entries:
        if entry.dtype != _DTYPES[entry.name] or len(entry.shape) != _RANKS[entry.name]:
            raise ValueError(f"{entry.name} is {entry.dtype} of shape {entry.shape}")
        part = data[starts[entry.name] : starts[entry.name] + entry.num_bytes]
        yield entry.name, np.frombuffer(part, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def _read_info(layout: Layout, n: int) -> ShardInfo:
    key, value = layout.metadata
    described = parse_json(value.encode("utf-8"))
    if key != "shard" or not isinstance(described, dict):
        raise ValueError("its header does not describe a shard")
    if described.get("format") != FORMAT:
        raise ValueError(f"it has format {described.get('format')}; this version reads format {FORMAT}")
    licence, source, captions = (described.get(name) for name in ("licence", "source", "captions_digest"))
    if not isinstance(licence, str) or not isinstance(source, str) or not isinstance(captions, str | None):
        raise ValueError("its licence, source or captions digest is not a text")
    info = ShardInfo(licence=licence, source=source, captions_digest=captions)
    if canonical_json(info.to_json(n)) != value.encode("utf-8"):
        raise ValueError("its description is not canonical, or names another number of samples")
    return info


def _check_fit(tensors: dict[str, npt.NDArray[Any]]) -> None:
    latent, pooled, text, offsets = (tensors[name] for name in ("latent", "pooled", "text", "text_offsets"))
    if not len(latent) or len(pooled) != len(latent) or len(offsets) != len(latent) + 1:
        raise ValueError(f"it holds {len(latent)} latents, {len(pooled)} pooled vectors, {len(offsets)} text offsets")
    if offsets[0] != 0 or offsets[-1] != len(text) or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError("its text offsets do not run from 0 to the number of text rows")
    if not all(np.all(np.isfinite(array)) for array in (latent, pooled, text)):
        raise ValueError("it holds NaN or infinite values")
