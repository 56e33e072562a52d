"""The first weights of a run, from random numbers that the caller supplies."""

import math
from collections.abc import Callable

import numpy as np

from mmdit.config import MMDiTConfig
from mmdit.layers import position_table
from mmdit.transformer import Array, trainable_schema

POSITION_TABLE = "pos_embed.pos_embed"
# With these maps at zero every block starts as the identity and the model's output as zero (adaLN-zero, arXiv
# 2212.09748, section 3.2), which keeps the first steps of a deep model small.
_ZERO = (".norm1.linear.weight", ".norm1_context.linear.weight", "norm_out.linear.weight", "proj_out.weight")
# The text stream of an empty position is this bias and nothing else. At zero the layer norm behind it would blow up
# whatever the first step leaves there, rounding included: replays in bf16 differed ten times as much by it.
_TEXT_BIAS = "context_embedder.bias"
_TEXT_BIAS_STD = 2.0**-4  # above it a layer norm's epsilon is nothing; below the scale of real text


def initial_weights(config: MMDiTConfig, normal: Callable[[str, int], Array]) -> dict[str, Array]:
    """Every tensor of the state dict in fp32, the position table included.

    Args:
        config: the model's shape.
        normal: `normal(name, n)` gives n fp32 standard normal numbers for the tensor `name`. It is called once for each
            tensor that is not constant, in the order of the names.

    Raises:
        ValueError: `normal` gave another count or dtype.
    """
    weights: dict[str, Array] = {POSITION_TABLE: position_table(config)}
    for name, shape in trainable_schema(config):
        weights[name] = _initial_tensor(name, shape, normal)
    return weights


def _initial_tensor(name: str, shape: tuple[int, ...], normal: Callable[[str, int], Array]) -> Array:
    if name.endswith(_ZERO) or (name.endswith(".bias") and name != _TEXT_BIAS):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) == 1 and name != _TEXT_BIAS:  # the scales of the query and key norms
        return np.ones(shape, dtype=np.float32)
    count = math.prod(shape)
    numbers = normal(name, count)
    if numbers.shape != (count,) or numbers.dtype != np.float32:
        raise ValueError(f"{name} needs {count} float32 numbers, got {numbers.dtype} {numbers.shape}")
    if name == _TEXT_BIAS:
        return numbers * np.float32(_TEXT_BIAS_STD)
    # Xavier's scale. Square root and product of single numbers are exact everywhere, so these bytes are too.
    fan_out, fan_in = shape[0], count // shape[0]
    return (numbers * np.float32(math.sqrt(2.0 / (fan_in + fan_out)))).reshape(shape)
