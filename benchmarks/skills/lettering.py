"""Words as coverage, in the fonts that matplotlib brings."""

from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from diloco.tables import Floats

FONTS: Final = ("DejaVuSansMono-Bold", "DejaVuSansMono", "DejaVuSansMono-BoldOblique")
"""All of one width for every letter, so that a letter's place does not hang on the letters before it."""
SIZE: Final = 16
"""Height of a line in pixels; three letters then take 29 columns of a picture's 32."""


@cache
def lettering(word: str, font: str, size: int = SIZE) -> tuple[Floats, int, int]:
    """Return the coverage [rows, columns] of a word cut to its ink, and where its ink begins.

    That is how many rows below the top of the line, and how many columns right of the first letter's own place. Needs
    the `demo` extra.
    """
    mask, (right, down) = _font(font, size).getmask2(word, mode="L")
    pixels: Floats = np.array(mask, dtype=np.float32).reshape(mask.size[::-1])
    rows, columns = np.flatnonzero(pixels.max(1) > 0), np.flatnonzero(pixels.max(0) > 0)
    cut = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / np.float32(255)
    return cut, int(down + rows[0]), int(right + columns[0])


@cache
def _font(name: str, size: int) -> Any:  # Pillow's type for a font is not worth an import for readers
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # The basic layout is in every build of Pillow; the other one needs a library that some lack.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
