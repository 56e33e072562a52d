import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdit.initial import initial_weights
from mmdit.layers import position_table
from mmdit.transformer import Array, MMDiT, build, trainable_schema
from tests.mmdit.shapes import SMALL


def _normal(name: str, count: int) -> Array:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


def test_initial_weights_are_a_function_of_the_numbers_given() -> None:
    first, second = initial_weights(SMALL, _normal), initial_weights(SMALL, _normal)
    assert first.keys() == {"pos_embed.pos_embed", *dict(trainable_schema(SMALL))}
    assert all(np.array_equal(first[name], second[name]) for name in first)
    other = initial_weights(SMALL, lambda name, count: -_normal(name, count))
    assert np.array_equal(other["context_embedder.weight"], -first["context_embedder.weight"])


def test_every_tensor_asks_for_its_own_numbers_once_in_the_order_of_names() -> None:
    asked: list[str] = []

    def record(name: str, count: int) -> Array:
        asked.append(name)
        return _normal(name, count)

    weights = initial_weights(SMALL, record)
    assert asked == sorted(set(asked))
    assert {name for name in asked if not weights[name].std() > 0} == set()


def test_a_fresh_model_says_nothing_and_its_blocks_change_nothing() -> None:
    config = replace(SMALL, dual_attention_layers=(1,))
    model = build(config, initial_weights(config, _normal), device="cpu")
    x, text = torch.randn(2, 64, 64), torch.randn(2, 5, 64)
    with torch.no_grad():
        out = model(torch.randn(2, 4, 16, 16), torch.randn(2, 5, 40), torch.randn(2, 24), torch.tensor([10.0, 900.0]))
        x_after, text_after = model.transformer_blocks[1](x, text, torch.randn(2, 64))
    assert not out.any()
    assert torch.equal(x_after, x)
    assert torch.equal(text_after, text)


def test_the_bias_of_the_text_stream_is_large_enough_for_a_layer_norm() -> None:
    bias = initial_weights(SMALL, _normal)["context_embedder.bias"]
    assert bias.std() == pytest.approx(2**-4, rel=0.3)
    assert bias.var() > 1000 * 1e-6  # the epsilon of the layer norm behind it


def test_maps_have_xaviers_scale_and_the_other_biases_are_zero() -> None:
    weights = initial_weights(SMALL, _normal)
    widen = weights["transformer_blocks.0.ff.net.0.proj.weight"]
    assert widen.std() == pytest.approx((2 / (64 + 256)) ** 0.5, rel=0.02)
    patches = weights["pos_embed.proj.weight"]
    assert patches.shape == (64, 4, 2, 2)
    assert patches.std() == pytest.approx((2 / (64 + 16)) ** 0.5, rel=0.1)
    assert not any(
        weights[name].any() for name in weights if name.endswith(".bias") and name != "context_embedder.bias"
    )
    assert np.all(weights["transformer_blocks.0.attn.norm_added_k.weight"] == 1)
    assert np.array_equal(weights["pos_embed.pos_embed"], position_table(SMALL))


def test_numbers_of_the_wrong_kind_are_refused_by_the_tensors_name() -> None:
    with pytest.raises(ValueError, match=r"context_embedder\.bias needs 64 float32"):
        initial_weights(SMALL, lambda name, count: np.zeros(count - 1, dtype=np.float32))


def test_a_built_model_holds_copies_of_the_weights_and_trains_all_but_the_table() -> None:
    weights = initial_weights(SMALL, _normal)
    model = build(SMALL, weights, device="cpu")
    state = model.state_dict()
    assert all(np.array_equal(state[name].numpy(), weights[name]) for name in weights)
    with torch.no_grad():
        model.context_embedder.weight.zero_()
    assert weights["context_embedder.weight"].any()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == dict(trainable_schema(SMALL)).keys()


def test_weights_of_another_model_are_refused_by_name() -> None:
    weights = initial_weights(SMALL, _normal)
    with pytest.raises(ValueError, match="proj_out"):
        build(SMALL, {name: array for name, array in weights.items() if name != "proj_out.bias"}, device="cpu")
    with pytest.raises(ValueError, match=r"proj_out\.bias is float32 \(7,\), the model needs float32 \(16,\)"):
        build(SMALL, {**weights, "proj_out.bias": np.zeros(7, dtype=np.float32)}, device="cpu")
    with pytest.raises(ValueError, match=r"proj_out\.bias is float64"):
        build(SMALL, {**weights, "proj_out.bias": np.zeros(16)}, device="cpu")  # type: ignore[dict-item]


def test_a_latent_that_does_not_fit_is_refused_with_both_sizes() -> None:
    model = MMDiT(SMALL)
    text, pooled, timestep = torch.zeros(1, 2, 40), torch.zeros(1, 24), torch.zeros(1)
    with pytest.raises(ValueError, match="15 x 16 cannot be cut into patches of 2 x 2"):
        model(torch.zeros(1, 4, 15, 16), text, pooled, timestep)
    with pytest.raises(ValueError, match="13 x 8 patches, more than pos_embed_max_size 12"):
        model(torch.zeros(1, 4, 26, 16), text, pooled, timestep)
