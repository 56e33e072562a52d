"""GELU, which has a backward pass of its own, against torch's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmdit.gelu import gelu


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _torch_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def _results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype)))


@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (2, 3, 40_000)], ids=["small", "one number", "several chunks"])
def test_gelu_and_its_gradient_are_torchs(shape: tuple[int, ...]) -> None:
    x, gradient = 3 * _normal(0, *shape), _normal(1, *shape)
    found = _results(gelu, (x,), gradient)
    expected = _results(_torch_gelu, (x.double(),), gradient.double())
    assert all(_apart(a, b) < 2e-6 for a, b in zip(found, expected, strict=True))


def test_gelu_of_large_numbers_is_the_number_or_nothing() -> None:
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])
    y, gradient = _results(gelu, (x,), torch.ones(5))
    assert y.tolist() == [0.0, 0.0, 0.0, 30.0, 1e4]
    assert gradient.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_gelu_takes_a_tensor_whose_numbers_do_not_lie_in_order() -> None:
    x, gradient = _normal(0, 6, 5).t(), _normal(1, 5, 6)
    found, expected = _results(gelu, (x,), gradient), _results(_torch_gelu, (x,), gradient)
    assert all(_apart(a, b) < 2e-6 for a, b in zip(found, expected, strict=True))


def test_in_bf16_it_is_rounded_once_from_fp32_and_so_is_its_gradient() -> None:
    x, gradient = _normal(0, 4, 6, 16).bfloat16(), _normal(2, 4, 6, 16).bfloat16()
    found = _results(gelu, (x,), gradient)
    expected = _results(_torch_gelu, (x.double(),), gradient.double())
    assert [each.dtype for each in found] == [torch.bfloat16] * 2
    assert all(_apart(a, b) < 2**-7 for a, b in zip(found, expected, strict=True))
