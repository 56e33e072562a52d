"""Our transformer against diffusers' own, with the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit.conditioning import ConditioningConfig
from mmdit.config import MMDiTConfig
from mmdit.export import WEIGHTS_PATH, load_checkpoint, write_description
from mmdit.layers import position_table
from mmdit.presets import PRESETS
from mmdit.sample import euler_sigmas
from mmdit.space import PixelSpace
from mmdit.transformer import MMDiT, trainable_schema
from tests.mmdit.shapes import SMALL

# diffusers and what it imports warn about their own use of older interfaces.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

_CASES = {
    "query and key norm": (SMALL, (16, 16), 7),
    "no query and key norm": (replace(SMALL, qk_norm=None), (16, 16), 7),
    "dual attention": (replace(SMALL, dual_attention_layers=(0, 1)), (16, 16), 7),
    "dual attention without norm, last layer too": (
        replace(SMALL, qk_norm=None, dual_attention_layers=(0, 2)),
        (16, 16),
        7,
    ),
    "wide latent": (SMALL, (8, 24), 5),
    "tall latent of odd grid": (SMALL, (22, 6), 5),
    "one layer": (replace(SMALL, num_layers=1), (16, 16), 3),
    "patch of one, more channels out": (
        replace(SMALL, patch_size=1, sample_size=4, out_channels=7, pos_embed_max_size=5),
        (4, 5),
        2,
    ),
    "digits preset": (PRESETS["digits"], (8, 8), 6),
}


def _diffusers() -> Any:  # it has no types
    import diffusers

    return diffusers


def _reference(config: MMDiTConfig) -> nn.Module:
    SD3Transformer2DModel = _diffusers().SD3Transformer2DModel

    values = {key: value for key, value in config.to_diffusers().items() if not key.startswith("_")}
    model = SD3Transformer2DModel(**values)
    assert isinstance(model, nn.Module)
    return model


def _inputs(config: MMDiTConfig, size: tuple[int, int], tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, config.in_channels, *size, generator=generator),
        torch.randn(3, tokens, config.joint_attention_dim, generator=generator),
        torch.randn(3, config.pooled_projection_dim, generator=generator),
        torch.tensor([0.0, 371.25, 1000.0]),
    )


def _run_reference(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    latent, text, pooled, timestep = inputs
    (velocity,) = model(
        hidden_states=latent,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=timestep,
        return_dict=False,
    )
    assert isinstance(velocity, Tensor)
    return velocity


def _pair(config: MMDiTConfig) -> tuple[MMDiT, nn.Module]:
    """Both models with the same random weights, none of them at a special value."""
    torch.manual_seed(0)
    ours, theirs = MMDiT(config), _reference(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("case", _CASES)
def test_outputs_and_all_gradients_agree_with_diffusers(case: str) -> None:
    config, size, tokens = _CASES[case]
    ours, theirs = _pair(config)
    inputs = _inputs(config, size, tokens)
    ours_out, theirs_out = ours(*inputs), _run_reference(theirs, inputs)
    assert ours_out.shape == (3, config.out_channels, *size)
    assert _relative_difference(ours_out, theirs_out) < 1e-5

    weighting = torch.randn(ours_out.shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward(ours_out, weighting)
    torch.autograd.backward(theirs_out, weighting)
    theirs_gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = theirs_gradients[name].grad
        assert parameter.grad is not None
        assert expected is not None
        # A key's bias adds one number to all of a query's scores, which changes nothing: without a norm in between its
        # gradient is rounding noise, and is held against that of the weights beside it.
        noise = config.qk_norm is None and name.endswith((".to_k.bias", ".add_k_proj.bias"))
        beside = theirs_gradients[name.replace(".bias", ".weight")].grad if noise else expected
        assert beside is not None
        # In the last block nothing reads the text's queries: both gradients are exactly zero there.
        assert float((parameter.grad - expected).abs().max()) <= 1e-5 * float(beside.abs().max()), name


@pytest.mark.parametrize("says", [(9, 0, 4), (0, 0, 0), (20, 3, 3)], ids=["three lengths", "nothing", "one that fills"])
@pytest.mark.parametrize("dual", [(), (0, 1)])
def test_text_with_rows_of_zeros_gives_diffusers_outputs_and_gradients(
    says: tuple[int, ...], dual: tuple[int, ...]
) -> None:
    config = replace(SMALL, dual_attention_layers=dual)
    ours, theirs = _pair(config)
    latent, text, pooled, timestep = _inputs(config, (16, 16), 20)
    for row, count in enumerate(says):
        # Not only at the end: an encoder that was dropped leaves a gap before the next one's rows.
        text[row, 2 : 2 + 20 - count] = 0
        text[row, :2] = text[row, :2] if count > 2 else 0
    ours_out = ours(latent, text, pooled, timestep)
    theirs_out = _run_reference(theirs, (latent, text, pooled, timestep))
    assert _relative_difference(ours_out, theirs_out) < 1e-5
    for out in (ours_out, theirs_out):
        torch.autograd.backward(out, torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    theirs_gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = theirs_gradients[name].grad
        assert parameter.grad is not None
        assert expected is not None
        assert float((parameter.grad - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), name


@pytest.mark.parametrize("case", _CASES)
def test_state_dict_has_the_same_keys_and_shapes_as_diffusers(case: str) -> None:
    config = _CASES[case][0]
    ours = {name: tensor.shape for name, tensor in MMDiT(config, device="meta").state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in _reference(config).state_dict().items()}
    assert ours == theirs


def test_the_schema_lists_diffusers_parameters_sorted_and_without_the_position_table() -> None:
    expected = sorted((name, tuple(p.shape)) for name, p in _reference(SMALL).named_parameters())
    assert list(trainable_schema(SMALL)) == expected
    assert "pos_embed.pos_embed" not in dict(expected)


@pytest.mark.parametrize(("sample_size", "largest"), [(16, 12), (16, 8), (32, 48), (10, 7)])
def test_the_position_table_is_diffusers_table(sample_size: int, largest: int) -> None:
    config = replace(SMALL, sample_size=sample_size, pos_embed_max_size=largest)
    theirs = _reference(config).state_dict()["pos_embed.pos_embed"]
    assert torch.from_numpy(position_table(config)).allclose(theirs, rtol=0, atol=1e-7)


def test_an_exported_directory_loads_in_diffusers_and_gives_the_same_output(tmp_path: Path) -> None:
    config = PRESETS["digits"]
    torch.manual_seed(3)
    model = MMDiT(config)
    write_description(
        tmp_path,
        config=config,
        conditioning=ConditioningConfig(kind="byte-patch", max_tokens=6, token_dim=64, pooled_dim=64),
        space=PixelSpace(channels=1, height=8, width=8, shift=-1.0, scale=2.0),
    )
    save_file(model.state_dict(), tmp_path / WEIGHTS_PATH, metadata={"format": "pt"})
    inputs = _inputs(config, (8, 8), 6)

    theirs = _diffusers().SD3Transformer2DModel.from_pretrained(
        tmp_path, subfolder="transformer", low_cpu_mem_usage=False
    )
    ours = load_checkpoint(tmp_path)
    assert ours.config == config
    with torch.no_grad():
        expected = model(*inputs)
        assert torch.equal(ours.model(*inputs), expected)
        assert _relative_difference(_run_reference(theirs, inputs), expected) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_the_samplers_times_are_those_of_diffusers_scheduler(tmp_path: Path, shift: float, steps: int) -> None:
    write_description(
        tmp_path,
        config=PRESETS["digits"],
        conditioning=ConditioningConfig(kind="byte-patch", max_tokens=6, token_dim=64, pooled_dim=64),
        space=PixelSpace(channels=1, height=8, width=8, shift=-1.0, scale=2.0),
        shift=shift,
    )
    scheduler = _diffusers().FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.shift == shift
    scheduler.set_timesteps(steps)
    assert list(euler_sigmas(steps, shift)) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
