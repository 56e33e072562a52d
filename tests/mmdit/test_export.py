import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdit.conditioning import ConditioningConfig
from mmdit.export import CONFIG_PATH, DESCRIPTION_PATH, SCHEDULER_PATH, WEIGHTS_PATH, load_checkpoint, write_description
from mmdit.presets import PRESETS
from mmdit.space import PixelSpace
from mmdit.transformer import MMDiT

CONFIG = PRESETS["digits"]
CONDITIONING = ConditioningConfig(kind="byte-patch", max_tokens=6, token_dim=64, pooled_dim=64)
SPACE = PixelSpace(channels=1, height=8, width=8, shift=-1.0, scale=2.0)


def _save(directory: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, directory / WEIGHTS_PATH, metadata={"format": "pt"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_description(tmp_path, config=CONFIG, conditioning=CONDITIONING, space=SPACE, shift=1.5)
    _save(tmp_path, MMDiT(CONFIG).state_dict())
    return tmp_path


def test_a_directory_describes_itself_completely(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    assert (loaded.config, loaded.conditioning, loaded.space, loaded.shift) == (CONFIG, CONDITIONING, SPACE, 1.5)
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_description_is_canonical_json_with_a_format_number(checkpoint: Path) -> None:
    assert (checkpoint / DESCRIPTION_PATH).read_bytes() == (
        b'{"conditioning":{"kind":"byte-patch","max_tokens":6,"pooled_dim":64,"token_dim":64},"format":1,'
        b'"space":{"channels":1,"height":8,"kind":"pixel","scale":2,"shift":-1,"width":8}}'
    )


def test_the_same_arguments_write_the_same_bytes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = tmp_path_factory.mktemp("again")
    write_description(again, config=CONFIG, conditioning=CONDITIONING, space=SPACE, shift=1.5)
    for path in (CONFIG_PATH, SCHEDULER_PATH, DESCRIPTION_PATH):
        assert (again / path).read_bytes() == (checkpoint / path).read_bytes()


@pytest.mark.parametrize(
    ("conditioning", "space", "message"),
    [
        (replace(CONDITIONING, token_dim=80), SPACE, "joint_attention_dim is 64, but token_dim is 80"),
        (replace(CONDITIONING, pooled_dim=32), SPACE, "pooled_projection_dim is 64, but pooled_dim is 32"),
        (CONDITIONING, replace(SPACE, channels=3), "in_channels is 1, but channels is 3"),
        (CONDITIONING, replace(SPACE, height=10), "height 10 does not fit"),
        (CONDITIONING, replace(SPACE, width=7), "width 7 does not fit"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_not_written(
    tmp_path: Path, conditioning: ConditioningConfig, space: PixelSpace, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_description(tmp_path, config=CONFIG, conditioning=conditioning, space=space)
    assert not list(tmp_path.iterdir())


def _edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (DESCRIPTION_PATH, lambda v: v.update(format=2), "format is 2"),
        (DESCRIPTION_PATH, lambda v: v.update(extra=1), "extra"),
        (DESCRIPTION_PATH, lambda v: v["space"].update(kind="wavelets"), "'wavelets'"),
        (DESCRIPTION_PATH, lambda v: v["space"].pop("scale"), "scale"),
        (DESCRIPTION_PATH, lambda v: v["conditioning"].update(kind="clip"), "'clip'"),
        (DESCRIPTION_PATH, lambda v: v.update(space=3), "must be objects"),
        (CONFIG_PATH, lambda v: v.update(num_layers=10**12), "num_layers is 1000000000000"),
        (CONFIG_PATH, lambda v: v.update(joint_attention_dim=80), "but token_dim is 64"),
        (SCHEDULER_PATH, lambda v: v.update(_class_name="DDPMScheduler"), "FlowMatchEulerDiscreteScheduler"),
        (SCHEDULER_PATH, lambda v: v.update(shift="big"), "shift is 'big'"),
    ],
)
def test_a_changed_description_is_refused(
    checkpoint: Path, path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    _edit(checkpoint / path, change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (1 << 20) + b"{}"])
def test_a_description_that_is_not_a_small_json_object_is_refused_by_name(checkpoint: Path, content: bytes) -> None:
    (checkpoint / DESCRIPTION_PATH).write_bytes(content)
    with pytest.raises(ValueError, match=r"commonweight\.json"):
        load_checkpoint(checkpoint)


def test_a_missing_file_is_refused_by_name(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS_PATH).unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        load_checkpoint(checkpoint)
    (checkpoint / SCHEDULER_PATH).unlink()
    with pytest.raises(ValueError, match=r"scheduler_config\.json"):
        load_checkpoint(checkpoint)


def test_weights_must_be_exactly_the_models_in_full_precision(checkpoint: Path) -> None:
    state = MMDiT(CONFIG).state_dict()
    _save(checkpoint, {**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="extra"):
        load_checkpoint(checkpoint)
    _save(checkpoint, {name: tensor for name, tensor in state.items() if name != "proj_out.bias"})
    with pytest.raises(ValueError, match=r"proj_out\.bias"):
        load_checkpoint(checkpoint)
    _save(checkpoint, {**state, "proj_out.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"proj_out\.bias"):
        load_checkpoint(checkpoint)
    _save(checkpoint, {**state, "proj_out.bias": torch.zeros(4, dtype=torch.float16)})
    with pytest.raises(ValueError, match="float16"):
        load_checkpoint(checkpoint)
    (checkpoint / WEIGHTS_PATH).write_bytes(b"\x80\x04not a tensor file")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_checkpoint(checkpoint)
