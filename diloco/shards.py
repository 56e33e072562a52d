"""A data shard: latents, captions and encoded text of some thousands of pictures, as one canonical safetensors file.

Tensors: `latent` [N, C, H, W] fp16; `captions`, their UTF-8 bytes, with `caption_offsets` [N + 1] int64; and of each
text encoder `text` [sum of L, D] fp16, `text_offsets` int64 and `pooled` [., P] fp16, under the encoder's name and a
dot; the embedded encoder has no name. A shard holds captions, encoded text, or both. Text is stored without padding:
sample i owns rows text_offsets[i] to text_offsets[i + 1]. An encoder with a name has one text more than there are
samples: that of the empty caption, which training without a caption needs.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch

from diloco.layout import DTYPES, LENGTH_BYTES, Entry, Layout, parse_layout
from diloco.texts import StoredTexts, TextSource
from mmdit.conditioning import Encoded, TextPart, embedded_layout
from mmdit.encoders import ENCODER_NAMES
from protocol.canonical import canonical_json, parse_json
from protocol.errors import PayloadInvalid, ShardCorrupt
from protocol.limits import MAX_CAPTION_BYTES, MAX_SHARD_HEADER_BYTES

FORMAT: Final = 2
Halves = npt.NDArray[np.float16]
Offsets = npt.NDArray[np.int64]

_LATENT: Final = "latent"
_CAPTIONS, _CAPTION_OFFSETS = "captions", "caption_offsets"
_TEXT, _TEXT_OFFSETS, _POOLED = "text", "text_offsets", "pooled"
# Dtype and rank of every tensor, by the last part of its name.
_KINDS: Final[Mapping[str, tuple[str, int]]] = {
    _LATENT: ("F16", 4),
    _CAPTIONS: ("U8", 1),
    _CAPTION_OFFSETS: ("I64", 1),
    _TEXT: ("F16", 2),
    _TEXT_OFFSETS: ("I64", 1),
    _POOLED: ("F16", 2),
}
# Widest element first, so that every tensor starts at a multiple of its element's size.
_WIDEST_FIRST: Final = ("I64", "F16", "U8")
_PARTS: Final = ("", *ENCODER_NAMES)
_TEXT_TENSORS: Final = (_TEXT, _TEXT_OFFSETS, _POOLED)
_KNOWN: Final = {_LATENT, _CAPTIONS, _CAPTION_OFFSETS} | {
    f"{part}.{tensor}".removeprefix(".") for part in _PARTS for tensor in _TEXT_TENSORS
}
_ANY_ROWS: Final = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """Where a shard comes from, as its header says."""

    licence: str
    source: str

    def to_json(self, n: int) -> dict[str, object]:
        """Return the metadata object of a shard of `n` samples."""
        return {"format": FORMAT, "licence": self.licence, "n": n, "source": self.source}


def write_shard(
    latent_NCHW: Halves, texts_LD: Sequence[Halves], pooled_NP: Halves, info: ShardInfo
) -> bytes:  # fmt: skip
    """Return the bytes of a shard whose text the embedded encoder has made; equal content gives equal bytes.

    Args:
        latent_NCHW: fp16 latents.
        texts_LD: one fp16 [L, D] array for each sample, without padding; L may be 0.
        pooled_NP: fp16 pooled text vectors.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    if len(texts_LD) != len(pooled_NP):
        raise ValueError(f"a shard needs as many texts ({len(texts_LD)}) as vectors ({len(pooled_NP)})")
    encoded = [Encoded(tokens=text, pooled=pooled) for text, pooled in zip(texts_LD, pooled_NP, strict=True)]
    return pack_shard(latent_NCHW, info, parts={"": encoded})


