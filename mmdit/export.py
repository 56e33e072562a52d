"""The files around the weights, so that a checkpoint directory is a diffusers model and describes itself.

transformer/config.json                             for SD3Transformer2DModel
transformer/diffusion_pytorch_model.safetensors     written elsewhere: its bytes are canonical
ema/config.json, ema/diffusion_pytorch_model.safetensors   the same for the running average, if there is one
scheduler/scheduler_config.json                     for FlowMatchEulerDiscreteScheduler
commonweight.json                                   how captions and pictures become numbers
"""

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import rfc8785
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmdit.config import MMDiTConfig
from mmdit.encoders import Conditioning, conditioning_from_json, conditioning_to_json
from mmdit.space import Space, space_from_json, space_to_json
from mmdit.transformer import MMDiT

CONFIG_PATH: Final = Path("transformer", "config.json")
WEIGHTS_PATH: Final = Path("transformer", "diffusion_pytorch_model.safetensors")
EMA_CONFIG_PATH: Final = Path("ema", "config.json")
EMA_PATH: Final = Path("ema", "diffusion_pytorch_model.safetensors")
SCHEDULER_PATH: Final = Path("scheduler", "scheduler_config.json")
DESCRIPTION_PATH: Final = Path("commonweight.json")

_FORMAT: Final = 1
_Read = TypeVar("_Read")
_MOST_JSON_BYTES: Final = 1 << 20
_WIDENED: Final = (torch.bfloat16, torch.float16)
"""What every number of is a number of fp32 too."""


class NarrowWeights(ValueError):
    """The weights have fewer bits than a checkpoint's: they were exported for drawing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint read from its directory, ready to draw with."""

    model: MMDiT
    config: MMDiTConfig
    conditioning: Conditioning
    space: Space
    shift: float


def write_description(
    directory: Path,
    *,
    config: MMDiTConfig,
    conditioning: Conditioning,
    space: Space,
    shift: float = 1.0,
    ema: bool = False,
) -> None:
    """Write everything of a checkpoint directory but the weights. The same arguments give the same bytes.

    Args:
        directory: made if it is missing.
        config: the model's shape.
        conditioning: the text encoder; its widths must be the model's.
        space: what latents mean; its channels must be the model's.
        shift: the timestep shift for sampling.
        ema: whether the run keeps a running average of the weights.

    Raises:
        ValueError: model, conditioning and space do not fit each other; the message names both numbers.
    """
    _check_fit(config, conditioning, space)
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
        "use_dynamic_shifting": False,
    }
    described: dict[str, Any] = {
        "format": _FORMAT,
        "conditioning": conditioning_to_json(conditioning),
        "space": space_to_json(space),
    }
    for path, content in (
        (CONFIG_PATH, _readable_json(config.to_diffusers())),
        *([(EMA_CONFIG_PATH, _readable_json(config.to_diffusers()))] if ema else []),
        (SCHEDULER_PATH, _readable_json(scheduler)),
        (DESCRIPTION_PATH, rfc8785.dumps(described)),
    ):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)


def weights_path(directory: Path, *, ema: bool | None = None) -> Path:
    """Return which file of a checkpoint directory is drawn with, relative to it; `ema` as for `load_checkpoint`."""
    averaged = (directory / EMA_PATH).exists() if ema is None else ema
    return EMA_PATH if averaged else WEIGHTS_PATH


