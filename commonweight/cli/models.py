"""`commonweight models`: the shapes that a run can train, with what they weigh."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # torch takes seconds to load; --help needs none of it
    from mmdit.config import MMDiTConfig

GB = 1e9
_EMBEDDED = {1: "grey pixels", 3: "RGB pixels"}
_LATENT_PIXEL = 8
"""Pixels that one of the autoencoder of Stable Diffusion 3 is wide."""
_BYTES = {"fp32": 4, "bf16": 2}
_LINE = "{:<9} {:>6} {:>5} {:>5} {:>14} {:>8} {:>8}  {}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One preset: its shape, its trained parameters, and sides of pictures: of those it is for, and of the largest."""

    name: str
    layers: int
    heads: int
    width: int
    parameters: int
    pixels: int
    largest_pixels: int
    paints: str


def describe(name: str, config: "MMDiTConfig") -> Model:
    """Return what is to be said of a preset; nothing of the model's size is allocated."""
    from diloco.schema import schema_of

    embedded = _EMBEDDED.get(config.in_channels)
    factor = 1 if embedded else _LATENT_PIXEL
    return Model(
        name=name,
        layers=config.num_layers,
        heads=config.num_attention_heads,
        width=config.hidden_size,
        parameters=schema_of(config).num_elements,
        pixels=config.sample_size * factor,
        largest_pixels=config.pos_embed_max_size * config.patch_size * factor,
        paints=embedded or f"{config.in_channels} latent channels",
    )


def models(
    *, json: Annotated[bool, typer.Option("--json", help="As JSON, one object for each model.")] = False
) -> None:
    """List the model shapes: parameters, and the size of a checkpoint in fp32 and of the released weights in bf16."""
    from mmdit.presets import PRESETS

    found = sorted((describe(name, config) for name, config in PRESETS.items()), key=lambda model: model.parameters)
    if json:
        from protocol.canonical import canonical_json

        for model in found:
            typer.echo(canonical_json(asdict(model)).decode("utf-8"))
        return
    typer.echo(
        f"{'model':<9} {'layers':>6} {'heads':>5} {'width':>5} {'parameters':>14} {'fp32':>8} {'bf16':>8}  paints"
    )
    for model in found:
        fp32, bf16 = (_size(model.parameters * each) for each in _BYTES.values())
        paints = f"{model.paints}, {model.pixels} x {model.pixels}"
        if model.largest_pixels > model.pixels:
            paints += f", up to {model.largest_pixels} x {model.largest_pixels}"
        shape = (model.name, model.layers, model.heads, model.width)
        typer.echo(_LINE.format(*shape, f"{model.parameters:,}", fp32, bf16, paints))


def _size(count: int) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 100 else f"{count / 1e6:.2f} MB"
