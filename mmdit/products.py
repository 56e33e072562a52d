"""Matrix products and attention in bf16, also where the processor has no instructions for them.

What bf16 means here is the same everywhere: operands are bf16 numbers, sums are fp32, results are rounded to bf16. A
processor without such instructions gets them slowly from torch (on AVX2 a forward product takes nine times, a backward
one up to a hundred times as long as in fp32). There the same numbers go through the fp32 product instead: a product of
two bf16 numbers is exact in fp32, so nothing but the order of the sums differs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

_in_fp32: ContextVar[bool | None] = ContextVar("_in_fp32", default=None)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear map of tokens [..., D] by a weight [N, D]; in bf16 the weight may be held in fp32, see `to_bf16`."""
    if _is_widened(x):
        return _WidenedLinear.apply(x, weight.float(), bias.float())  # type: ignore[no-any-return,no-untyped-call]
    return functional.linear(x, weight, bias)


def attend(q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
    """Scaled dot-product attention."""
    if _is_widened(q_BHSE):
        wide = functional.scaled_dot_product_attention(q_BHSE.float(), k_BHSE.float(), v_BHSE.float())
        return wide.to(q_BHSE.dtype)
    return functional.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE)


def to_bf16(parameter: Tensor) -> Tensor:
    """A weight rounded to bf16, as a part of the graph: its gradient arrives as fp32.

    Where products go through fp32 the rounded weight is held in fp32, so that it is not converted again in each pass.
    """
    if _goes_through_fp32(parameter.device):
        return _RoundedToBf16.apply(parameter)  # type: ignore[no-any-return,no-untyped-call]
    return parameter.to(torch.bfloat16)


@contextmanager
def bf16_products(*, in_fp32: bool) -> Iterator[None]:
    """Choose within the block how a CPU multiplies bf16 numbers, to compare the ways; outside the processor decides."""
    token = _in_fp32.set(in_fp32)
    try:
        yield
    finally:
        _in_fp32.reset(token)


def _is_widened(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and _goes_through_fp32(x.device)


def _goes_through_fp32(device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    chosen = _in_fp32.get()
    return not _has_bf16_products() if chosen is None else chosen


@cache
def _has_bf16_products() -> bool:
    """Whether torch multiplies bf16 matrices on this CPU by a kernel made for it; it asks the processor, once."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


class _RoundedToBf16(torch.autograd.Function):
    """Rounds to bf16 and keeps fp32; the gradient, which the products have rounded, passes through."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:  # noqa: ARG004  the signature is torch's
        return x.to(torch.bfloat16).float()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        (gradient,) = gradients
        return gradient


class _WidenedLinear(torch.autograd.Function):
    """A linear map of bf16 tokens by bf16 numbers that are held in fp32; every result is rounded to bf16."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x.float(), weight, bias).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        wide = gradients[0].reshape(-1, weight.shape[0]).float()
        needs_x: bool = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        of_x = torch.mm(wide, weight).to(torch.bfloat16).view(x.shape) if needs_x else None
        of_weight = torch.mm(wide.t(), x.reshape(-1, weight.shape[1]).float())
        return of_x, _rounded_(of_weight), _rounded_(wide.sum(0))


def _rounded_(x: Tensor) -> Tensor:
    return x.copy_(x.to(torch.bfloat16))
