"""Counter-based random streams: every number a unit draws is a function of (seed, name, step, sample, position).

Only raw Philox words are used, since numpy's `Generator` methods may change between versions. A draw never depends on
an earlier draw, so a referee can replay step 700 alone, and a batch may be split over devices.
"""

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

from diloco.tables import Floats, normal_table

SEED_BYTES: Final = 32
_DOMAIN: Final = b"commonweight/stream/v1\0"
_HALVES_PER_WORD: Final = 4


class Stream:
    """The Philox 4x64 stream of a seed for one purpose: "order", "noise", "timestep", "dropout", "dither", "init/NAME".

    The key is the first 16 bytes of SHA-256(domain, seed, 0, name) as two little-endian 64-bit words; the counter words
    are [block, sample, step, 0] with block counted by numpy's Philox from 0 (which increments before it generates).
    Not safe for use from two threads at once.
    """

    __slots__ = ("_counter", "_philox", "_state")

    def __init__(self, seed: bytes, name: str) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, this one has {len(seed)}")
        digest = hashlib.sha256(_DOMAIN + seed + b"\0" + name.encode("ascii")).digest()
        key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
        self._philox = np.random.Philox(key=key, counter=0)
        # Setting the state of one generator costs 2 us; making a new generator for every draw costs 12 us.
        self._state = self._philox.state
        self._counter = self._state["state"]["counter"]

    def words(self, step: int, sample: int, count: int) -> npt.NDArray[np.uint64]:
        """Return the first `count` 64-bit words at (step, sample)."""
        self._counter[:] = (0, sample, step, 0)
        self._philox.state = self._state
        return self._philox.random_raw(count)

    def word(self, step: int, sample: int) -> int:
        """Return the first 64-bit word at (step, sample)."""
        return int(self.words(step, sample, 1)[0])

    def u16(self, step: int, sample: int, count: int) -> npt.NDArray[np.uint16]:
        """Return `count` uniform 16-bit integers at (step, sample): each word's quarters, lowest first."""
        words = self.words(step, sample, -(-count // _HALVES_PER_WORD))
        return words.astype("<u8", copy=False).view("<u2")[:count].astype(np.uint16, copy=False)

    def normal(self, step: int, sample: int, count: int) -> Floats:
        """Return `count` fp32 standard normal numbers at (step, sample), looked up from 16-bit integers."""
        values: Floats = normal_table()[self.u16(step, sample, count)]
        return values
