"""Linear maps and attention in bf16, also where the processor has no instructions for them.

A processor without such instructions gets bf16 products slowly from torch: on AVX2 a forward product takes nine times
as long as in fp32, a backward one up to a hundred times. There the same numbers go through the fp32 product instead. A
product of two bf16 numbers is exact in fp32, and both ways sum in fp32 and round the result to bf16, so that little but
the order of the sums differs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from mmdit.transforms import under_transform

_chosen: ContextVar[bool | None] = ContextVar("_chosen", default=None)


def linears(layers: Sequence[nn.Linear], x: Tensor) -> tuple[Tensor, ...]:
    """Several layers' maps of the same tokens [..., D], without the module calls, whose bookkeeping shows."""
    if _goes_through_fp32(x):
        return _widened(x, *(tensor for layer in layers for tensor in (layer.weight, layer.bias)))
    return tuple(functional.linear(x, layer.weight, layer.bias) for layer in layers)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One map of tokens [..., D] by a weight [N, D] and a bias [N]."""
    return _widened(x, weight, bias)[0] if _goes_through_fp32(x) else functional.linear(x, weight, bias)


def attention(q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention; [B, heads, tokens, head width]. An fp32 mask is added to the scores."""
    if _goes_through_fp32(q_BHSE):
        wide = functional.scaled_dot_product_attention(q_BHSE.float(), k_BHSE.float(), v_BHSE.float(), mask)
        return wide.to(q_BHSE.dtype)
    return functional.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, mask)


def rounded_to_bf16(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The fp32 weights rounded to bf16, as a part of the graph: their gradients arrive as fp32.

    Where products go through fp32 the rounded weights are held in fp32, so that no pass converts them again.
    """
    if not in_fp32(weights[0].device):
        return [weight.to(torch.bfloat16) for weight in weights]
    rounded: tuple[Tensor, ...] = _Rounded.apply(*weights)  # type: ignore[no-untyped-call]
    return rounded


@contextmanager
def bf16_products(*, through_fp32: bool) -> Iterator[None]:
    """Choose within the block how the CPU multiplies bf16 numbers, to compare both ways; else the processor decides."""
    token = _chosen.set(through_fp32)
    try:
        yield
    finally:
        _chosen.reset(token)


def in_fp32(device: torch.device) -> bool:
    """Whether bf16 products go through fp32 on this device."""
    if device.type != "cpu" or under_transform():
        return False
    chosen = _chosen.get()
    return not _has_bf16_products() if chosen is None else chosen


def _goes_through_fp32(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and in_fp32(x.device)


@cache
def _has_bf16_products() -> bool:
    # What torch itself asks before it hands a bf16 product to oneDNN. Without the question the answer is no, which
    # costs speed at most.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


class _Rounded(torch.autograd.Function):
    """Rounds to bf16 and keeps fp32; gradients pass through as they are. One node for all weights of a model."""

    @staticmethod
    def forward(ctx: FunctionCtx, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(value=False)
        return tuple(weight.to(torch.bfloat16).float() for weight in weights)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return gradients


def _widened(x: Tensor, *weights_and_biases: Tensor) -> tuple[Tensor, ...]:
    maps: tuple[Tensor, ...] = _WidenedLinears.apply(x, *weights_and_biases)  # type: ignore[no-untyped-call]
    return maps


class _WidenedLinears(torch.autograd.Function):
    """Linear maps of the same bf16 tokens, by bf16 numbers whether held in bf16 or in fp32; the bias follows a weight.

    Every result is rounded to bf16, the gradients of weights too, though they are handed on in what holds the weight.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *weights_and_biases: Tensor) -> tuple[Tensor, ...]:
        weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
        ctx.save_for_backward(x, *weights)
        wide = x.float()
        pairs = zip(weights, biases, strict=True)
        return tuple(functional.linear(wide, weight.float(), bias.float()).to(x.dtype) for weight, bias in pairs)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors  # type: ignore[attr-defined]
        wide = x.flatten(0, -2).float()
        flat = [gradient.flatten(0, -2).float() for gradient in gradients]
        of_x: Tensor | None = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            of_x = torch.mm(flat[0], weights[0].float())
            for gradient, weight in zip(flat[1:], weights[1:], strict=True):
                of_x.addmm_(gradient, weight.float())
            of_x = of_x.to(x.dtype).view(x.shape)
        of_layers: list[Tensor] = []
        for gradient, weight in zip(flat, weights, strict=True):
            of_layers += (_rounded(torch.mm(gradient.t(), wide), weight), _rounded(gradient.sum(0), weight))
        return (of_x, *of_layers)


def _rounded(x: Tensor, holder: Tensor) -> Tensor:
    narrow = x.to(torch.bfloat16)
    return narrow if holder.dtype == torch.bfloat16 else x.copy_(narrow)
