"""Whether a picture spells a word: it must look like that word in one of the fonts, and like no other as much."""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from benchmarks.skills.lettering import FONTS, lettering
from diloco.tables import Floats

LEAST_LIKENESS: Final = 0.8
"""Correlation with the best drawing of a word, below which nothing is read."""
_SHIFT: Final = 2
"""Pixels that a drawing is moved each way, from where the middles of both lie on each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The word that was read, and how much the picture looks like it (correlation, 1 at most)."""

    word: str
    likeness: float


def read(filled_HW: Floats, asked: str) -> Reading:
    """Return what is read in a picture's ink, [H, W] in 0..1: the asked word, or a better one.

    Words that differ from the asked one in one letter are tried, and, as long as one of them is better, those that
    differ from that one in turn.
    """
    centred = filled_HW - filled_HW.mean()
    picture = centred / max(float(np.linalg.norm(centred)), 1e-6)
    middle = _middle(filled_HW)
    word, best = asked, _likeness(picture, middle, asked)
    while True:
        tried = {other: _likeness(picture, middle, other) for other in _neighbours(word)}
        better = max(tried, key=tried.__getitem__)
        if tried[better] <= best:
            return Reading(word=word, likeness=best)
        word, best = better, tried[better]


def _neighbours(word: str) -> Iterator[str]:
    for place, had in enumerate(word):
        yield from (word[:place] + c + word[place + 1 :] for c in string.ascii_lowercase if c != had)


def _likeness(picture: Floats, middle: tuple[float, float], word: str) -> float:
    """Return the best correlation with a word over fonts and shifts."""
    height, width = picture.shape
    best = 0.0
    for font in FONTS:
        drawn, norm = _drawing(word, font, height * width)
        rows, columns = drawn.shape
        top, left = (round(m - extent / 2) for m, extent in zip(middle, drawn.shape, strict=True))
        for y in range(max(0, top - _SHIFT), min(height - rows, top + _SHIFT) + 1):
            for x in range(max(0, left - _SHIFT), min(width - columns, left + _SHIFT) + 1):
                # The picture's mean is zero, so the drawing's own mean adds nothing to the product.
                best = max(best, float(np.vdot(picture[y : y + rows, x : x + columns], drawn)) / norm)
    return best


@lru_cache(maxsize=65536)
def _drawing(word: str, font: str, pixels: int) -> tuple[Floats, float]:
    """Return a word's coverage, and the norm that it has on an empty picture once its mean is taken off."""
    drawn, _, _ = lettering(word, font)
    norm = float(np.sqrt(max(float(np.square(drawn).sum()) - float(drawn.sum()) ** 2 / pixels, 1e-6)))
    return drawn, norm


def _middle(filled_HW: Floats) -> tuple[float, float]:
    """Return the middle row and column of the ink."""
    inked = filled_HW > 0.4
    if not inked.any():
        return filled_HW.shape[0] / 2, filled_HW.shape[1] / 2
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
