"""The ways of training together that are compared, and what each sends up and down in a round."""

from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.optimisation.crowd import CrowdModel
from diloco.codec import CodecConfig, encode
from diloco.merge import OuterConfig, outer_step
from diloco.packing import Packed
from diloco.patch import PatchConfig, round_step
from diloco.tables import Floats

State = Literal["private", "reset"]
"""AdamW's moments: kept by each volunteer from unit to unit, or zero at the start of each unit."""

FP32: Final = 32.0
_SCALE_BITS: Final = 16
_PACKED: Final = 1.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bits per parameter that one volunteer sends and fetches in a round."""

    up: float
    down: float


class Exchange(Protocol):
    """What becomes of a round's raw deltas; keeps whatever state the method has."""

    def step(self, deltas_VP: Tensor, number: int, /) -> tuple[Tensor, Traffic]:
        """Return by how much the common weights fall, [P], and what was sent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """The inner loop of a method.

    warmup: share of a unit's steps over which the rate rises, in each unit with `reset`, in the first with `private`.
    """

    lr: float
    state: State
    warmup: float = 0.25


class Plain:
    """DiLoCo as published: fp32 deltas up, their mean's Nesterov step down (arXiv 2311.08105). `bits` narrows both."""

    def __init__(self, outer: OuterConfig, *, bits: Literal[8, 32] = 32) -> None:
        self._outer = outer
        self._bits = bits
        self._v: Floats | None = None

    def step(self, deltas_VP: Tensor, _number: int, /) -> tuple[Tensor, Traffic]:
        """See `Exchange`. In a ring everybody sends and fetches one narrowed vector (INTELLECT-1, arXiv 2412.01152)."""
        if self._bits == 8:
            deltas_VP = _int8(deltas_VP)
        if self._v is None:
            self._v = np.zeros(deltas_VP.shape[1], dtype=np.float32)
        weight = 2**24 // len(deltas_VP)
        fall, self._v = outer_step(self._v, [(weight, delta.numpy().copy()) for delta in deltas_VP], self._outer)
        return torch.from_numpy(fall), Traffic(up=float(self._bits), down=float(self._bits))


class Sparse:
    """SparseLoCo: top-k of each 4,096 values with two bits each, private error feedback, no momentum (2508.15706).

    Everybody fetches everybody's deltas, as in the run of Covenant-72B (arXiv 2603.08163).
    """

    CHUNK: Final = 4096
    INDEX_BITS: Final = 12
    VALUE_BITS: Final = 2

    def __init__(self, *, keep: int = 64, decay: float = 0.95, lr: float = 1.0) -> None:
        self._keep = keep
        self._decay = decay
        self._lr = lr
        self._waiting_VP: Tensor | None = None

    def step(self, deltas_VP: Tensor, _number: int, /) -> tuple[Tensor, Traffic]:
        """See `Exchange`."""
        waiting = deltas_VP if self._waiting_VP is None else self._decay * self._waiting_VP + deltas_VP
        sent = _top(waiting, self._keep, self.CHUNK)
        self._waiting_VP = waiting - sent
        bits = self._keep / self.CHUNK * (self.INDEX_BITS + self.VALUE_BITS)
        return self._lr * sent.mean(0), Traffic(up=bits, down=bits * len(deltas_VP))


class Ours:
    """This project's: seeded dither up, a patch down, both by the code that a run uses; bits are those of its files.

    Args:
        patch: None sends the step down in fp32, to see what the patch costs.
    """

    def __init__(
        self, model: CrowdModel, outer: OuterConfig, codec: CodecConfig | None, patch: PatchConfig | None, seed: int
    ) -> None:
        self._model = model
        self._outer = outer
        self._codec = codec
        self._patch = patch
        self._seed = seed
        size = model.schema.num_elements
        self._v: Floats = np.zeros(size, dtype=np.float32)
        self._residual: Floats = np.zeros(size, dtype=np.float32)

    def step(self, deltas_VP: Tensor, number: int, /) -> tuple[Tensor, Traffic]:
        """See `Exchange`."""
        decoded, up = self._up(deltas_VP, number)
        weight = 2**24 // len(decoded)
        fall, self._v = outer_step(self._v, [(weight, delta) for delta in decoded], self._outer)
        if self._patch is None:
            return torch.from_numpy(fall), Traffic(up=up, down=FP32)
        total = self._residual + fall
        patches, counts = [], np.zeros(256, dtype=np.int64)
        for name, (start, stop) in self._places().items():
            rounded = round_step(total[start:stop], self._patch, name)
            patches.append(rounded.patch)
            self._residual[start:stop] = rounded.residual
            counts += _counts(rounded.packed, stop - start, self._patch.codec)
        return torch.from_numpy(np.concatenate(patches)), Traffic(up=up, down=_bits(counts, self._patch.codec))

    def _up(self, deltas_VP: Tensor, number: int) -> tuple[list[Floats], float]:
        if self._codec is None:
            return [delta.numpy().copy() for delta in deltas_VP], FP32
        decoded, counts = [], np.zeros(256, dtype=np.int64)
        for volunteer, delta in enumerate(deltas_VP):
            seed = np.random.default_rng((self._seed, number, volunteer)).bytes(32)
            coded = encode(self._model.tensors(delta), self._model.schema, self._codec, seed)
            decoded.append(np.concatenate([part.reshape(-1) for part in coded.decoded().values()]))
            for spec in self._model.schema.tensors:
                counts += _counts(coded.codes[spec.name], spec.num_elements, self._codec)
        return decoded, _bits(counts, self._codec)

    def _places(self) -> dict[str, tuple[int, int]]:
        places, start = {}, 0
        for spec in self._model.schema.tensors:
            places[spec.name] = (start, start + spec.num_elements)
            start += spec.num_elements
        return places


def _counts(packed: Packed, elements: int, codec: CodecConfig) -> npt.NDArray[np.int64]:
    numbers = codec.packing.unpack(packed, elements).astype(np.int64) + codec.levels
    return np.bincount(numbers, minlength=256)


def _bits(counts: npt.NDArray[np.int64], codec: CodecConfig) -> float:
    """Return the bits per parameter that so many codes of each kind take in a large model's file.

    That is their entropy, which zstd comes within two per cent of (`benchmarks.codec`), and each block's scale. A small
    model's own files would count headers, tables and short blocks that a large one has no more of.
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) * _PACKED + _SCALE_BITS / codec.block


def _int8(deltas_VP: Tensor) -> Tensor:
    scale_V1 = deltas_VP.abs().amax(1, keepdim=True) / 127
    return (deltas_VP / scale_V1).round() * scale_V1


def _top(values_VP: Tensor, keep: int, chunk: int) -> Tensor:
    """Keep the largest of each chunk, each rounded to the mean of one of four bins of its chunk."""
    volunteers, parameters = values_VP.shape
    padded = torch.nn.functional.pad(values_VP, (0, -parameters % chunk)).view(volunteers, -1, chunk)
    _, places = padded.abs().topk(keep, dim=2)
    kept = padded.gather(2, places)
    mean, spread = kept.mean(2, keepdim=True), kept.std(2, keepdim=True)
    bins = ((kept - mean) / (6 * spread / 4) + 2).round().clamp(0, 3)
    rounded = torch.zeros_like(kept)
    for number in range(4):
        inside = (bins == number).float()
        centre = (kept * inside).sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)
        rounded += inside * centre
    return torch.zeros_like(padded).scatter(2, places, rounded).view(volunteers, -1)[:, :parameters]
