"""`commonweight sample`: pictures from a checkpoint."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from commonweight.extras import not_installed
from commonweight.locate import checkpoint_directory
from protocol.errors import CheckpointCorrupt, CommonweightError, UsageError
from protocol.printing import printable
from worker.durable import trouble_with

if TYPE_CHECKING:  # torch takes seconds to load; --help needs none of it
    from commonweight.drawing import Drawing
    from mmdit.export import Loaded
    from mmdit.sample import Guidance
    from mmdit.space import ByteImages

_SIZE: Final = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_NUMBER: Final = re.compile(r"[0-9]{4,9}")
_STRENGTH: Final = 0.6
_OTHER_PICTURES: Final = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".tif", ".tiff", ".webp"})
_MOST_PICTURES: Final = 1000
_MOST_INIT_PIXELS: Final = 80_000_000
_MOST_PIXELS: Final = 1 << 28
"""Of all pictures of a command together, as they are written."""


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
            help="A checkpoint directory, a run's directory (its newest checkpoint), or an export for diffusers.",
        ),
    ],
    captions: Annotated[
        list[str],
        typer.Argument(metavar="CAPTION...", help='What to draw, such as "a handwritten seven"; one or several.'),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE.png|DIR",
            help="A PNG file for all pictures side by side, written anew; or a directory for a file each, made if it "
            "is missing, where they are numbered on from those that are there.",
        ),
    ],
    avoid: Annotated[str, typer.Option("--negative", help="A caption to lead away from.")] = "",
    seed: Annotated[int, typer.Option(help="Starting noise: the same seed starts from the same noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Euler steps.")] = 30,
    guidance: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="How much the caption is exaggerated; 1 is not at all.")
    ] = 3.0,
    interval: Annotated[
        str,
        typer.Option(
            metavar="LOW-HIGH",
            help="Guide only at times in this interval, 1 being noise; 0.2-0.8 keeps strong guidance from glaring.",
        ),
    ] = "0-1",
    guide: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Lead away from what an older checkpoint of the run would draw, instead of from no caption.",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=100, help="Pictures of each caption, each from other noise.")] = 1,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Pictures drawn at once; fewer need less memory.")] = 50,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Size to draw in, in pixels; default: what the model was made for."),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="A picture to start from instead of noise; it is fitted to the size."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="How much of --init is given up: 0 keeps it, 1 forgets it; default: 0.6."),
    ] = None,
    enlarge: Annotated[int, typer.Option(min=1, max=256, help="Repeat each pixel so many times across and down.")] = 1,
    raw: Annotated[
        bool, typer.Option("--raw", help="Draw with the weights themselves, not with their running average.")
    ] = False,
    components: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|OWNER/NAME",
            help="Folder of the text encoders and the autoencoder that the run was prepared with, if it was; an "
            "exported pipeline has them.",
        ),
    ] = None,
    without: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Text encoders that are not to be heard, such as t5; they aren't loaded."),
    ] = "",
    device: Annotated[Device, typer.Option(help="What to compute with.")] = Device.AUTO,
) -> None:
    """Draw captions with a checkpoint and write them as PNG, with what drew them in the file."""
    _check_out(out)
    if len(captions) * count > _MOST_PICTURES:
        raise UsageError(f"{len(captions)} captions times {count} are more than {_MOST_PICTURES} pictures.")
    if avoid and guide is not None:
        raise UsageError("--negative and --guide are both something to lead away from; give one of them.")
    if strength is not None and init is None:
        raise UsageError("--strength says how much of --init is given up; give a picture with --init too.")
    place = checkpoint_directory(checkpoint)
    older = None if guide is None else checkpoint_directory(guide)

    from commonweight.components_place import said_as_usage
    from commonweight.drawing import Drawing, draw, load_networks
    from worker.hardware import resolve_device

    target = resolve_device(device.value)
    loaded = _load(place, target, raw=raw)
    weaker = None if older is None else _load(older, target, raw=raw)
    unheard = tuple(name.strip() for name in without.split(",") if name.strip())
    with said_as_usage():
        networks = load_networks(loaded, _components(place, components), target, without=unheard)
    width, height = _sizes(size) or (loaded.space.pixel_width, loaded.space.pixel_height)
    if len(captions) * count * width * height * enlarge**2 > _MOST_PIXELS:
        raise UsageError(f"That would be more than {_MOST_PIXELS:,} pixels; lower --count, --size or --enlarge.")
    drawing = Drawing(
        seed=seed,
        steps=steps,
        guidance=_guidance(guidance, interval),
        avoid=avoid,
        width=width,
        height=height,
        init=None if init is None else _read_picture(init, width, height, loaded.space.pixel_channels),
        strength=_STRENGTH if strength is None else strength,
        batch=batch,
        without=unheard,
    )
    wanted = [caption for caption in captions for _ in range(count)]
    facts = {**_facts(place, "Model", raw=raw), **({} if older is None else _facts(older, "Guide", raw=raw))}
    if init is not None:
        facts["Init image"] = init.name
    began = time.monotonic()
    with said_as_usage():  # a caption that is no Unicode text, a size that does not fit
        pictures = draw(loaded, wanted, drawing, guide=weaker, networks=networks, device=target)
    seconds = time.monotonic() - began
    written = _write(out, pictures.repeat(enlarge, axis=1).repeat(enlarge, axis=2), wanted, drawing, place, facts)
    listed = ", ".join(repr(caption) for caption in captions[:3]) + (", …" if len(captions) > 3 else "")
    number = "1 picture" if len(wanted) == 1 else f"{len(wanted)} pictures"
    where = str(written[0]) if len(written) == 1 else f"{written[0]} to {written[-1].name}"
    typer.echo(
        printable(
            f"{where}: {listed}, {number} of {width} x {height} pixels, seed {seed}, from {place}, "
            f"in {seconds:.2f} s ({seconds / len(wanted):.2f} s each, {target})"
        )
    )


def _check_out(out: Path) -> None:
    if out.is_dir() and out.suffix.lower() != ".png":
        return
    if out.suffix.lower() in _OTHER_PICTURES:
        raise UsageError(f"{out} ends in {out.suffix}, but pictures are written as PNG: name a .png or a directory.")
    if out.exists() and out.suffix.lower() != ".png":
        raise UsageError(f"{out} neither ends in .png nor is a directory; nothing was overwritten.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"There is no directory {out.absolute().parent} to write {out.name} to.")


def _load(place: Path, device: str, *, raw: bool) -> "Loaded":
    from mmdit.export import NarrowWeights, load_checkpoint

    try:
        return load_checkpoint(place, device=device, ema=False if raw else None, widen=True)
    except NarrowWeights as error:
        raise UsageError(f"{error}. That is an export; give the checkpoint that it was made from.") from None
    except ValueError as error:
        raise CheckpointCorrupt(f"{place} is not a checkpoint that this version can draw with: {error}.") from None


def _components(place: Path, components: str | None) -> Path | None:
    """Return the folder that was named, or the exported pipeline itself, which has its networks in it."""
    from commonweight.components_place import find_components
    from mmdit.components import VAE_FOLDER, encoders_in

    if components is not None:
        return find_components(components)
    return place if encoders_in(place) or (place / VAE_FOLDER).is_dir() else None


def _sizes(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    found = _SIZE.fullmatch(size)
    if found is None:
        raise UsageError(f"--size {size[:40]!r} is no width and height, such as 32x48.")
    return int(found[1]), int(found[2])


def _guidance(scale: float, interval: str) -> "Guidance":
    from mmdit.sample import Guidance

    low, _, high = interval.partition("-")
    try:
        return Guidance(scale=scale, low=float(low), high=float(high))
    except ValueError:
        raise UsageError(
            f"--interval {interval[:40]!r} is no interval of times in 0..1, the lower one first, such as 0.2-0.8."
        ) from None


def _read_picture(path: Path, width: int, height: int, channels: int) -> "ByteImages":
    """Read any picture, cut to the proportions and resized; uint8 [height, width, channels]."""
    import numpy as np

    from commonweight.data.pictures import known_formats
    from verify.plain_files import open_plain

    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise not_installed("--init reads pictures with Pillow", "data") from None
    try:
        with open_plain(path) as file, Image.open(file, formats=known_formats()) as opened:
            if opened.width * opened.height > _MOST_INIT_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
            upright = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UsageError(f"--init {path} can't be read as a picture: {error}.") from None
    except OSError as error:
        raise UsageError(f"--init {path} can't be read: {error.strerror or error}.") from None
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, dtype=np.uint8).reshape(height, width, channels)


def _facts(place: Path, role: str, *, raw: bool) -> dict[str, object]:
    """What a picture says of a checkpoint that it was drawn with; a run's id only if the run has signed for that."""
    from commonweight.provenance import provenance
    from mmdit.export import weights_path
    from verify.plain_files import file_sha256

    path = weights_path(place, ema=False if raw else None)
    try:
        origin = provenance(place, path)
    except CommonweightError as error:
        origin = None
        typer.echo(
            printable(f"note: no run is named in the pictures, since its papers do not hold: {error.message}"), err=True
        )
    if origin is None:
        return {role: place.name, f"{role} hash": file_sha256(place / path)}
    return {role: place.name, f"{role} hash": origin.sha256, f"{role} run": origin.run_id}


