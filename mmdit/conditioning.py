"""The embedded text encoders: bytes to fixed patterns of +1 and -1. Nothing to download, the same bits everywhere.

"bytes" makes a token of each of a caption's UTF-8 bytes, for runs that care about spelling: the model sees letters one
by one. "byte-patch" makes one of four at a time, for captions of four times the length. Each byte has a pattern for its
place in the token, and the token ends with a pattern for its position. The pooled vector is a bag of words. All
patterns come from SHA-256, and every value is exact in half precision.

What is trained is the model's side: its first linear map makes of the patterns whatever it needs, as an embedding table
would, and its text stream has weights of its own in every block.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

HalfArray = np.ndarray[tuple[int, ...], np.dtype[np.float16]]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

_DOMAIN: Final = b"commonweight/byte-patch/v1"
ByteKind = Literal["byte-patch", "bytes"]
_BYTES_A_TOKEN: Final[Mapping[ByteKind, int]] = {"byte-patch": 4, "bytes": 1}
_POSITION_DIM: Final = 16
# 256 byte patterns must be distinct within a slot, and positions among themselves.
_LEAST_BYTE_DIM: Final = 9
_MOST_TOKENS: Final = 4096
_WIDEST: Final = 65536
# Half precision holds every multiple of one half up to 1024.
_MOST_POOLED: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What one encoder makes of one caption, fp16: tokens [L, width] without padding, pooled [P]."""

    tokens: HalfArray
    pooled: HalfArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """One encoder's share of what the model hears: a rectangle of the tokens [L, D], a stretch of the pooled vector.

    Args:
        name: of the encoder; the embedded one has none.
        row, rows: its tokens, of the sequence.
        column, width: where its numbers stand in a token; what is left of the token stays zero.
        pooled_at, pooled: where its numbers stand in the pooled vector; `pooled` is 0 for an encoder that has none.
    """

    name: str
    row: int
    rows: int
    column: int
    width: int
    pooled_at: int
    pooled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLayout:
    """What the model hears, [rows, token_dim] and [pooled_dim], and which encoder fills which part of it."""

    parts: tuple[TextPart, ...]
    rows: int
    token_dim: int
    pooled_dim: int

    def assemble(
        self, samples: Sequence[Sequence[Encoded | None]], rows: int | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Put together what the encoders say: tokens [N, rows, token_dim], zero padded, pooled [N, pooled_dim]; fp32.

        Args:
            samples: for each sample one text of each part; None where the model is to hear nothing of it.
            rows: of the tokens; None is all of the layout.

        Raises:
            ValueError: a text has more tokens than there is room for.
        """
        rows = self.rows if rows is None else rows
        text = np.zeros((len(samples), rows, self.token_dim), dtype=np.float32)
        pooled = np.zeros((len(samples), self.pooled_dim), dtype=np.float32)
        for number, sample in enumerate(samples):
            for part, one in zip(self.parts, sample, strict=True):
                if one is None:
                    continue
                length, room = len(one.tokens), min(part.rows, rows - part.row)
                if length > room:
                    raise ValueError(f"a caption has {length} text tokens; the run's limit is {room}")
                text[number, part.row : part.row + length, part.column : part.column + part.width] = one.tokens
                pooled[number, part.pooled_at : part.pooled_at + part.pooled] = one.pooled
        return text, pooled


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditioningConfig:
    """How captions become numbers.

    Args:
        kind: the encoder: "byte-patch" with four bytes a token, or "bytes" with one.
        max_tokens: tokens kept of a caption; the rest is heard only through the pooled vector.
        token_dim: width of a token; 16 for the position, and a multiple of the bytes of a token.
        pooled_dim: width of the pooled vector.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    kind: ByteKind
    max_tokens: int
    token_dim: int
    pooled_dim: int

    def __post_init__(self) -> None:
        if self.kind not in _BYTES_A_TOKEN:
            known = " and ".join(f'"{kind}"' for kind in _BYTES_A_TOKEN)
            raise ValueError(f"conditioning kind {self.kind!r} is not known; this version has {known}")
        for name, largest in (("max_tokens", _MOST_TOKENS), ("token_dim", _WIDEST), ("pooled_dim", _WIDEST)):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise ValueError(f"{name} is {value!r}; it must be a whole number between 1 and {largest}")
        byte_dims, count = self.token_dim - _POSITION_DIM, self.bytes_a_token
        if byte_dims % count or byte_dims < count * _LEAST_BYTE_DIM:
            raise ValueError(
                f"token_dim {self.token_dim} leaves {byte_dims} for {count} bytes after {_POSITION_DIM} for the "
                f"position; it must leave a multiple of {count}, at least {count * _LEAST_BYTE_DIM}"
            )

    @property
    def bytes_a_token(self) -> int:
        """Bytes of a caption that one token holds."""
        return _BYTES_A_TOKEN[self.kind]

    @property
    def layout(self) -> TextLayout:
        """One encoder fills everything."""
        return embedded_layout(self.max_tokens, self.token_dim, self.pooled_dim)


def embedded_layout(rows: int, token_dim: int, pooled_dim: int) -> TextLayout:
    """Return the layout of the embedded encoder, which has no name and fills everything."""
    part = TextPart(name="", row=0, rows=rows, column=0, width=token_dim, pooled_at=0, pooled=pooled_dim)
    return TextLayout(parts=(part,), rows=rows, token_dim=token_dim, pooled_dim=pooled_dim)


def encode(captions: Sequence[str], config: ConditioningConfig) -> tuple[HalfArray, HalfArray]:
    """Tokens [N, max_tokens, token_dim], zero padded, and pooled vectors [N, pooled_dim], both fp16.

    Raises:
        ValueError: a caption cannot be written as UTF-8.
    """
    text_NLD = np.zeros((len(captions), config.max_tokens, config.token_dim), dtype=np.float16)
    pooled_NP = np.zeros((len(captions), config.pooled_dim), dtype=np.float16)
    for n, caption in enumerate(captions):
        tokens_LD, pooled_NP[n] = encode_caption(caption, config)
        text_NLD[n, : len(tokens_LD)] = tokens_LD
    return text_NLD, pooled_NP


def encode_caption(caption: str, config: ConditioningConfig) -> tuple[HalfArray, HalfArray]:
    """One caption's tokens [L, token_dim] without padding, L at most `max_tokens`, and its pooled vector; both fp16.

    The empty caption has no tokens and a zero vector, which is what "no text" is in training.

    Raises:
        ValueError: the caption cannot be written as UTF-8.
    """
    try:
        text = caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"caption {caption[:40]!r} has a character that UTF-8 cannot hold: {error.reason}") from error
    return _tokens_LD(text, config), _pooled_P(text, config.pooled_dim)