def pack_shard(
    latent_NCHW: Halves,
    info: ShardInfo,
    *,
    captions: Sequence[str] | None = None,
    parts: Mapping[str, Sequence[Encoded]] | None = None,
) -> bytes:
    """Return the bytes of a shard; equal content gives equal bytes.

    Args:
        latent_NCHW: fp16 latents.
        info: what the header says.
        captions: one for each sample.
        parts: what text encoders have made of them, by the encoders' names; those with a name give one text more at the
            end, of the empty caption.

    Raises:
        ValueError: neither captions nor text, or shapes or dtypes that do not fit each other.
    """
    n, parts = len(latent_NCHW), parts or {}
    if not n or (captions is None and not parts):
        raise ValueError("a shard needs latents, and captions or encoded text")
    arrays: dict[str, npt.NDArray[Any]] = {_LATENT: latent_NCHW}
    if captions is not None:
        if len(captions) != n:
            raise ValueError(f"a shard of {n} latents needs as many captions, not {len(captions)}")
        arrays |= _packed_captions(captions)
    for name, texts in parts.items():
        if len(texts) != _texts_of(name, n):
            raise ValueError(f"a shard of {n} latents needs as many texts, not {len(texts)}")
        arrays |= _packed_text(name, texts)
    for name, array in arrays.items():
        dtype, rank = _kind(name)
        if array.dtype != DTYPES[dtype] or array.ndim != rank:
            raise ValueError(f"{name} is {array.dtype}{array.shape}; a shard holds {dtype} of rank {rank}")
    order = _file_order(arrays)
    entries = tuple(Entry(name=name, dtype=_kind(name)[0], shape=arrays[name].shape) for name in order)
    metadata = ("shard", canonical_json(info.to_json(n)).decode("utf-8"))
    data = (np.ascontiguousarray(arrays[name]).astype(DTYPES[_kind(name)[0]], copy=False).tobytes() for name in order)
    return Layout(entries=entries, metadata=metadata).prefix() + b"".join(data)


def _packed_captions(captions: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    raw = [caption.encode() for caption in captions]
    _check_lengths([len(text) for text in raw])
    return {
        _CAPTION_OFFSETS: np.cumsum([0, *(len(text) for text in raw)], dtype=np.int64),
        _CAPTIONS: np.frombuffer(b"".join(raw), dtype=np.uint8),
    }


def _packed_text(name: str, texts: Sequence[Encoded]) -> dict[str, npt.NDArray[Any]]:
    packed: dict[str, npt.NDArray[Any]] = {
        _named(name, _TEXT_OFFSETS): np.cumsum([0, *(len(text.tokens) for text in texts)], dtype=np.int64),
        _named(name, _TEXT): np.concatenate([text.tokens for text in texts], axis=0),
    }
    pooled = np.stack([text.pooled for text in texts])
    if pooled.shape[-1]:
        packed[_named(name, _POOLED)] = pooled
    return packed


def _named(part: str, tensor: str) -> str:
    return f"{part}.{tensor}" if part else tensor


def _kind(name: str) -> tuple[str, int]:
    return _KINDS[name.rpartition(".")[2]]


def _file_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (_WIDEST_FIRST.index(_kind(name)[0]), name))


def _texts_of(part: str, n: int) -> int:
    return n + 1 if part else n


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredText:
    """What one encoder has made of a shard's captions: tokens of all, where each begins, and pooled vectors."""

    tokens: Halves
    offsets: Offsets
    pooled: Halves

    def of(self, i: int) -> Encoded:
        """Return the text of sample `i`."""
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        return Encoded(tokens=self.tokens[start:stop], pooled=self.pooled[i])


