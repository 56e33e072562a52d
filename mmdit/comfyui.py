"""The single file that ComfyUI's "Load Checkpoint" and Stability AI's own code read: other names, the same numbers.

Those have one matrix for queries, keys and values, and two places where scale and shift stand the other way round: the
final layer, and the text half of the last block. ComfyUI takes the model's size from its shapes, and knows it only if
layers = heads = width / 64 and latents have 16 channels; files of other shapes are read by diffusers alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mmdit.config import MMDiTConfig

PREFIX: Final = "model.diffusion_model."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """One tensor there, and the tensors here that lie in it one after another; `swapped`: its halves change places."""

    theirs: str
    ours: tuple[str, ...]
    swapped: bool = False


def is_known_to_comfyui(config: MMDiTConfig) -> bool:
    """Whether ComfyUI recognises a file of this shape as Stable Diffusion 3's transformer."""
    square = config.num_layers == config.num_attention_heads and config.attention_head_dim == 64
    return square and config.in_channels == config.out_channels == 16 and config.patch_size == 2


def to_single_file(state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """Return the weights under the names of the single file; `from_single_file` gives the same numbers back.

    Args:
        state: the weights under diffusers' names, the position table with them.
        config: the model's shape.

    Raises:
        ValueError: a tensor is missing, or one is there that this shape does not have.
    """
    pairs = list(_pairs(config))
    _check_names(state.keys(), [name for pair in pairs for name in pair.ours])
    return {PREFIX + pair.theirs: _joined([state[name] for name in pair.ours], swapped=pair.swapped) for pair in pairs}


def from_single_file(state: Mapping[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """Return the weights of a single file under diffusers' names.

    Args:
        state: tensors whose names begin with `PREFIX`; those of encoders and autoencoder beside them are passed over.
        config: the model's shape.

    Raises:
        ValueError: a tensor of the transformer is missing or unknown, or can't be taken apart.
    """
    found = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    pairs = list(_pairs(config))
    _check_names(found.keys(), [pair.theirs for pair in pairs])
    weights: dict[str, Tensor] = {}
    for pair in pairs:
        tensor = _swapped(found[pair.theirs]) if pair.swapped else found[pair.theirs]
        if tensor.shape[0] % len(pair.ours):
            raise ValueError(f"{pair.theirs} has {tensor.shape[0]} rows, which are not {len(pair.ours)} equal parts")
        weights |= zip(pair.ours, (part.contiguous() for part in tensor.chunk(len(pair.ours))), strict=True)
    return weights


def _check_names(found: Iterable[str], expected: Sequence[str]) -> None:
    names = set(found)
    if missing := sorted(set(expected) - names):
        raise ValueError(f"{missing[0]} is missing, and {len(missing) - 1} others")
    if unknown := sorted(names - set(expected)):
        raise ValueError(f"{unknown[0]} is no tensor of this model, nor are {len(unknown) - 1} others")


def _joined(parts: Sequence[Tensor], *, swapped: bool) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return _swapped(whole) if swapped else whole


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def _pairs(config: MMDiTConfig) -> Iterator[_Pair]:
    yield _Pair(theirs="pos_embed", ours=("pos_embed.pos_embed",))
    for theirs, ours in (
        ("x_embedder.proj", "pos_embed.proj"),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        ("context_embedder", "context_embedder"),
        ("final_layer.linear", "proj_out"),
    ):
        yield from _linear(theirs, ours)
    yield from _linear("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    for index in range(config.num_layers):
        last = index == config.num_layers - 1
        theirs, ours = f"joint_blocks.{index}", f"transformer_blocks.{index}"
        yield from _image_half(f"{theirs}.x_block", ours, config, dual=index in config.dual_attention_layers)
        yield from _text_half(f"{theirs}.context_block", ours, config, last=last)


def _image_half(theirs: str, ours: str, config: MMDiTConfig, *, dual: bool) -> Iterator[_Pair]:
    yield from _linear(f"{theirs}.adaLN_modulation.1", f"{ours}.norm1.linear")
    yield from _linear(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj")
    yield from _linear(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2")
    for name in ("attn", "attn2") if dual else ("attn",):
        yield from _linear(f"{theirs}.{name}.qkv", *(f"{ours}.{name}.to_{each}" for each in "qkv"))
        yield from _linear(f"{theirs}.{name}.proj", f"{ours}.{name}.to_out.0")
        if config.qk_norm:
            for each in "qk":
                yield _Pair(theirs=f"{theirs}.{name}.ln_{each}.weight", ours=(f"{ours}.{name}.norm_{each}.weight",))


def _text_half(theirs: str, ours: str, config: MMDiTConfig, *, last: bool) -> Iterator[_Pair]:
    yield from _linear(f"{theirs}.adaLN_modulation.1", f"{ours}.norm1_context.linear", swapped=last)
    yield from _linear(f"{theirs}.attn.qkv", *(f"{ours}.attn.add_{each}_proj" for each in "qkv"))
    if config.qk_norm:
        for each in "qk":
            yield _Pair(theirs=f"{theirs}.attn.ln_{each}.weight", ours=(f"{ours}.attn.norm_added_{each}.weight",))
    if not last:
        yield from _linear(f"{theirs}.attn.proj", f"{ours}.attn.to_add_out")
        yield from _linear(f"{theirs}.mlp.fc1", f"{ours}.ff_context.net.0.proj")
        yield from _linear(f"{theirs}.mlp.fc2", f"{ours}.ff_context.net.2")


def _linear(theirs: str, *ours: str, swapped: bool = False) -> Iterator[_Pair]:
    for each in ("weight", "bias"):
        yield _Pair(theirs=f"{theirs}.{each}", ours=tuple(f"{name}.{each}" for name in ours), swapped=swapped)
