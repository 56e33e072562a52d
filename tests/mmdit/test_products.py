"""bf16 products that go through fp32, against exact ones of the same numbers."""

import pytest
import torch
from torch import Tensor, nn

from mmdit.products import attention, bf16_products, in_fp32, linear, linears, rounded_to_bf16


def _bf16(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


def _layers(dtype: torch.dtype) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(24, width).bfloat16().to(dtype) for width in (24, 24, 40)]


@pytest.mark.parametrize("holder", [torch.float32, torch.bfloat16])
def test_maps_through_fp32_and_their_gradients_are_the_exact_ones_rounded(holder: torch.dtype) -> None:
    layers, exact = _layers(holder), _layers(torch.float64)
    x = _bf16(1, 2, 5, 24).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    gradients = [_bf16(seed, 2, 5, width) for seed, width in ((2, 24), (3, 24), (4, 40))]
    with bf16_products(through_fp32=True):
        found = linears(layers, x)
        torch.autograd.backward(found, gradients)
    expected = [layer(exact_x) for layer in exact]
    torch.autograd.backward(expected, [gradient.double() for gradient in gradients])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert _apart(ours, theirs) < 2**-8
    assert x.grad is not None
    assert exact_x.grad is not None
    assert _apart(x.grad, exact_x.grad) < 2**-8
    for layer, reference in zip(layers, exact, strict=True):
        for (name, parameter), expected_parameter in zip(layer.named_parameters(), reference.parameters(), strict=True):
            assert parameter.grad is not None
            assert expected_parameter.grad is not None
            assert parameter.grad.dtype == holder, name
            assert torch.equal(parameter.grad, parameter.grad.bfloat16().to(holder)), name
            assert _apart(parameter.grad, expected_parameter.grad) < 2**-8, name


def test_both_ways_of_a_bf16_product_agree_and_so_do_weights_held_in_fp32() -> None:
    x, weight, bias = _bf16(0, 3, 7, 32), _bf16(1, 16, 32), _bf16(2, 16)
    with bf16_products(through_fp32=False):
        kernel = linear(x, weight, bias)
    with bf16_products(through_fp32=True):
        narrow, held_in_fp32 = linear(x, weight, bias), linear(x, weight.float(), bias.float())
    assert torch.equal(narrow, held_in_fp32)
    assert _apart(narrow, kernel.double()) < 2**-7


def test_attention_through_fp32_is_the_exact_one_rounded() -> None:
    q, k, v = (_bf16(seed, 2, 3, 9, 8) for seed in range(3))
    with bf16_products(through_fp32=True):
        found = attention(q, k, v, None)
    scores = (q.double() @ k.double().transpose(2, 3) / 8**0.5).softmax(-1)
    assert found.dtype == torch.bfloat16
    assert _apart(found, scores @ v.double()) < 2**-8


@pytest.mark.parametrize("through_fp32", [True, False])
def test_weights_are_rounded_to_bf16_and_their_gradients_stay_fp32(*, through_fp32: bool) -> None:
    weights = [torch.tensor([1.0 + 2**-12, 3.14159]).requires_grad_(), torch.tensor([[2.0**-130]]).requires_grad_()]
    with bf16_products(through_fp32=through_fp32):
        rounded = rounded_to_bf16(weights)
    assert {each.dtype for each in rounded} == {torch.float32 if through_fp32 else torch.bfloat16}
    for weight, each in zip(weights, rounded, strict=True):
        assert torch.equal(each.float(), weight.detach().bfloat16().float())
    # A weight that nothing reads gets no gradient, as it would by itself.
    torch.autograd.backward([(rounded[0].float() * torch.tensor([1.5, -2.0])).sum()])
    assert weights[0].grad is not None
    assert weights[0].grad.dtype == torch.float32
    assert weights[0].grad.tolist() == [1.5, -2.0]
    assert weights[1].grad is None


def test_only_a_cpu_goes_through_fp32_and_the_choice_ends_with_its_block() -> None:
    before = in_fp32(torch.device("cpu"))
    with bf16_products(through_fp32=not before):
        assert in_fp32(torch.device("cpu")) is not before
        assert not in_fp32(torch.device("cuda"))
    assert in_fp32(torch.device("cpu")) is before