def _tokens_LD(text: bytes, config: ConditioningConfig) -> HalfArray:
    count = config.bytes_a_token
    text_B = np.frombuffer(text[: count * config.max_tokens], dtype=np.uint8)
    length = -(-len(text_B) // count)
    byte_dim = (config.token_dim - _POSITION_DIM) // count
    byte_patterns = _byte_patterns(count, byte_dim)
    tokens_LD = np.zeros((length, config.token_dim), dtype=np.float16)
    for slot in range(count):
        letters = text_B[slot::count]  # the last patch may be short: its missing bytes stay zero
        tokens_LD[: len(letters), slot * byte_dim : (slot + 1) * byte_dim] = byte_patterns[slot, letters]
    tokens_LD[:, count * byte_dim :] = _position_patterns(config.max_tokens)[:length]
    return tokens_LD


def _pooled_P(text: bytes, pooled_dim: int) -> HalfArray:
    total = np.zeros(pooled_dim, dtype=np.int64)
    for word in text.split():  # bytes are split at ASCII white space only, whatever the Unicode tables of the day
        total += _word_pattern(word, pooled_dim)
    return (0.5 * np.clip(total, -_MOST_POOLED, _MOST_POOLED)).astype(np.float16)


@functools.cache
def _byte_patterns(slots: int, dim: int) -> HalfArray:
    """[slots, 256, dim]; within a slot all 256 differ, so tokens tell every text from every other."""
    return np.stack([_distinct_patterns(b"byte/%d" % slot, 256, dim) for slot in range(slots)])


@functools.cache
def _position_patterns(count: int) -> HalfArray:
    """[count, 16], all different."""
    return _distinct_patterns(b"position", count, _POSITION_DIM)


@functools.lru_cache(maxsize=4096)
def _word_pattern(word: bytes, dim: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return _signs(b"word/" + hashlib.sha256(word).digest(), dim).astype(np.int64)


def _distinct_patterns(name: bytes, count: int, dim: int) -> HalfArray:
    """The first pattern of each number that no smaller number has: short patterns collide, and two bytes must not."""
    seen: set[bytes] = set()
    patterns = np.empty((count, dim), dtype=np.float16)
    for number in range(count):
        attempt = 0
        while (signs := _signs(b"%s/%d/%d" % (name, number, attempt), dim)).tobytes() in seen:
            attempt += 1
        seen.add(signs.tobytes())
        patterns[number] = signs
    return patterns


def _signs(name: bytes, dim: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
    """`dim` signs from the bits of SHA-256(domain, name, block), lowest bit of each byte first; a set bit is +1."""
    blocks = (hashlib.sha256(b"%s/%s/%d" % (_DOMAIN, name, block)).digest() for block in range(-(-dim // 256)))
    bits = np.unpackbits(np.frombuffer(b"".join(blocks), dtype=np.uint8), bitorder="little")[:dim]
    return bits.astype(np.int8) * np.int8(2) - np.int8(1)
