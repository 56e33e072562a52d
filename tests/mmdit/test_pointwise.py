"""The operations that have a backward pass of their own, against torch's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmdit.pointwise import gelu, rms_norm

_EPS = 1e-6


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


@pytest.mark.parametrize("shape", [(2, 3, 4, 16), (1, 1, 1, 8)])
def test_rms_norm_and_its_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    x, weight, gradient = _normal(0, *shape), 1 + 0.3 * _normal(1, shape[-1]), _normal(2, *shape)
    found = _results(lambda x, w: rms_norm(x, w, _EPS), (x, weight), gradient)
    expected = _results(
        lambda x, w: functional.rms_norm(x, w.shape, w, _EPS), (x.double(), weight.double()), gradient.double()
    )
    assert all(_apart(a, b) < 2e-6 for a, b in zip(found, expected, strict=True))


def test_rms_norm_of_zeros_has_finite_gradients() -> None:
    found = _results(lambda x, w: rms_norm(x, w, _EPS), (torch.zeros(2, 8), torch.zeros(8)), torch.ones(2, 8))
    assert all(bool(torch.isfinite(each).all()) for each in found)


@pytest.mark.parametrize("holder", [torch.float32, torch.bfloat16])
def test_in_bf16_both_are_rounded_once_from_fp32(holder: torch.dtype) -> None:
    x, weight, gradient = _normal(0, 4, 6, 16).bfloat16(), _normal(1, 16).bfloat16(), _normal(2, 4, 6, 16).bfloat16()
    for function, reference, inputs in (
        (gelu, _torch_gelu, (x,)),
        (
            lambda x, w: rms_norm(x, w, _EPS),
            lambda x, w: functional.rms_norm(x, w.shape, w, _EPS),
            (x, weight.to(holder)),
        ),
    ):
        found = _results(function, inputs, gradient)
        expected = _results(reference, tuple(each.double() for each in inputs), gradient.double())
        assert found[0].dtype == torch.bfloat16
        assert [each.dtype for each in found[1:]] == [each.dtype for each in inputs]
        assert all(_apart(a, b) < 2**-8 for a, b in zip(found, expected, strict=True))


def test_rms_norm_takes_tensors_whose_numbers_do_not_lie_in_order() -> None:
    # Other attention kernels give gradients whose heads lie before their tokens.
    x, weight = _normal(0, 2, 3, 5, 8).transpose(1, 2), _normal(1, 8)
    gradient = _normal(2, 2, 3, 5, 8).transpose(1, 2)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    found = torch.autograd.grad(rms_norm(x, weight, _EPS), leaves, gradient)
    expected = torch.autograd.grad(functional.rms_norm(x, (8,), weight, _EPS), leaves, gradient)
    assert all(_apart(a, b) < 2e-6 for a, b in zip(found, expected, strict=True))
