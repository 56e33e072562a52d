"""A sheet of pictures out of a prepared data set, with their captions, so that a curator sees what is in it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from commonweight.data.dataset import Dataset, check_shard
from commonweight.extras import not_installed
from diloco.shards import Shard
from mmdit.components import load_vae
from mmdit.space import ByteImages, PixelSpace, space_from_json
from protocol.errors import DatasetInvalid, UsageError

PICTURES: Final = 64
_CELL: Final = 128
_MARGIN: Final = 6
_LINE: Final = 13
_LONGEST: Final = 400
"""Characters of a caption that are tried."""
_DIGITS: Final = 8
"""Of a shard's SHA-256: as many as `coordinator takedown --shard` needs."""
_PAPER: Final = (255, 255, 255)
_WORDS: Final = (40, 40, 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """A picture, uint8 [height, width, channels], with what is written under it."""

    pixels: ByteImages
    caption: str
    place: str


def sheet_of(dataset: Dataset, components: Path | None) -> tuple[ByteImages, int]:
    """Return a sheet, uint8 [height, width, 3], of pictures from every shard, and how many there are.

    Each lies in a cell as large as the largest, small ones enlarged by a whole factor; under it stand its caption, cut,
    and the first digits of its shard and its sample's number, as `coordinator takedown` takes them.

    Args:
        dataset: its shards are checked as they are read.
        components: the folder with the autoencoder, for data sets of latents.

    Raises:
        UsageError: the autoencoder is needed, and not there.
        DatasetInvalid: a shard does not hold, or the manifest describes no space.
        PackageMissing: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise not_installed("A sheet is drawn with Pillow", "data") from None
    found = _pictures(dataset, components)
    cell = max(_CELL, *(max(shown.pixels.shape[:2]) for shown in found))
    across = math.ceil(math.sqrt(len(found)))
    wide, high = cell + _MARGIN, cell + 2 * _LINE + 2 * _MARGIN
    sheet = Image.new("RGB", (across * wide + _MARGIN, math.ceil(len(found) / across) * high + _MARGIN), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, shown in enumerate(found):
        left, top = _MARGIN + index % across * wide, _MARGIN + index // across * high
        large = _enlarged(shown.pixels, cell)
        height, width = large.shape[:2]
        sheet.paste(Image.fromarray(large), (left + (cell - width) // 2, top + (cell - height) // 2))
        for number, line in enumerate((shown.caption, shown.place)):
            pen.text((left, top + cell + 2 + number * _LINE), _cut(line, font, cell), fill=_WORDS, font=font)
    return np.asarray(sheet, dtype=np.uint8), len(found)


def _enlarged(pixels: ByteImages, cell: int) -> ByteImages:
    """Return a picture in RGB, as many times larger as fits into its cell."""
    factor = max(1, cell // max(pixels.shape[:2]))
    colours = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return np.ascontiguousarray(colours.repeat(factor, axis=0).repeat(factor, axis=1))


def _cut(text: str, font: Any, width: int) -> str:
    """Return as much of a text as `width` pixels hold; the font knows Latin letters."""
    line = text.encode("latin-1", errors="replace").decode("latin-1")
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."


def _pictures(dataset: Dataset, components: Path | None) -> list[_Shown]:
    try:
        space = space_from_json(dataset.manifest.encoder["space"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DatasetInvalid(f"The manifest's space can't be drawn in: {error}.") from None
    if isinstance(space, PixelSpace):
        decode = space.decode
    elif components is None:
        raise UsageError("The pictures are latents of an autoencoder: name its folder with --components.")
    else:
        decode = load_vae(components, space, "cpu").decode
    shards = dataset.manifest.shards
    each = math.ceil(PICTURES / len(shards))
    found: list[_Shown] = []
    for shard in shards[:PICTURES]:
        check_shard(dataset, shard)
        opened = Shard.open(dataset.path(shard))
        pictures = decode(np.asarray(opened.latent[:each], dtype=np.float32))
        found += [
            _Shown(
                pixels=pixels,
                caption=(opened.caption(number) or "")[:_LONGEST],
                place=f"{shard.sha256[:_DIGITS]}, {number}",
            )
            for number, pixels in enumerate(pictures)
        ]
    return found[:PICTURES]
