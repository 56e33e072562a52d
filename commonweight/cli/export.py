"""`commonweight export`: the weights of a checkpoint for the tools that people draw with."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from commonweight.locate import checkpoint_directory
from protocol.errors import CheckpointCorrupt, DirectoryNotEmpty, UsageError
from protocol.printing import printable
from worker.durable import trouble_with

if TYPE_CHECKING:  # torch takes seconds to load; --help needs none of it
    from commonweight.provenance import Provenance
    from mmdit.export import Loaded
    from mmdit.precision import Precision

_SINGLE: Final = ".safetensors"
_CARD: Final = "README.md"


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
        Form | None,
        typer.Option(
            "--for",
            help='"diffusers": a directory; "comfyui": a single file with its names. Default: by what --out ends in.',
        ),
    ] = None,
    precision: Annotated[
        Precisions, typer.Option(help="fp8 is for ComfyUI alone; matrices in fp8, the rest in bf16.")
    ] = Precisions.BF16,
    raw: Annotated[bool, typer.Option("--raw", help="The weights themselves, not their running average.")] = False,
    components: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|OWNER/NAME",
            help="The text encoders and the autoencoder that the run was prepared with: the directory becomes a whole "
            "StableDiffusion3Pipeline, which draws from a prompt.",
        ),
    ] = None,
) -> None:
    """Write a checkpoint's weights, or their running average if the run keeps one, for diffusers or ComfyUI.

    Run, checkpoint, licence and data are named in it, as the run has signed them: in README.md, and in the metadata of
    the file of weights.
    """
    form = form or (Form.COMFYUI if out.suffix == _SINGLE else Form.DIFFUSERS)
    _check(out, form, precision)
    if components is not None and form is not Form.DIFFUSERS:
        raise UsageError("--components makes a whole pipeline, which is a directory for diffusers; leave one of them.")
    place = checkpoint_directory(checkpoint)
    networks = None
    if components is not None:
        from commonweight.components_place import find_components

        networks = find_components(components)

    from commonweight.provenance import provenance
    from mmdit.export import NarrowWeights, load_checkpoint, weights_path

    ema = False if raw else None
    try:
        loaded = load_checkpoint(place, ema=ema)
        origin = provenance(place, weights_path(place, ema=ema))
        written, lacking = _write(loaded, origin, out, form, precision.value, networks)
    except NarrowWeights as error:
        raise UsageError(f"{error}. That is an export; give the checkpoint that it was made from.") from None
    except _Refused as error:
        raise UsageError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
    except ValueError as error:
        raise CheckpointCorrupt(f"{place} can't be exported: {error}.") from None
    except OSError as error:
        raise trouble_with(out, error) from None
    said = f"{written:,} bytes"
    if networks is not None:
        everything = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        said = f"{everything:,} bytes, of which the transformer's weights are {written:,}"
    typer.echo(printable(f"{out}: {said}, {precision.value}, from {place}"))
    if origin is None:
        typer.echo("note: no manifest lies there, so the export names no run, no licence and no data", err=True)
    if form is Form.COMFYUI:
        _warn(loaded)
    if networks is not None and getattr(loaded.conditioning, "padding", None) == "zeros":
        typer.echo(
            "note: the run hears text without padding, which the pipeline does not make of a prompt; give it "
            "prompt_embeds, or draw with commonweight sample",
            err=True,
        )
    if lacking:
        given = ", ".join(f"{name}=None" for name in lacking)
        typer.echo(f"note: the run has no such encoder: open the pipeline with {given}", err=True)


class _Refused(ValueError):
    """What was asked for does not fit the checkpoint."""


def _check(out: Path, form: Form, precision: Precisions) -> None:
    if form is Form.DIFFUSERS and precision is Precisions.FP8:
        raise UsageError("diffusers reads no fp8 weights as they are; export bf16, or --for comfyui.")
    if form is Form.COMFYUI and out.suffix != _SINGLE:
        raise UsageError(f"{out} does not end in {_SINGLE}, which is what ComfyUI looks for.")
    if form is Form.DIFFUSERS and out.suffix == _SINGLE:
        raise UsageError(f"{out} ends in {_SINGLE}, but diffusers gets a directory; leave --for out for a single file.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DirectoryNotEmpty(f"{out} is there already; nothing was overwritten.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"There is no directory {out.absolute().parent} to write {out.name} to.")


def _write(
    loaded: "Loaded", origin: "Provenance | None", out: Path, form: Form, precision: "Precision", networks: Path | None
) -> tuple[int, tuple[str, ...]]:
    """Write it; return the bytes of the weights, and which parts a pipeline lacks."""
    from commonweight.model_card import metadata, model_card
    from mmdit.comfyui import to_single_file
    from mmdit.encoders import EncodersConfig
    from mmdit.export import WEIGHTS_PATH, write_description
    from mmdit.precision import narrowed
    from mmdit.space import VaeSpace
    from mmdit.weights_file import write_weights

    state = loaded.model.state_dict()
    target = out
    if form is Form.COMFYUI:
        state = to_single_file(state, loaded.config)
    else:
        target = out / WEIGHTS_PATH
    state = narrowed(state, precision)
    lacking: tuple[str, ...] = ()
    partial = target.with_name(f".{target.name}.part")
    with _undone_on_failure(out, partial):
        if form is Form.DIFFUSERS:
            write_description(
                out, config=loaded.config, conditioning=loaded.conditioning, space=loaded.space, shift=loaded.shift
            )
            lacking = () if networks is None else _write_parts(out, loaded, networks)
            card = model_card(
                origin,
                precision,
                encoders=loaded.conditioning if isinstance(loaded.conditioning, EncodersConfig) else None,
                autoencoder=loaded.space if isinstance(loaded.space, VaeSpace) else None,
                whole=networks is not None,
                lacking=lacking,
            )
            (out / _CARD).write_text(card, encoding="utf-8")
        write_weights(partial, state, metadata(origin))
        partial.rename(target)
    return target.stat().st_size, lacking


def _write_parts(out: Path, loaded: "Loaded", networks: Path) -> tuple[str, ...]:
    from commonweight.pipeline_export import write_pipeline_parts

    try:
        return write_pipeline_parts(out, loaded, networks)
    except ValueError as error:
        raise _Refused(str(error)) from None


@contextmanager
def _undone_on_failure(out: Path, partial: Path) -> Iterator[None]:
    """Leave of an export that fails what was there before: nothing, or an empty directory."""
    made = not out.exists()
    try:
        yield
    except BaseException:
        partial.unlink(missing_ok=True)
        if out.is_dir():
            for path in out.iterdir():  # it was empty
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if made:
                out.rmdir()
        raise


def _warn(loaded: "Loaded") -> None:
    from mmdit.comfyui import is_known_to_comfyui

    if not is_known_to_comfyui(loaded.config):
        typer.echo(
            "note: ComfyUI knows only models with layers = heads = width / 64 and 16 latent channels; diffusers' "
            "from_single_file reads this file, ComfyUI does not",
            err=True,
        )
