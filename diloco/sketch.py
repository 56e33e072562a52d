"""A delta's 4 kB fingerprint under a seed that its maker could not foresee.

The decoded delta, all tensors one after another, is cut into rows of 1,024 elements. Each row gets random signs and a
random rotation and is added to 1,024 buckets. The squared distance of two sketches estimates that of the two deltas
without bias, with a standard error of a few per cent (a count sketch whose buckets are laid out so that plain vector
additions fill them). Signs and rotations are Philox words and the sum is a chain of separate fp32 additions, so
everybody gets the same sketch.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from diloco.streams import Stream
from diloco.tables import Floats

BUCKETS: Final = 1024
_ROWS_PER_DRAW: Final = 64
_SIGN_WORDS: Final = BUCKETS // 64
"""Each row takes 16 words of sign bits, lowest bit first, and one word whose value mod 1,024 is its rotation."""


def sketch(chunks: Iterable[Floats], seed: bytes) -> Floats:
    """Return fp32[1024], the sketch of a decoded delta.

    Args:
        chunks: flat fp32 parts of the decoded delta in schema order, as `Container.decoded_chunks` yields them.
        seed: 32 bytes, drawn after the delta was committed to.
    """
    stream = Stream(seed, "sketch")
    buckets = np.zeros(BUCKETS, dtype=np.float32)
    for group, rows_RB in enumerate(_row_groups(chunks)):
        words = stream.words(group, 0, _ROWS_PER_DRAW * (_SIGN_WORDS + 1)).reshape(_ROWS_PER_DRAW, _SIGN_WORDS + 1)
        bits = np.unpackbits(words[:, :_SIGN_WORDS].astype("<u8").view(np.uint8), axis=1, bitorder="little")
        signs_RB = np.left_shift(bits[: len(rows_RB)], 31, dtype=np.uint32)
        signed_RB = np.bitwise_xor(rows_RB.view(np.uint32), signs_RB).view(np.float32)
        rotations = (words[:, _SIGN_WORDS] % np.uint64(BUCKETS)).tolist()
        for row, rotation in zip(signed_RB, rotations, strict=False):
            head, tail = buckets[rotation:], buckets[:rotation]
            np.add(head, row[: BUCKETS - rotation], out=head)
            np.add(tail, row[BUCKETS - rotation :], out=tail)
    return buckets


def _row_groups(chunks: Iterable[Floats]) -> Iterator[Floats]:
    """Cut the concatenated chunks into [<=64, 1024] groups; the last row is filled up with zeros."""
    size = _ROWS_PER_DRAW * BUCKETS
    pending = np.empty(0, dtype=np.float32)
    for chunk in chunks:
        pending = np.concatenate([pending, chunk]) if pending.size else chunk
        whole = pending.size - pending.size % size
        for start in range(0, whole, size):
            yield np.ascontiguousarray(pending[start : start + size]).reshape(_ROWS_PER_DRAW, BUCKETS)
        pending = pending[whole:]
    if pending.size:
        rows = np.zeros((-(-pending.size // BUCKETS), BUCKETS), dtype=np.float32)
        rows.reshape(-1)[: pending.size] = pending
        yield rows
