"""Shapes as coverage: how much of each pixel they fill."""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from diloco.tables import Floats

Inside = npt.NDArray[np.bool_]
_FINE: Final = 4
"""A pixel's coverage is counted on so many points each way."""


def coverage(shape: str, size: int, x: float, y: float, radius: float) -> Floats:
    """Return coverage [size, size] in 0..1 of a shape about (x, y), in pixels from the upper left corner."""
    fine: Floats = (np.arange(size * _FINE, dtype=np.float32) + np.float32(0.5)) / np.float32(_FINE)
    inside = _INSIDE[shape](_scaled(fine[None, :], x, radius), _scaled(fine[:, None], y, radius))
    # One way after the other: numpy adds far apart numbers slowly.
    rows = inside.view(np.uint8).reshape(size, _FINE, size * _FINE).sum(1, dtype=np.uint8)
    counted = rows.reshape(size, size, _FINE).sum(2, dtype=np.uint8)
    filled: Floats = counted.astype(np.float32) / np.float32(_FINE**2)
    return filled


def _scaled(places: Floats, centre: float, radius: float) -> Floats:
    return (places - np.float32(centre)) / np.float32(radius)


def _circle(x: Floats, y: Floats) -> Inside:
    return x * x + y * y < 0.92


def _square(x: Floats, y: Floats) -> Inside:
    return np.maximum(np.abs(x), np.abs(y)) < 0.84


def _triangle(x: Floats, y: Floats) -> Inside:
    return (y < 0.85) & (2 * np.abs(x) < 1.1 * (y + 0.95))


def _cross(x: Floats, y: Floats) -> Inside:
    return (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.95)


def _ring(x: Floats, y: Floats) -> Inside:
    away = x * x + y * y
    return (away < 0.98) & (away > 0.25)


def _heart(x: Floats, y: Floats) -> Inside:
    lobes = (np.abs(x) - 0.46) ** 2 + (y + 0.36) ** 2 < 0.24
    point = (y > -0.3) & (np.abs(x) < 0.92) & (np.abs(x) + 0.94 * y < 0.87)
    heart: Inside = lobes | point
    return heart


_INSIDE: Final[Mapping[str, Callable[[Floats, Floats], Inside]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
}