def load_checkpoint(directory: Path, *, device: str = "cpu", ema: bool | None = None, widen: bool = False) -> Loaded:
    """Read a checkpoint directory, strictly: every file, every key and every tensor as `write_description` has them.

    Args:
        directory: a checkpoint's.
        device: where the weights go.
        ema: whether to take the running average of the weights; None takes it if it is there.
        widen: take an export in bf16 or fp16 too; its weights become fp32 again.

    Raises:
        NarrowWeights: it is such an export, and `widen` is not given; or one in fp8.
        ValueError: a file is missing, unreadable, or does not fit the others; the message names the file.
    """
    config = _from_file(directory / CONFIG_PATH, MMDiTConfig.from_diffusers)
    conditioning, space = _from_file(directory / DESCRIPTION_PATH, _read_description)
    _check_fit(config, conditioning, space)
    shift = _from_file(directory / SCHEDULER_PATH, _read_shift)
    model = MMDiT(config, device="meta")
    _load_weights(model, directory / weights_path(directory, ema=ema), device, widen=widen)
    return Loaded(model=model.eval(), config=config, conditioning=conditioning, space=space, shift=shift)


def _load_weights(model: MMDiT, path: Path, device: str, *, widen: bool) -> None:
    try:
        os.close(_open_plain(path))  # the library would wait for ever for somebody to write into a named pipe
        state = load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if widen:
        state = {name: tensor.float() if tensor.dtype in _WIDENED else tensor for name, tensor in state.items()}
    if wrong := sorted(name for name, tensor in state.items() if tensor.dtype != torch.float32):
        kind = NarrowWeights if state[wrong[0]].is_floating_point() else ValueError
        raise kind(f"{path} holds {wrong[0]} as {state[wrong[0]].dtype}; checkpoints are float32")
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights that its config.json describes: {error}") from error
    model.requires_grad_(requires_grad=True)


def _from_file(path: Path, read: Callable[[Mapping[str, object]], _Read]) -> _Read:
    try:
        with os.fdopen(_open_plain(path), "rb") as file:
            content = file.read(_MOST_JSON_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MOST_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_JSON_BYTES} bytes")
    try:
        values: object = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return read(values)
    except (ValueError, RecursionError, OverflowError) as error:  # a number of 400 digits is JSON, too
        raise ValueError(f"{path}: {error}") from error


def _open_plain(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return descriptor


def _read_description(values: Mapping[str, object]) -> tuple[Conditioning, Space]:
    if values.get("format") != _FORMAT:
        raise ValueError(f"format is {values.get('format')!r}, this version reads {_FORMAT}")
    if values.keys() != {"format", "conditioning", "space"}:
        raise ValueError(f"keys are {sorted(values)}, expected conditioning, format, space")
    conditioning, space = values["conditioning"], values["space"]
    if not isinstance(conditioning, dict) or not isinstance(space, dict):
        raise ValueError("conditioning and space must be objects")
    return conditioning_from_json(conditioning), space_from_json(space)


def _read_shift(values: Mapping[str, object]) -> float:
    shift = values.get("shift")
    if values.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or values.get("use_dynamic_shifting"):
        raise ValueError("only FlowMatchEulerDiscreteScheduler without dynamic shifting is known")
    if not isinstance(shift, int | float) or isinstance(shift, bool):
        raise ValueError(f"shift is {shift!r}; it must be a number")
    if not 0.0 < shift < math.inf:
        raise ValueError(f"shift is {shift!r}; it must be a positive number")
    return float(shift)


def _check_fit(config: MMDiTConfig, conditioning: Conditioning, space: Space) -> None:
    largest = config.pos_embed_max_size * config.patch_size
    for ours, mine, theirs, its in (
        ("joint_attention_dim", config.joint_attention_dim, "token_dim", conditioning.token_dim),
        ("pooled_projection_dim", config.pooled_projection_dim, "pooled_dim", conditioning.pooled_dim),
        ("in_channels", config.in_channels, "channels", space.channels),
        ("out_channels", config.out_channels, "channels", space.channels),
    ):
        if mine != its:
            raise ValueError(f"the model's {ours} is {mine}, but {theirs} is {its}")
    for name, side in (("height", space.height), ("width", space.width)):
        if side % config.patch_size or side > largest:
            raise ValueError(
                f"{name} {side} does not fit the model: it must be a multiple of patch_size {config.patch_size}, "
                f"at most {largest}"
            )


def _readable_json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
