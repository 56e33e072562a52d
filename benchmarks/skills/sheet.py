"""Pictures with their captions, upscaled, as one PNG for the documentation. Needs the `demo` extra."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from benchmarks.skills.prompts import Prompt
from mmdit.space import ByteImages

_SCALE: Final = 5
_COLUMNS: Final = 6
_MARGIN: Final = 10
_LINE: Final = 15
_PAPER: Final = (255, 255, 255)
_WORDS: Final = (40, 40, 40)
_FAINT: Final = (205, 205, 205)


def write_sheet(prompts: Sequence[Prompt], pictures: ByteImages, path: Path) -> None:
    """Write pictures [N, H, W, 3], each with its caption under it."""
    from PIL import Image, ImageDraw

    side = pictures.shape[1] * _SCALE
    wide, high = side + _MARGIN, side + 2 * _LINE + _MARGIN + 4
    rows = -(-len(prompts) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * wide + _MARGIN, rows * high + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        left, top = _MARGIN + place % _COLUMNS * wide, _MARGIN + place // _COLUMNS * high
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left - 1, top - 1, left + side, top + side), outline=_FAINT)
        for number, line in enumerate(_lines(prompt.caption, side)):
            pen.text((left + side / 2, top + side + 5 + number * _LINE), line, fill=_WORDS, font=_font(), anchor="ma")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _lines(caption: str, width: int) -> list[str]:
    """Break a caption into lines that fit."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@cache
def _font() -> Any:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)
