"""`commonweight sample`: a picture from a checkpoint."""

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commonweight.locate import checkpoint_directory
from protocol.errors import CheckpointCorrupt, UsageError
from protocol.printing import printable
from worker.durable import trouble_with

if TYPE_CHECKING:  # torch takes seconds to load; --help needs none of it
    from mmdit.space import ByteImages


class Device(StrEnum):
    """What to compute with."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def sample(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint directory, or a run's directory (its newest checkpoint).",
        ),
    ],
    caption: Annotated[str, typer.Argument(metavar="CAPTION", help='What to draw, such as "a handwritten seven".')],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.png", help="The picture's file.")],
    seed: Annotated[int, typer.Option(help="Starting noise: the same seed starts from the same noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Euler steps.")] = 30,
    guidance: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="How much the caption is exaggerated; 1 is not at all.")
    ] = 3.0,
    count: Annotated[
        int, typer.Option(min=1, max=100, help="Pictures, side by side in one file, each from noise of its own.")
    ] = 1,
    size: Annotated[
        int | None,
        typer.Option(min=1, max=2048, help="Height of each picture in pixels, by repeating pixels; default: as drawn."),
    ] = None,
    device: Annotated[Device, typer.Option(help="What to compute with.")] = Device.AUTO,
) -> None:
    """Draw a caption with a published checkpoint and write it as a PNG file."""
    if out.suffix.lower() != ".png":
        raise UsageError(f"{out} does not end in .png, which is what would be written to it.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"There is no directory {out.absolute().parent} to write {out.name} to.")
    place = checkpoint_directory(checkpoint)

    from commonweight.drawing import draw
    from commonweight.png import png_bytes
    from mmdit.export import load_checkpoint
    from worker.hardware import resolve_device

    target = resolve_device(device.value)
    try:
        loaded = load_checkpoint(place, device=target)
    except ValueError as error:
        raise CheckpointCorrupt(f"{place} is not a checkpoint that this version can draw with: {error}.") from None
    try:
        pictures = draw(loaded, [caption] * count, seed=seed, steps=steps, guidance=guidance, device=target)
    except ValueError as error:  # a caption that is no Unicode text
        raise UsageError(f"{error}.") from None
    if size is not None:
        pictures = _enlarged(pictures, size)
    try:
        encoded = png_bytes(_side_by_side(pictures))
    except ValueError as error:
        raise CheckpointCorrupt(f"{place} does not draw in grey or in colour: {error}.") from None
    try:
        out.write_bytes(encoded)
    except OSError as error:
        raise trouble_with(out, error) from None
    pixels = f"{pictures.shape[2]} x {pictures.shape[1]}"
    typer.echo(printable(f"{out}: {caption!r}, {count} of {pixels} pixels, seed {seed}, from {place}"))


def _enlarged(pictures_NHWC: "ByteImages", height: int) -> "ByteImages":
    """Repeat (or skip) pixels to the given height, keeping the proportions."""
    import numpy as np

    _, old_height, old_width, _ = pictures_NHWC.shape
    width = max(1, height * old_width // old_height)
    rows = np.arange(height) * old_height // height
    columns = np.arange(width) * old_width // width
    return pictures_NHWC[:, rows][:, :, columns]


def _side_by_side(pictures_NHWC: "ByteImages") -> "ByteImages":
    """One picture with all of them, row by row in a sheet that is about as wide as high; empty places are black."""
    import numpy as np

    count, height, width, channels = pictures_NHWC.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    sheet = np.zeros((down * height, across * width, channels), dtype=np.uint8)
    for index, picture in enumerate(pictures_NHWC):
        top, left = index // across * height, index % across * width
        sheet[top : top + height, left : left + width] = picture
    return sheet
