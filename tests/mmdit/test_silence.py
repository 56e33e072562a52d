"""Rows of zeros in the text, computed once instead of many times."""

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit.silence import merge_silence, on_the_keys
from mmdit.transformer import MMDiT
from tests.mmdit.shapes import SMALL


def _text(*spoken: int, length: int) -> torch.Tensor:
    text = torch.arange(1.0, 1 + len(spoken) * length * 3).view(len(spoken), length, 3)
    for row, count in enumerate(spoken):
        text[row, : length - count] = 0  # what is said stands last, so that it has to be moved
    return text


def test_what_is_said_comes_first_and_one_row_of_zeros_stands_for_all() -> None:
    text = _text(3, 1, length=10)
    merged, louder = merge_silence(text)
    assert louder is not None
    assert merged.shape == (2, 4, 3)
    assert torch.equal(merged[0, :3], text[0, 7:])
    assert torch.equal(merged[1, :1], text[1, 9:])
    assert not merged[0, 3:].any()
    assert not merged[1, 1:].any()
    # The second sample has three places for its nine rows of zeros: each counts three times.
    expected = [[0.0, 0.0, 0.0, math.log(7)], [0.0, math.log(3), math.log(3), math.log(3)]]
    assert torch.allclose(louder, torch.tensor(expected))


def test_a_sample_that_says_nothing_keeps_one_row() -> None:
    merged, louder = merge_silence(torch.zeros(1, 8, 3))
    assert louder is not None
    assert merged.shape == (1, 1, 3)
    assert torch.allclose(louder, torch.tensor([[math.log(8)]]))


def test_a_text_with_little_silence_or_none_stays_as_it_is() -> None:
    for text in (_text(10, 2, length=10), _text(7, 1, length=10), torch.zeros(2, 0, 3)):
        merged, louder = merge_silence(text)
        assert merged is text
        assert louder is None


def test_under_vmap_nothing_is_left_out_and_the_model_says_the_same() -> None:
    torch.manual_seed(0)
    model = MMDiT(SMALL)
    latent, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, SMALL.pooled_projection_dim)
    text, timestep = torch.zeros(2, 8, SMALL.joint_attention_dim), torch.tensor([100.0, 900.0])
    # `vmap` does not know the fused kernel of processors.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        together = model(latent, text, pooled, timestep)
        one_by_one = torch.func.vmap(lambda *each: model(*(x[None] for x in each))[0])(latent, text, pooled, timestep)
    assert torch.allclose(together, one_by_one, atol=1e-5)


def test_the_keys_of_the_image_are_left_alone() -> None:
    mask = on_the_keys(torch.tensor([[0.0, 1.5]]), 3)
    assert mask.shape == (1, 1, 1, 5)
    assert mask.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 1.5]
