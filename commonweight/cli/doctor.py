"""`commonweight worker doctor`: what this machine can train."""

import math
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from commonweight.cli.homes import Home, default_home
from protocol.errors import UsageError

if TYPE_CHECKING:
    from worker.doctor import Diagnosis, Fit
    from worker.plan import Room

_GB = 1e9
_MOST_GB = 1e6
_WIDTH = 79
_HEADINGS = {"plain": "plain", "recomputed": "recomputed", "narrow": "narrow", "host": "offloaded"}
_MEANINGS = {
    "plain": "everything on the device, the quickest",
    "recomputed": "activations are computed twice: a fourth to a third more work",
    "narrow": "besides, gradients stay in the run's precision, and each tensor is updated by itself",
    "host": "besides, weights, gradients and moments are in main memory, and updated there",
}
_SHORT = (
    '"16.5 short" says that not even one fits: that would take 16.5 GB more of the device\'s memory. "RAM short" says '
    "that there is too little main memory for one."
)
_PARTS = (
    "RAM is the main memory that the last way takes. A run's batch may be larger: it passes in parts, whose gradients "
    "add up in fp32, which takes up to 6 bytes a parameter more, but none on the card if offloaded. A worker takes the "
    "quickest way that fits and says so; the result is the same but for rounding."
)
_LARGEST_PIXELS = 768
_PIXELS_STEP = 16


def doctor(
    home: Home = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What to train on; auto takes a CUDA GPU if there is one.")
    ] = "auto",
    memory: Annotated[
        float | None, typer.Option(help="Ask for a card with so many GB instead.", min=0.1, max=_MOST_GB)
    ] = None,
    ram: Annotated[
        float | None, typer.Option(help="Ask for so many GB of main memory instead.", min=0.1, max=_MOST_GB)
    ] = None,
    pixels: Annotated[int, typer.Option(help="Side of the pictures of models that paint in latents.", min=16)] = 512,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="The run's training.precision.")] = "bf16",
    optimizer: Annotated[
        Literal["adamw", "adamw-factored"], typer.Option(help="The run's training.optimizer.")
    ] = "adamw",
    json: Annotated[bool, typer.Option("--json", help="As JSON, one object for the machine and each model.")] = False,
) -> None:
    """Say which models this machine can train, and how many samples at once. Nothing is allocated, nobody is asked."""
    from mmdit.presets import PRESETS
    from worker.doctor import diagnose, ways

    if pixels > _LARGEST_PIXELS or pixels % _PIXELS_STEP:
        raise UsageError(f"--pixels is {pixels}; it must be a multiple of {_PIXELS_STEP}, up to {_LARGEST_PIXELS}.")
    for option, value in (("--memory", memory), ("--ram", ram)):
        if value is not None and math.isnan(value):
            raise UsageError(f"{option} is {value}; it must be a number of GB.")
    name, room = _room(device, memory, ram)
    place = (home or default_home()).absolute()
    disk = _free_disk(place)
    found = list(diagnose(PRESETS, room, pixels=pixels, precision=precision, optimizer=optimizer))
    if json:
        from json import dumps

        machine = {"device": name, "device_bytes": room.device, "host_bytes": room.host, "disk_bytes": disk}
        for record in (machine, *(diagnosis.to_json() for diagnosis in found)):
            typer.echo(dumps(record, sort_keys=True))
        return
    typer.echo(f"Device: {name}, {room.device / _GB:.1f} GB for training.")
    typer.echo(f"Main memory: {room.host / _GB:.1f} GB free. Disk: {disk / _GB:.1f} GB free in {place}.\n")
    typer.echo(f"Samples that may pass at once, in {precision} with {optimizer}.")
    typer.echo(_filled(_SHORT) + "\n")
    typer.echo(_line("model", "pixels", "weights", [_HEADINGS[way] for way in ways(room.kind)], "RAM"))
    for diagnosis in found:
        typer.echo(_row(diagnosis))
    typer.echo("")
    for way in ways(room.kind):
        typer.echo(textwrap.fill(f"{_HEADINGS[way]:<11} {_MEANINGS[way]}", _WIDTH, subsequent_indent=" " * 12))
    typer.echo("\n" + _filled(_PARTS))


def _filled(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def _room(device: Literal["auto", "cpu", "cuda"], memory: float | None, ram: float | None) -> "tuple[str, Room]":
    from dataclasses import replace

    from worker.hardware import resolve_device
    from worker.plan import room_of

    target = resolve_device(device)
    room, name = room_of(target), "this computer's processor"
    if target == "cuda":
        import torch

        name = torch.cuda.get_device_name(0)
    if memory is not None:
        room, name = replace(room, kind="cuda", device=int(memory * _GB)), f"a card with {memory:g} GB"
    if ram is not None:
        host = int(ram * _GB)
        room = replace(room, host=host, device=host if room.kind == "cpu" else room.device)
    return name, room


def _free_disk(place: Path) -> int:
    existing = next(path for path in (place, *place.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _row(diagnosis: "Diagnosis") -> str:
    weights = f"{diagnosis.parameters * 4 / _GB:.2f} GB"
    *_, last = diagnosis.fits.values()
    cells = [_cell(fit) for fit in diagnosis.fits.values()]
    return _line(diagnosis.model, str(diagnosis.pixels), weights, cells, f"{last.host_bytes / _GB:.1f} GB")


def _line(model: str, pixels: str, weights: str, cells: "Sequence[str]", host: str) -> str:
    return f"{model:<8} {pixels:>6} {weights:>8}" + "".join(f" {cell:>10}" for cell in cells) + f" {host:>8}"


def _cell(fit: "Fit") -> str:
    if fit.samples:
        from worker.doctor import LARGEST_BATCH

        return f"{fit.samples}" + ("+" if fit.samples >= LARGEST_BATCH else "")
    if fit.device_short:
        short = max(fit.device_short, 1e8) / _GB
        return f"{short:.1f} short" if short < 100 else f"{short:.0f} short"
    return "RAM short"
