import json
from dataclasses import replace

import pytest

from mmdit.config import MMDiTConfig
from mmdit.presets import PRESETS
from mmdit.transformer import trainable_schema
from tests.mmdit.shapes import SMALL


@pytest.mark.parametrize("config", [*PRESETS.values(), replace(SMALL, qk_norm=None, dual_attention_layers=(0, 2))])
def test_a_config_survives_the_way_through_config_json(config: MMDiTConfig) -> None:
    assert MMDiTConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


def test_the_first_stable_diffusion_3_config_without_the_later_keys_is_read() -> None:
    values = SMALL.to_diffusers()
    del values["qk_norm"], values["dual_attention_layers"]
    assert MMDiTConfig.from_diffusers(values) == replace(SMALL, qk_norm=None, dual_attention_layers=())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caption_projection_dim": 63}, ["63", "4 x 16 = 64"]),
        ({"sample_size": 15}, ["15", "patch_size 2"]),
        ({"sample_size": 26}, ["13 patches", "pos_embed_max_size 12"]),
        ({"dual_attention_layers": (3,)}, ["layer 3", "num_layers is 3"]),
        ({"dual_attention_layers": (1, 0)}, ["ascending"]),
        ({"dual_attention_layers": [0]}, ["tuple"]),
        ({"num_layers": 0}, ["num_layers is 0", "between 1 and"]),
        ({"num_layers": 10**9}, ["num_layers is 1000000000"]),
        ({"num_layers": 2.0}, ["num_layers", "whole number"]),
        ({"num_layers": True}, ["num_layers", "whole number"]),
        ({"qk_norm": "layer_norm"}, ["layer_norm", "rms_norm"]),
        (
            {"num_attention_heads": 1, "attention_head_dim": 30, "caption_projection_dim": 30},
            ["1 x 30", "multiple of 4"],
        ),
    ],
)
def test_values_that_do_not_fit_are_refused_with_both_named(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        replace(SMALL, **changes)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "'FluxTransformer2DModel'"),
        ({"num_experts": 8}, "not know: num_experts"),
        ({"num_layers": "3"}, "num_layers must be a whole number"),
        ({"dual_attention_layers": "0"}, "tuple of whole numbers"),
    ],
)
def test_a_config_json_of_something_else_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDiTConfig.from_diffusers({**SMALL.to_diffusers(), **changes})


def test_a_config_json_with_a_key_missing_is_refused_by_name() -> None:
    values = SMALL.to_diffusers()
    del values["patch_size"]
    with pytest.raises(ValueError, match="lacks patch_size"):
        MMDiTConfig.from_diffusers(values)


def _parameters(config: MMDiTConfig) -> int:
    total = 0
    for _, shape in trainable_schema(config):
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


@pytest.mark.parametrize(
    ("name", "billions"),
    [("d12", 0.255), ("d15", 0.496), ("d18", 0.856), ("d24", 2.028), ("d30", 3.962), ("d38", 8.057)],
)
def test_presets_have_the_published_size_and_keep_comfyuis_rule(name: str, billions: float) -> None:
    config = PRESETS[name]
    assert round(_parameters(config) / 1e9, 3) == billions
    assert config.num_layers == config.num_attention_heads == int(name[1:])
    assert (config.attention_head_dim, config.in_channels, config.hidden_size) == (64, 16, 64 * config.num_layers)


def test_stable_diffusion_3_5_medium_has_its_published_size() -> None:
    medium = replace(PRESETS["d24-dual"], sample_size=128, pos_embed_max_size=384)
    assert round(_parameters(medium) / 1e9, 3) == 2.243


def test_the_digits_preset_is_small_enough_for_a_demonstration() -> None:
    assert 0.3e6 < _parameters(PRESETS["digits"]) < 0.65e6
