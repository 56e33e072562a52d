"""What things a picture shows, from its pixels alone: where it differs from its ground, in what colour and shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.skills.pictures import RGB
from benchmarks.skills.prompts import COLOURS, SHAPES, Thing
from benchmarks.skills.shapes import coverage
from diloco.tables import Floats
from mmdit.space import ByteImages

Mask = npt.NDArray[np.bool_]
_DIFFERS: Final = 0.25
"""By how much a pixel must differ from the ground, in its furthest channel, to belong to a thing."""
_LEAST_PIXELS: Final = 8
"""Less is a speck."""
_COLOUR_REACH: Final = 0.3
"""How far a colour may be from the one that it is called by, as a distance in RGB of 0..1."""
_LEAST_LIKENESS: Final = 0.75
_MOST_ASPECT: Final = 1.35
_GRID: Final = 14
"""Shapes are compared on so many points each way, spread over their own extent and a little around it."""
_AROUND: Final = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A thing and its centre in pixels; colour and shape are "?" where they are like nothing that has a name."""

    thing: Thing
    x: float
    y: float


def ground_of(pixels_HWC: Floats) -> Floats:
    """Return the colour [3] that most of a picture's edge has."""
    edge = np.concatenate([pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]])
    median: Floats = np.median(edge, axis=0).astype(np.float32)
    return median


def nearest_colour(colour: Floats, names: tuple[str, ...]) -> str:
    """Return the name of the nearest of these colours, or "?" if none is near."""
    away = {name: float(np.linalg.norm(colour - np.asarray(RGB[name], dtype=np.float32))) for name in names}
    name = min(away, key=away.__getitem__)
    return name if away[name] <= _COLOUR_REACH else "?"


def filled(pixels_HWC: Floats, ground: Floats, ink: Floats) -> Floats:
    """Return how far each pixel is on the way from ground to ink, [H, W] in 0..1."""
    way = ink - ground
    along: Floats = np.clip((pixels_HWC - ground) @ way / np.float32(way @ way), 0, 1)
    return along


def see(picture: ByteImages) -> list[Seen]:
    """Return the things in a picture [H, W, 3], uint8."""
    pixels_HWC = picture.astype(np.float32) / np.float32(255)
    ground = ground_of(pixels_HWC)
    away_HW = np.abs(pixels_HWC - ground).max(2)
    parts = _connected(away_HW > _DIFFERS)
    return [_seen(pixels_HWC, ground, away_HW, part) for part in parts if part.sum() >= _LEAST_PIXELS]


def _seen(pixels_HWC: Floats, ground: Floats, away_HW: Floats, part_HW: Mask) -> Seen:
    # The middle of a thing has its colour; the pixels of its edge are mixed with the ground.
    middle = part_HW & (away_HW >= np.quantile(away_HW[part_HW], 0.6))
    colour = np.median(pixels_HWC[middle], axis=0).astype(np.float32)
    coverage_HW = filled(pixels_HWC, ground, colour) * _grown(part_HW)
    rows, columns = _extent(coverage_HW.max(1)), _extent(coverage_HW.max(0))
    thing = Thing(colour=nearest_colour(colour, COLOURS), shape=_shape(coverage_HW, rows, columns))
    return Seen(thing=thing, x=sum(columns) / 2, y=sum(rows) / 2)


def _shape(coverage_HW: Floats, rows: tuple[float, float], columns: tuple[float, float]) -> str:
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    if max(height, width) > _MOST_ASPECT * min(height, width):
        return "?"
    found = _normal(_on_grid(coverage_HW, rows, columns))
    likeness = {shape: float((found * pattern).sum()) for shape, pattern in _patterns().items()}
    shape = max(likeness, key=likeness.__getitem__)
    return shape if likeness[shape] >= _LEAST_LIKENESS else "?"


@cache
def _patterns() -> Mapping[str, Floats]:
    """Return each shape on the grid, from a drawing much larger than those that are judged."""
    found = {}
    for shape in SHAPES:
        large = coverage(shape, 96, 48.0, 48.0, 40.0)
        small = _on_grid(large, _extent(large.max(1)), _extent(large.max(0)))
        found[shape] = _normal(small)
    return found


def _normal(grid: Floats) -> Floats:
    centred = grid - grid.mean()
    normal: Floats = centred / max(float(np.linalg.norm(centred)), 1e-6)
    return normal


def _extent(profile: Floats) -> tuple[float, float]:
    """Return where a thing begins and ends along one axis; the pixel at each end counts by how much of it is filled."""
    most = float(profile.max())
    over = np.flatnonzero(profile > 0.5 * most)
    first, last = int(over[0]), int(over[-1])
    before = float(profile[first - 1]) if first else 0.0
    after = float(profile[last + 1]) if last + 1 < len(profile) else 0.0
    return first + 1 - (float(profile[first]) + before) / most, last + (float(profile[last]) + after) / most


def _on_grid(values_HW: Floats, rows: tuple[float, float], columns: tuple[float, float]) -> Floats:
    """Return values at the grid's points, between pixels by straight lines."""
    fractions = np.linspace(-_AROUND, 1 + _AROUND, _GRID)
    y = rows[0] + (rows[1] - rows[0]) * fractions - 0.5
    x = columns[0] + (columns[1] - columns[0]) * fractions - 0.5
    return _between(_between(values_HW, y).T, x).T


def _between(values: Floats, places: npt.NDArray[np.float64]) -> Floats:
    clipped = np.clip(places, 0, len(values) - 1)
    low = np.minimum(clipped.astype(np.int64), len(values) - 2)
    share = (clipped - low).astype(np.float32)[:, None]
    mixed: Floats = values[low] * (1 - share) + values[low + 1] * share
    return mixed


def _connected(mask_HW: Mask) -> list[Mask]:
    """Return the parts of a mask that hang together, corners included."""
    numbers = np.where(mask_HW, np.arange(1, mask_HW.size + 1).reshape(mask_HW.shape), 0)
    while True:
        spread = np.where(mask_HW, _largest_near(numbers), 0)
        if np.array_equal(spread, numbers):
            return [numbers == number for number in np.unique(numbers[mask_HW])]
        numbers = spread


def _grown(mask_HW: Mask) -> Mask:
    return _largest_near(mask_HW.astype(np.int64)) > 0


def _largest_near(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the largest number among each pixel and its eight neighbours."""
    padded = np.pad(numbers, 1)
    height, width = numbers.shape
    near = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    largest: npt.NDArray[np.int64] = np.maximum.reduce(near)
    return largest
