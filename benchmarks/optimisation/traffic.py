"""Bits that travel, and the run's own codec applied to a crowd's vectors."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from benchmarks.optimisation.crowd import CrowdModel
from diloco.codec import CodecConfig, encode
from diloco.packing import Packed
from diloco.tables import Floats

_SCALE_BITS: Final = 16
_PACKED: Final = 1.02

Counts = npt.NDArray[np.int64]
"""How often each code occurred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bits per parameter that one volunteer sends and fetches in a round."""

    up: float
    down: float


class Coder:
    """Codes one vector of each volunteer with a dither of its own."""

    def __init__(self, model: CrowdModel, codec: CodecConfig, seed: int) -> None:
        self._model = model
        self._codec = codec
        self._seed = seed

    def code(self, values_VP: Tensor, number: int) -> tuple[list[Floats], float]:
        """Return what comes out of the other end, [P] for each volunteer, and bits per parameter."""
        decoded, counts = [], no_counts()
        for volunteer, values in enumerate(values_VP):
            seed = np.random.default_rng((self._seed, number, volunteer)).bytes(32)
            coded = encode(self._model.tensors(values), self._model.schema, self._codec, seed)
            decoded.append(np.concatenate([part.reshape(-1) for part in coded.decoded().values()]))
            for spec in self._model.schema.tensors:
                counts += count(coded.codes[spec.name], spec.num_elements, self._codec)
        return decoded, bits(counts, self._codec)


def no_counts() -> Counts:
    """Return the counts of nothing."""
    return np.zeros(256, dtype=np.int64)


def count(packed: Packed, elements: int, codec: CodecConfig) -> Counts:
    """Count the codes of a tensor."""
    numbers = codec.packing.unpack(packed, elements).astype(np.int64) + codec.levels
    return np.bincount(numbers, minlength=256)


def bits(counts: Counts, codec: CodecConfig) -> float:
    """Return the bits per parameter that so many codes of each kind take in a large model's file.

    That is their entropy, which zstd comes within two per cent of (`benchmarks.codec`), and each block's scale. A small
    model's own files would count headers, tables and short blocks that a large one has no more of.
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) * _PACKED + _SCALE_BITS / codec.block