def _write(
    out: Path,
    pictures: "ByteImages",
    captions: list[str],
    drawing: "Drawing",
    place: Path,
    facts: Mapping[str, object],
) -> list[Path]:
    """Write one file, or one for each picture into a directory; return which."""
    from commonweight.png import png_bytes

    try:
        if out.suffix.lower() == ".png":
            sheet = png_bytes(_side_by_side(pictures), _said(captions, drawing, facts))
        else:
            each = [
                png_bytes(picture, _said([caption], drawing, {**facts, "Noise": number}))
                for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
            ]
    except ValueError as error:
        raise CheckpointCorrupt(f"{place} does not draw in grey or in colour: {error}.") from None
    try:
        if out.suffix.lower() == ".png":
            out.write_bytes(sheet)
            return [out]
        out.mkdir(exist_ok=True)
        return _write_numbered(out, each)
    except OSError as error:
        raise trouble_with(error.filename or out, error) from None


def _write_numbered(folder: Path, contents: Sequence[bytes]) -> list[Path]:
    """Write files under the numbers after the highest that is there; nothing is overwritten, also by two at once."""
    taken = [int(path.stem) for path in folder.glob("*.png") if _NUMBER.fullmatch(path.stem)]
    number, written = max(taken, default=-1) + 1, []
    for content in contents:
        while True:
            path = folder / f"{number:04d}.png"
            number += 1
            try:
                with path.open("xb") as file:
                    file.write(content)
            except FileExistsError:
                continue
            except OSError as error:  # a write that fails does not say where
                path.unlink(missing_ok=True)
                raise trouble_with(path, error) from None
            written.append(path)
            break
    return written


def _said(captions: list[str], drawing: "Drawing", more: Mapping[str, object]) -> dict[str, str]:
    """What a file says about itself, in the words that the programs of the field read ("parameters")."""
    lines = [" | ".join(dict.fromkeys(captions))]
    if drawing.avoid:
        lines.append(f"Negative prompt: {drawing.avoid}")
    facts: dict[str, object] = {
        "Steps": drawing.steps,
        "Sampler": "Euler",
        "CFG scale": drawing.guidance.scale,
        "Seed": drawing.seed,
        "Size": f"{drawing.width}x{drawing.height}",
    }
    if (drawing.guidance.low, drawing.guidance.high) != (0.0, 1.0):
        facts["Guidance interval"] = f"{drawing.guidance.low:g}-{drawing.guidance.high:g}"
    if drawing.init is not None:
        facts["Denoising strength"] = drawing.strength
    lines.append(", ".join(f"{name}: {_value(value)}" for name, value in {**facts, **more}.items()))
    return {"Software": "Commonweight", "parameters": "\n".join(lines)}


def _value(value: object) -> str:
    """As those programs write it: in quotes if it holds what divides the values."""
    text = printable(str(value))
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"') else text


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
