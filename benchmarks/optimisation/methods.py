"""The ways of training together that are compared, and what each sends up and down in a round."""

from typing import Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.optimisation.combining import Combine, Weighted
from benchmarks.optimisation.crowd import CrowdModel
from benchmarks.optimisation.traffic import Coder, Traffic, bits, count, no_counts
from diloco.codec import CodecConfig
from diloco.merge import OuterConfig
from diloco.patch import PatchConfig, round_step
from diloco.tables import Floats

FP32: Final = 32.0


class Exchange(Protocol):
    """What becomes of a round's raw deltas; keeps whatever state the method has."""

    def step(self, deltas_VP: Tensor, number: int, /) -> tuple[Tensor, Traffic]:
        """Return by how much the common weights fall, [P], and what was sent."""
        ...


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
        fall, self._v = Weighted()([delta.numpy().copy() for delta in deltas_VP], self._v, self._outer)
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
        combine: how deltas become a step.
    """

    def __init__(
        self,
        model: CrowdModel,
        outer: OuterConfig,
        codec: CodecConfig | None,
        patch: PatchConfig | None,
        seed: int,
        combine: Combine | None = None,
    ) -> None:
        self._model = model
        self._outer = outer
        self._coder = None if codec is None else Coder(model, codec, seed)
        self._patch = patch
        self._combine = combine or Weighted()
        size = model.schema.num_elements
        self._v: Floats = np.zeros(size, dtype=np.float32)
        self._residual: Floats = np.zeros(size, dtype=np.float32)

    def step(self, deltas_VP: Tensor, number: int, /) -> tuple[Tensor, Traffic]:
        """See `Exchange`."""
        if self._coder is None:
            decoded, up = [delta.numpy().copy() for delta in deltas_VP], FP32
        else:
            decoded, up = self._coder.code(deltas_VP, number)
        fall, self._v = self._combine(decoded, self._v, self._outer)
        if self._patch is None:
            return torch.from_numpy(fall), Traffic(up=up, down=FP32)
        total = self._residual + fall
        patches, counts, start = [], no_counts(), 0
        for spec in self._model.schema.tensors:
            stop = start + spec.num_elements
            rounded = round_step(total[start:stop], self._patch, spec.name)
            patches.append(rounded.patch)
            self._residual[start:stop] = rounded.residual
            counts += count(rounded.packed, stop - start, self._patch.codec)
            start = stop
        return torch.from_numpy(np.concatenate(patches)), Traffic(up=up, down=bits(counts, self._patch.codec))


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
