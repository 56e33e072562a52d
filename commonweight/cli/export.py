"""`commonweight export`: the weights of a checkpoint for the tools that people draw with."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commonweight.locate import checkpoint_directory
from protocol.errors import CheckpointCorrupt, DirectoryNotEmpty, UsageError
from protocol.printing import printable
from worker.durable import trouble_with

if TYPE_CHECKING:  # torch takes seconds to load; --help needs none of it
    from mmdit.export import Loaded
    from mmdit.precision import Precision


_MODE = 0o644
"""As for every published file."""


class Form(StrEnum):
    """Who is to read it."""

    DIFFUSERS = "diffusers"
    COMFYUI = "comfyui"


class Precisions(StrEnum):
    """What weights are rounded to."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint directory, or a run's directory (its newest checkpoint)."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="DIR|FILE", help="A new directory, or for ComfyUI a .safetensors file."),
    ],
    form: Annotated[
        Form, typer.Option("--for", help='"diffusers": a directory; "comfyui": a single file with its names.')
    ] = Form.DIFFUSERS,
    precision: Annotated[
        Precisions, typer.Option(help="fp8 is for ComfyUI alone; matrices in fp8, the rest in bf16.")
    ] = Precisions.BF16,
    raw: Annotated[bool, typer.Option("--raw", help="The weights themselves, not their running average.")] = False,
) -> None:
    """Write a checkpoint's weights, or their running average if the run keeps one, for diffusers or ComfyUI."""
    if form is Form.DIFFUSERS and precision is Precisions.FP8:
        raise UsageError("diffusers reads no fp8 weights as they are; export bf16, or --for comfyui.")
    if form is Form.COMFYUI and out.suffix != ".safetensors":
        raise UsageError(f"{out} does not end in .safetensors, which is what ComfyUI looks for.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DirectoryNotEmpty(f"{out} is there already; nothing was overwritten.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"There is no directory {out.absolute().parent} to write {out.name} to.")
    place = checkpoint_directory(checkpoint)

    from mmdit.export import NarrowWeights, load_checkpoint

    try:
        loaded = load_checkpoint(place, ema=False if raw else None)
        written = _write(loaded, out, form, precision.value)
    except NarrowWeights as error:
        raise UsageError(f"{error}. That is an export; give the checkpoint that it was made from.") from None
    except ValueError as error:
        raise CheckpointCorrupt(f"{place} can't be exported: {error}.") from None
    except OSError as error:
        raise trouble_with(out, error) from None
    typer.echo(printable(f"{out}: {written:,} bytes, {precision.value}, from {place}"))
    if form is Form.COMFYUI:
        _warn(loaded)


def _write(loaded: "Loaded", out: Path, form: Form, precision: "Precision") -> int:
    from safetensors.torch import save_file

    from mmdit.comfyui import to_single_file
    from mmdit.export import WEIGHTS_PATH, write_description
    from mmdit.precision import narrowed

    state = loaded.model.state_dict()
    if form is Form.COMFYUI:
        state = to_single_file(state, loaded.config)
        target = out
    else:
        write_description(
            out, config=loaded.config, conditioning=loaded.conditioning, space=loaded.space, shift=loaded.shift
        )
        target = out / WEIGHTS_PATH
    partial = target.with_name(f".{target.name}.part")
    # One key of metadata: with more, the library does not write the same bytes twice.
    save_file(narrowed(state, precision), partial, metadata={"format": "pt"})
    partial.chmod(_MODE)  # the library makes it readable for its owner alone
    partial.rename(target)
    return target.stat().st_size


def _warn(loaded: "Loaded") -> None:
    from mmdit.comfyui import is_known_to_comfyui

    if not is_known_to_comfyui(loaded.config):
        typer.echo(
            "note: ComfyUI knows only models with layers = heads = width / 64 and 16 latent channels; diffusers' "
            "from_single_file reads this file, ComfyUI does not",
            err=True,
        )
