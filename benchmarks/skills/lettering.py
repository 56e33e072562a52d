"""Words as coverage, in the fonts that matplotlib brings."""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from diloco.tables import Floats

FONTS: Final = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
SIZES: Final = range(7, 18)
"""Heights of a line, in pixels."""
WIDEST: Final = 29
"""Columns that a word may take in a picture of 32."""


@lru_cache(maxsize=65536)
def lettering(word: str, font: str, size: int) -> Floats:
    """Return the coverage [rows, columns] of a word, cut to its ink. Needs the `demo` extra."""
    mask = _font(font, size).getmask(word, mode="L")
    pixels: Floats = np.array(mask, dtype=np.float32).reshape(mask.size[::-1])
    rows, columns = np.flatnonzero(pixels.max(1) > 0), np.flatnonzero(pixels.max(0) > 0)
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / np.float32(255)


@cache
def _font(name: str, size: int) -> Any:  # Pillow's type for a font is not worth an import for readers
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # The basic layout is in every build of Pillow; the other one needs a library that some lack.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def largest_size(word: str, font: str) -> int:
    """Return the largest size in which a word fits a picture."""
    for size in reversed(SIZES):
        if lettering(word, font, size).shape[1] <= WIDEST:
            return size
    raise ValueError(f"{word!r} is too wide for a picture in every size of {font}")
