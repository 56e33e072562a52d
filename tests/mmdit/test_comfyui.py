"""The single file against diffusers' own reader of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdit.comfyui import PREFIX, from_single_file, is_known_to_comfyui, to_single_file
from mmdit.config import MMDiTConfig
from mmdit.presets import PRESETS
from mmdit.transformer import MMDiT
from tests.mmdit.shapes import SMALL

_SHAPES = {
    "plain": SMALL,
    "no query and key norm": replace(SMALL, qk_norm=None),
    "dual attention": replace(SMALL, dual_attention_layers=(0, 1)),
    "one layer": replace(SMALL, num_layers=1),
}


def _state(config: MMDiTConfig) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(tensor) for name, tensor in MMDiT(config).state_dict().items()}


@pytest.mark.parametrize("config", _SHAPES.values(), ids=_SHAPES.keys())
def test_to_a_single_file_and_back_gives_every_number_again(config: MMDiTConfig) -> None:
    state = _state(config)
    single = to_single_file(state, config)
    assert all(name.startswith(PREFIX) for name in single)
    assert sum(tensor.numel() for tensor in single.values()) == sum(tensor.numel() for tensor in state.values())
    again = from_single_file(single | {"first_stage_model.encoder.weight": torch.zeros(3)}, config)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("config", _SHAPES.values(), ids=_SHAPES.keys())
def test_diffusers_reads_the_same_weights_from_the_single_file(config: MMDiTConfig, tmp_path: Path) -> None:
    import diffusers

    model_class: Any = diffusers.SD3Transformer2DModel
    values = {key: value for key, value in config.to_diffusers().items() if not key.startswith("_")}
    reference = model_class(**values)
    reference.save_config(tmp_path / "transformer")
    state = _state(config)
    save_file(to_single_file(state, config), tmp_path / "single.safetensors")
    read = model_class.from_single_file(
        str(tmp_path / "single.safetensors"), config=str(tmp_path), subfolder="transformer"
    )
    found = read.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_missing_and_an_unknown_tensor_are_named() -> None:
    single = to_single_file(_state(SMALL), SMALL)
    name = PREFIX + "final_layer.linear.bias"
    with pytest.raises(ValueError, match=r"^final_layer\.linear\.bias is missing"):
        from_single_file({key: value for key, value in single.items() if key != name}, SMALL)
    with pytest.raises(ValueError, match=r"^extra is no tensor of this model"):
        from_single_file(single | {PREFIX + "extra": torch.zeros(1)}, SMALL)
    with pytest.raises(ValueError, match="is missing"):
        to_single_file({}, SMALL)


def test_comfyui_knows_the_large_presets_and_not_those_that_paint_in_pixels() -> None:
    assert {name for name, config in PRESETS.items() if is_known_to_comfyui(config)} == {
        name for name in PRESETS if name.startswith("d") and name != "digits"
    }
