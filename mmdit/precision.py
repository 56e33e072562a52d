"""Weights in fewer bits, for those who only draw with them. Checkpoints themselves are fp32."""

from collections.abc import Mapping
from typing import Final, Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
PRECISIONS: Final[Mapping[Precision, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


def narrowed(state: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Return weights in another precision, rounded to the nearest.

    In fp8 (e4m3) only matrices are; biases, norms and the position table, which are few and feel it most, are bf16.

    Args:
        state: fp32 weights.
        precision: what they become.

    Raises:
        ValueError: a weight is too large for it; the message names the tensor.
    """
    return {name: _narrowed(name, tensor, precision) for name, tensor in state.items()}


def _narrowed(name: str, tensor: Tensor, precision: Precision) -> Tensor:
    dtype = PRECISIONS["bf16"] if precision == "fp8" and tensor.ndim != 2 else PRECISIONS[precision]
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if not largest <= torch.finfo(dtype).max:
        raise ValueError(f"{name} holds {largest:g}, which {precision} can't; use bf16")
    return tensor.to(dtype)
