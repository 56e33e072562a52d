"""The tanh-approximated GELU, made for training on a CPU."""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from mmdit.transforms import under_transform

# 0.5 (1 + tanh(u / 2)) is sigmoid(u), with u = x (_LINE + _CUBE x^2).
_LINE = 2.0 * math.sqrt(2.0 / math.pi)
_CUBE = 0.044715 * _LINE
# Numbers at a time: what the steps hand on to each other stays in the cache.
_CHUNK = 1 << 17


def gelu(x: Tensor) -> Tensor:
    """x times the approximated normal distribution function; the shape stays."""
    if x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled() and not under_transform():
        return _Gelu.apply(x)  # type: ignore[no-any-return,no-untyped-call]
    return functional.gelu(x, approximate="tanh")


class _Gelu(torch.autograd.Function):
    """Keeps the derivative for the backward pass instead of the input, since both follow from one sigmoid.

    torch's kernel computes a tanh in each pass, and a tanh takes three times as long as a sigmoid.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, derivative = torch.empty_like(x), torch.empty_like(x)
        line = torch.tensor(_LINE)
        rooms = torch.empty(3, min(_CHUNK, x.numel()), dtype=torch.float32)
        pieces = (torch.split(tensor.view(-1), _CHUNK) for tensor in (x, y, derivative))
        for piece, y_piece, derivative_piece in zip(*pieces, strict=True):
            u, s, t = rooms[:, : piece.numel()].unbind()
            wide = piece.float()
            torch.addcmul(line, wide, wide, value=_CUBE, out=u).mul_(wide)
            torch.sigmoid(u, out=s)
            torch.mul(wide, s, out=y_piece)
            # x du/dx = 3 u - 2 _LINE x, and the derivative is s + s (1 - s) x du/dx.
            u.sub_(wide, alpha=2.0 * _LINE / 3.0)
            torch.ops.aten.sigmoid_backward(u, s, grad_input=t)
            torch.add(s, t, alpha=3.0, out=derivative_piece)
        ctx.save_for_backward(derivative)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.mul(gradients[0], derivative)