class Shard:
    """A shard whose header is canonical and whose tensors fit each other; a path is mapped, not read."""

    __slots__ = ("_captions", "info", "latent", "n", "parts")

    def __init__(self, info: ShardInfo, tensors: dict[str, npt.NDArray[Any]]) -> None:
        self.info = info
        self.latent: Halves = tensors[_LATENT]
        self.n = len(self.latent)
        self.parts: Mapping[str, StoredText] = _stored_parts(tensors, self.n)
        captions = (tensors[_CAPTIONS], tensors[_CAPTION_OFFSETS]) if _CAPTIONS in tensors else None
        self._captions: tuple[npt.NDArray[np.uint8], Offsets] | None = captions

    @classmethod
    def open(cls, source: Path | bytes) -> Self:
        """Check header, size, shapes, offsets, captions and finiteness.

        Raises:
            ShardCorrupt: something is not what `pack_shard` writes.
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
        layout = _read_layout(bytes(raw[LENGTH_BYTES : LENGTH_BYTES + length]))
        data = raw[LENGTH_BYTES + length :]
        if len(data) != layout.data_bytes():
            raise ValueError(f"it holds {len(data):,} bytes of data where its header says {layout.data_bytes():,}")
        tensors = dict(_tensors(layout, data))
        n = len(tensors[_LATENT])
        info = _read_info(layout, n)
        _check_fit(tensors, n)
        return cls(info, tensors)

    @property
    def size(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        channels, height, width = self.latent.shape[1:]
        return channels, height, width

    @property
    def text_widths(self) -> Mapping[str, tuple[int, int]]:
        """(D, P) of each encoder whose text it holds, by name."""
        return {name: (part.tokens.shape[1], part.pooled.shape[1]) for name, part in self.parts.items()}

    @property
    def has_captions(self) -> bool:
        """Whether the captions themselves are in it."""
        return self._captions is not None

    def caption(self, i: int) -> str | None:
        """Return the caption of sample `i`, if captions are in it."""
        if self._captions is None:
            return None
        raw, offsets = self._captions
        return raw[int(offsets[i]) : int(offsets[i + 1])].tobytes().decode("utf-8")

    def stored(self, part: str, i: int | None) -> Encoded | None:
        """Return what an encoder has made of sample `i`, or of the empty caption, if that is in it."""
        found = self.parts.get(part)
        return None if found is None else found.of(self.n if i is None else i)

    def longest(self, part: str) -> int:
        """Return the tokens of the longest text of an encoder."""
        return int(np.diff(self.parts[part].offsets).max())


KEPT, SILENT, EMPTY = 0, 1, 2
"""What a sample hears of an encoder: its caption, nothing (zeros), or what the encoder makes of the empty caption."""


class ShardSet:
    """The shards of a unit, in the unit's order, as one list of samples, and where their text comes from."""

    __slots__ = ("_skips", "_starts", "n", "shards", "texts", "without")

    def __init__(
        self,
        shards: Sequence[Shard],
        texts: TextSource | None = None,
        without: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Put shards together.

        Args:
            shards: all of one size of latents.
            texts: where text comes from; None is what the embedded encoder has left in the shards.
            without: of each shard the numbers of the samples that are left out, because they were taken down; None
                leaves out none. `n` and every index count what is left.

        Raises:
            ShardCorrupt: the shards do not fit each other, or hold fewer samples than are left out.
        """
        if not shards:
            raise ValueError("a set of shards needs at least one shard")
        if len({shard.size for shard in shards}) != 1:
            raise ShardCorrupt("The unit's shards hold latents of different shapes; they cannot be mixed.")
        self.texts: TextSource = _embedded(shards[0]) if texts is None else texts
        if any(_misfit(shard, part) for shard in shards for part in self.texts.layout.parts):
            raise ShardCorrupt("The unit's shards hold texts of different shapes; they cannot be mixed.")
        self.shards = tuple(shards)
        self.without = tuple(tuple(sorted(set(left_out))) for left_out in without or [()] * len(shards))
        for shard, left_out in zip(self.shards, self.without, strict=True):
            if left_out and not (left_out[0] >= 0 and left_out[-1] < shard.n):
                raise ShardCorrupt(f"Sample {left_out[-1]} was taken down, of a shard that holds {shard.n}.")
        # Of each shard, how many of the samples that are left come before each one that is left out.
        self._skips = [np.array(left_out, dtype=np.int64) - np.arange(len(left_out)) for left_out in self.without]
        kept = [shard.n - len(left_out) for shard, left_out in zip(self.shards, self.without, strict=True)]
        self._starts = np.cumsum([0, *kept])
        self.n = int(self._starts[-1])
        if not self.n:
            raise ShardCorrupt("Every sample of these shards was taken down; there is nothing left to train on.")

    def place(self, i: int) -> tuple[Shard, int]:
        """Return the shard that the `i`-th sample of those that are left is in, and its number there."""
        if not 0 <= i < self.n:
            raise IndexError(f"sample {i} of {self.n}")
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        at = i - int(self._starts[shard])
        return self.shards[shard], at + int(np.searchsorted(self._skips[shard], at, side="right"))

    def places_left(self) -> list[int | None]:
        """Return for every sample of all shards its place among those that are left; None if it is left out."""
        found: list[int | None] = []
        left = 0
        for shard, left_out in zip(self.shards, map(set, self.without), strict=True):
            for number in range(shard.n):
                found.append(None if number in left_out else left)
                left += number not in left_out
        return found

    def batch(
        self, indices: Sequence[int], max_tokens: int, heard: Sequence[Sequence[int]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (latent [B, C, H, W], text [B, max_tokens, D], pooled [B, P]), fp32 on the CPU, text zero padded.

        Args:
            indices: which samples.
            max_tokens: rows of the text.
            heard: for each sample and encoder KEPT, SILENT or EMPTY; None keeps all.

        Raises:
            ShardCorrupt: a sample has more tokens than there is room for, or a shard lacks what the run hears.
        """
        places = [self.place(i) for i in indices]
        latent = np.stack([shard.latent[at] for shard, at in places]).astype(np.float32)
        try:
            text, pooled = self.texts.layout.assemble(self._heard(places, heard), max_tokens)
        except ValueError as error:
            raise ShardCorrupt(f"A shard does not fit the run: {error}.") from None
        return torch.from_numpy(latent), torch.from_numpy(text), torch.from_numpy(pooled)

    def _heard(
        self, places: Sequence[tuple[Shard, int]], heard: Sequence[Sequence[int]] | None
    ) -> list[list[Encoded | None]]:
        if heard is None:
            return [list(texts) for texts in self.texts.encoded(places)]
        encoded = self.texts.encoded(places, [[state == KEPT for state in states] for states in heard])
        found: list[list[Encoded | None]] = []
        for (shard, _), texts, states in zip(places, encoded, heard, strict=True):
            empty = self.texts.empty(shard) if EMPTY in states else texts
            found.append(
                [nothing if state == EMPTY else one for state, one, nothing in zip(states, texts, empty, strict=True)]
            )
        return found


def _embedded(shard: Shard) -> TextSource:
    if "" not in shard.parts:
        raise ShardCorrupt("The shard holds no text of the embedded encoder.")
    token_dim, pooled_dim = shard.text_widths[""]
    return StoredTexts(layout=embedded_layout(_ANY_ROWS, token_dim, pooled_dim))


def _misfit(shard: Shard, part: TextPart) -> bool:
    """Whether a shard holds a part's text in other widths; that it holds none is for the source to say."""
    return shard.text_widths.get(part.name, (part.width, part.pooled)) != (part.width, part.pooled)


def _mapped(source: Path | bytes) -> bytes | mmap.mmap:
    if isinstance(source, bytes):
        return source
    # Without O_NONBLOCK the opening of a named pipe, which has no size to be mapped, would wait for a writer.
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # an empty file is a ValueError


def _read_layout(header: bytes) -> Layout:
    parsed = parse_json(header)
    names = [name for name in parsed if name != "__metadata__"] if isinstance(parsed, dict) else []
    if unknown := sorted(set(names) - _KNOWN):
        raise ValueError(f"it holds the tensor {unknown[0]!r}")
    return parse_layout(header, _file_order(names))


def _tensors(layout: Layout, data: memoryview) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    starts = layout.starts()
    for entry in layout.entries:
        if (entry.dtype, len(entry.shape)) != _kind(entry.name):
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
    licence, source = described.get("licence"), described.get("source")
    if not isinstance(licence, str) or not isinstance(source, str):
        raise ValueError("its licence or source is not a text")
    info = ShardInfo(licence=licence, source=source)
    if canonical_json(info.to_json(n)) != value.encode("utf-8"):
        raise ValueError("its description is not canonical, or names another number of samples")
    return info


def _stored_parts(tensors: Mapping[str, npt.NDArray[Any]], n: int) -> Mapping[str, StoredText]:
    parts = {}
    for name in _PARTS:
        if _named(name, _TEXT) in tensors:
            pooled = tensors.get(_named(name, _POOLED))
            parts[name] = StoredText(
                tokens=tensors[_named(name, _TEXT)],
                offsets=tensors[_named(name, _TEXT_OFFSETS)],
                pooled=np.zeros((_texts_of(name, n), 0), dtype=np.float16) if pooled is None else pooled,
            )
    return parts


def _check_fit(tensors: Mapping[str, npt.NDArray[Any]], n: int) -> None:
    if not n:
        raise ValueError("it holds no latents")
    if (_CAPTIONS in tensors) != (_CAPTION_OFFSETS in tensors):
        raise ValueError("it holds captions or their offsets, not both")
    if _CAPTIONS in tensors:
        _check_captions(tensors[_CAPTIONS], tensors[_CAPTION_OFFSETS], n)
    found = [name for name in _PARTS if any(_named(name, tensor) in tensors for tensor in _TEXT_TENSORS)]
    for name in found:
        _check_part(name, [tensors.get(_named(name, tensor)) for tensor in _TEXT_TENSORS], n)
    if not found and _CAPTIONS not in tensors:
        raise ValueError("it holds neither captions nor text")
    if not all(np.all(np.isfinite(array)) for array in tensors.values() if array.dtype == np.float16):
        raise ValueError("it holds NaN or infinite values")


def _check_captions(captions: npt.NDArray[np.uint8], offsets: Offsets, n: int) -> None:
    _check_offsets(offsets, n, len(captions), "captions")
    # A text may be cut only between characters: a byte 10xxxxxx goes on with one.
    captions.tobytes().decode("utf-8")
    _check_lengths(np.diff(offsets))
    starts = offsets[:-1][offsets[:-1] < len(captions)]
    if np.any(captions[starts] & 0xC0 == 0x80):
        raise ValueError("a caption begins in the middle of a character")


def _check_lengths(lengths: Sequence[int] | Offsets) -> None:
    longest = max(lengths)
    if longest > MAX_CAPTION_BYTES:
        raise ValueError(f"a caption has {longest:,} bytes; it may have {MAX_CAPTION_BYTES:,}")


def _check_part(name: str, arrays: Sequence[npt.NDArray[Any] | None], n: int) -> None:
    text, offsets, pooled = arrays
    if text is None or offsets is None:
        raise ValueError(f"it holds text of {name or 'the embedded encoder'} without offsets, or the other way round")
    count = _texts_of(name, n)
    _check_offsets(offsets, count, len(text), f"texts {name}".rstrip())
    if pooled is not None and len(pooled) != count:
        raise ValueError(f"it holds {len(pooled)} pooled vectors {name} for {n} latents")


def _check_offsets(offsets: Offsets, count: int, rows: int, what: str) -> None:
    if len(offsets) != count + 1:
        raise ValueError(f"it holds {len(offsets)} offsets of {count} {what}")
    if offsets[0] != 0 or offsets[-1] != rows or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError(f"the offsets of its {what} do not run from 0 to their end")
