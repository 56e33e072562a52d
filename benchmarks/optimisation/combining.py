"""How a round's deltas become one step of the common weights: variants of the run's own merge."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from diloco.merge import WEIGHT_ONE, OuterConfig, outer_step
from diloco.schema import Schema
from diloco.tables import Floats


class Combine(Protocol):
    """Takes a round's decoded deltas and the momentum; returns by how much the weights fall, and the new momentum."""

    def __call__(self, decoded: Sequence[Floats], v: Floats, outer: OuterConfig) -> tuple[Floats, Floats]:
        """Deltas may be overwritten."""
        ...


class Weighted:
    """The run's own outer step; weights are shares of one, all the same if not given."""

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        self._weights = weights

    def __call__(self, decoded: Sequence[Floats], v: Floats, outer: OuterConfig) -> tuple[Floats, Floats]:
        """See `Combine`."""
        weights = self._weights or [1.0] * len(decoded)
        total = sum(weights)
        shares = [int(WEIGHT_ONE * weight / total) for weight in weights]
        return outer_step(v, list(zip(shares, decoded, strict=True)), outer)


class Radial:
    """Radial-directional averaging of each tensor: the mean direction, as long as the deltas are on the average.

    Source: Decoupled DiLoCo (arXiv 2604.21428). Deltas are nearly orthogonal, so their plain mean is much shorter than
    they are, and the shorter the more they are.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def __call__(self, decoded: Sequence[Floats], v: Floats, outer: OuterConfig) -> tuple[Floats, Floats]:
        """See `Combine`."""
        stacked, together, start = np.stack(decoded), np.zeros_like(v), 0
        for spec in self._schema.tensors:
            place = slice(start, start + spec.num_elements)
            start += spec.num_elements
            lengths = np.linalg.norm(stacked[:, place], axis=1, keepdims=True)
            direction = (stacked[:, place] / np.maximum(lengths, np.float32(1e-30))).mean(0)
            length = np.linalg.norm(direction)
            if length > 0.0:
                together[place] = direction * (lengths.mean() / length)
        return outer_step(v, [(WEIGHT_ONE, together)], outer)


class Late:
    """The last `late` volunteers' deltas are merged one round later, with `discount` of an earlier one's weight.

    Args:
        delayed: late deltas move the weights, but stay out of the momentum (delayed Nesterov, arXiv 2401.09135).
    """

    def __init__(self, late: int, discount: float, *, delayed: bool = False) -> None:
        self._late = late
        self._discount = discount
        self._delayed = delayed
        self._waiting: list[Floats] = []

    def __call__(self, decoded: Sequence[Floats], v: Floats, outer: OuterConfig) -> tuple[Floats, Floats]:
        """See `Combine`."""
        fresh, old = list(decoded[: -self._late]), self._waiting
        self._waiting = list(decoded[-self._late :])
        total = len(fresh) + self._discount * len(old)
        first = [(int(WEIGHT_ONE / total), delta) for delta in fresh]
        second = [(int(WEIGHT_ONE * self._discount / total), delta) for delta in old]
        if not self._delayed:
            return outer_step(v, first + second, outer)
        fall, v = outer_step(v, first, outer)
        extra, _ = outer_step(np.zeros_like(v), second, OuterConfig(lr=outer.lr, momentum=0.0))
        return fall + extra, v
