"""Frozen networks whose weights wait in half precision and are used in fp32: half the memory, and the same numbers.

Text encoders are published in half precision (T5-XXL of Stable Diffusion 3: 9.5 GB, and 19 GB in fp32). A product whose
weights are widened just before it is that of weights that were wide from the beginning, bit for bit.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_HALVES = (torch.float16, torch.bfloat16)


class HalfLinear(nn.Module):
    """A linear layer that keeps its weights in half precision and computes in fp32. For inference."""

    weight = None
    """Some networks ask what type it has, and cast their activations to that."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("narrow", weight)
        self.register_buffer("bias", bias)
        self.narrow: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in] times the weights, plus the bias: [..., out]; both fp32."""
        return functional.linear(x, self.narrow.float(), self.bias)


def halve(network: nn.Module) -> None:
    """Keep a frozen network's linear weights in half precision where that changes none of them, all else in fp32.

    Whether it changes any is looked at, not believed: a file may say fp16, and the library widen some of its tensors.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and (half := _exact_half(layer.weight.detach())) is not None:
                bias = None if layer.bias is None else layer.bias.detach().float()
                setattr(parent, name, HalfLinear(half, bias))
    for module in network.modules():
        if not isinstance(module, HalfLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype in _HALVES:
                    setattr(module, name, buffer.float())


def _exact_half(weight: Tensor) -> Tensor | None:
    if weight.dtype in _HALVES:
        return weight
    for dtype in _HALVES:
        half = weight.to(dtype)
        if torch.equal(half.to(weight.dtype), weight):
            return half
    return None
