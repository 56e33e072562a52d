"""A sheet of pictures out of a prepared data set, so that a curator sees what is in it."""

import math
from pathlib import Path
from typing import Final

import numpy as np

from commonweight.data.dataset import Dataset, check_shard
from diloco.shards import Shard
from mmdit.components import load_vae
from mmdit.space import ByteImages, PixelSpace, space_from_json
from protocol.errors import DatasetInvalid, UsageError

PICTURES: Final = 64
_CELL: Final = 64


def sheet_of(dataset: Dataset, components: Path | None) -> tuple[ByteImages, int]:
    """Return pictures from every shard side by side, each in a cell as large as the largest, and how many there are.

    Small ones are enlarged, by a whole factor, to cells of about 64 pixels.

    Args:
        dataset: its shards are checked as they are read.
        components: the folder with the autoencoder, for data sets of latents.

    Raises:
        UsageError: the autoencoder is needed, and not there.
        DatasetInvalid: a shard does not hold, or the manifest describes no space.
    """
    found = _pictures(dataset, components)
    height, width = (max(picture.shape[axis] for picture in found) for axis in (0, 1))
    across = math.ceil(math.sqrt(len(found)))
    channels = found[0].shape[2]
    sheet = np.full((math.ceil(len(found) / across) * height, across * width, channels), 255, dtype=np.uint8)
    for index, picture in enumerate(found):
        top, left = index // across * height, index % across * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    factor = max(1, _CELL // max(height, width))
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1), len(found)


def _pictures(dataset: Dataset, components: Path | None) -> list[ByteImages]:
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
    found: list[ByteImages] = []
    for shard in shards[:PICTURES]:
        check_shard(dataset, shard)
        opened = Shard.open(dataset.path(shard))
        found += list(decode(np.asarray(opened.latent[:each], dtype=np.float32)))
    return found[:PICTURES]
