"""What AdamW's moments are when a unit begins: the volunteer's own, nothing, or what everybody can know.

An auditor must be able to run a unit again, so a volunteer's own moments are out of the question for a run; they are
here because the literature has them. Public ones are an output of every unit, of which the next round's units start
from the median or the mean; the fewer bits they take, the better.
"""

from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from benchmarks.optimisation.crowd import BETA2, CrowdModel, Moments
from benchmarks.optimisation.traffic import Coder, Traffic
from diloco.codec import CodecConfig
from diloco.merge import OuterConfig

Second = Literal["factored", "full"]
First = Literal["zero", "outer", "ternary", "full"]

FACTORED_BITS: Final = 0.02
"""Bits a parameter of a matrix's rows and columns, at 8 bits each, in a model that is 1,536 wide."""
FULL_BITS: Final = 8.0
_BLOCK: Final = 256
_LONG: Final = 10_000
"""Steps after which a moment needs no correction for having begun at zero."""


class InnerState(Protocol):
    """Where units take their moments from; `is_new` says whether they start from nothing, and so with a low rate."""

    @property
    def is_new(self) -> bool:
        """Whether the next unit starts from no state at all."""
        ...

    def begin(self) -> Moments:
        """Return the moments of all volunteers at the start of a round."""
        ...

    def end(self, moments: Moments, fall: Tensor, rates: float, number: int) -> Traffic:
        """Take the moments at the end of a round; return what was sent of them.

        Args:
            fall: by how much the common weights fell in this round, [P].
            rates: sum of a unit's learning rates.
        """
        ...


class Private:
    """Kept by each volunteer from unit to unit, as in DiLoCo (arXiv 2311.08105)."""

    def __init__(self, volunteers: int, parameters: int) -> None:
        self._moments = Moments.zeros(volunteers, parameters)

    @property
    def is_new(self) -> bool:
        """See `InnerState`."""
        return self._moments.m_steps == 0

    def begin(self) -> Moments:
        """See `InnerState`."""
        return self._moments

    def end(self, _moments: Moments, _fall: Tensor, _rates: float, _number: int, /) -> Traffic:
        """See `InnerState`."""
        return Traffic(up=0.0, down=0.0)


class Reset:
    """Zero at the start of each unit."""

    is_new = True

    def __init__(self, volunteers: int, parameters: int) -> None:
        self._size = (volunteers, parameters)

    def begin(self) -> Moments:
        """See `InnerState`."""
        return Moments.zeros(*self._size)

    def end(self, _moments: Moments, _fall: Tensor, _rates: float, _number: int, /) -> Traffic:
        """See `InnerState`."""
        return Traffic(up=0.0, down=0.0)


class Public:
    """The same for all: an output of each unit, merged with the others'.

    Args:
        second: v as one row and one column of each matrix, their median over the volunteers (Adafactor, arXiv
            1804.04235), or all of it in 8 bits, the mean of its roots.
        first: m as zero; as what the last outer step was made of, which takes no bits; coded as deltas are; or in 8
            bits.
    """

    def __init__(
        self,
        model: CrowdModel,
        volunteers: int,
        *,
        second: Second,
        first: First,
        outer: OuterConfig,
        codec: CodecConfig,
        seed: int,
    ) -> None:
        self._model = model
        self._volunteers = volunteers
        self._second: Second = second
        self._first: First = first
        self._outer = outer
        self._coder = Coder(model, codec, seed)
        self._m = torch.zeros_like(model.first)
        self._v = torch.zeros_like(model.first)
        self._steps = 0

    @property
    def is_new(self) -> bool:
        """See `InnerState`."""
        return self._steps == 0

    def begin(self) -> Moments:
        """See `InnerState`."""
        known = self._steps > 0 and self._first != "zero"
        return Moments(
            m=self._m.repeat(self._volunteers, 1),
            v=self._v.repeat(self._volunteers, 1),
            m_steps=_LONG if known else 0,
            v_steps=self._steps,
        )

    def end(self, moments: Moments, fall: Tensor, rates: float, number: int, /) -> Traffic:
        """See `InnerState`."""
        self._steps = moments.v_steps
        if self._second == "factored":
            self._v = self._factored(moments.v)
            bits = FACTORED_BITS
        else:
            self._v = _in_8_bits(moments.v.sqrt()).mean(0) ** 2
            bits = FULL_BITS
        first = self._take_first(moments.m, fall, rates, number)
        return Traffic(up=bits + first.up, down=bits + first.down)

    def _take_first(self, m_VP: Tensor, fall: Tensor, rates: float, number: int) -> Traffic:
        if self._first == "full":
            self._m = _in_8_bits(m_VP).mean(0)
            return Traffic(up=FULL_BITS, down=FULL_BITS)
        if self._first == "ternary":
            decoded, bits = self._coder.code(m_VP, number)
            self._m = torch.stack([torch.from_numpy(part) for part in decoded]).mean(0)
            return Traffic(up=bits, down=bits)
        if self._first == "outer":
            # In a steady direction the outer step is this much longer than what the volunteers moved.
            gain = self._outer.lr / (1.0 - self._outer.momentum)
            spread = (self._v / (1.0 - BETA2**self._steps)).sqrt()
            self._m = fall / (gain * rates) * spread
        return Traffic(up=0.0, down=0.0)

    def _factored(self, v_VP: Tensor) -> Tensor:
        """Return the product of the median row and column of each matrix; of vectors, the median."""
        parts = []
        for spec, part in zip(self._model.schema.tensors, self._model.split(v_VP), strict=True):
            if len(spec.shape) < 2:
                parts.append(part.median(0).values)
                continue
            matrix = part.view(self._volunteers, spec.shape[0], -1)
            rows, columns = matrix.mean(2).median(0).values, matrix.mean(1).median(0).values
            parts.append((rows[:, None] * columns[None, :] / rows.mean().clamp(min=1e-30)).reshape(-1))
        return torch.cat(parts)


def _in_8_bits(values_VP: Tensor) -> Tensor:
    volunteers, parameters = values_VP.shape
    padded = torch.nn.functional.pad(values_VP, (0, -parameters % _BLOCK)).view(volunteers, -1, _BLOCK)
    scale = padded.abs().amax(2, keepdim=True).clamp(min=1e-30) / 127
    return ((padded / scale).round() * scale).view(volunteers, -1)[:, :parameters]
