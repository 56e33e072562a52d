"""Exported weights, read back by diffusers and by our own reader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from commonweight.cli.main import app
from mmdit.comfyui import PREFIX, from_single_file
from mmdit.export import load_checkpoint
from mmdit.precision import PRECISIONS, Precision
from protocol import layout
from protocol.errors import CheckpointCorrupt, CommonweightError, DirectoryNotEmpty, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(run_directory: Path) -> Path:
    return run_directory / "public" / layout.checkpoint_directory(2)


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])


def _refusal(*arguments: object) -> CommonweightError:
    error = _invoke(*arguments).exception
    assert isinstance(error, CommonweightError), error
    return error


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_diffusers_opens_the_directory_in_every_precision(
    checkpoint: Path, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    import diffusers

    result = _invoke(checkpoint, "-o", tmp_path / "out", "--precision", precision)
    assert result.exit_code == 0, result.output
    model_class: Any = diffusers.SD3Transformer2DModel
    model = model_class.from_pretrained(str(tmp_path / "out"), subfolder="transformer", torch_dtype=dtype)
    expected = load_checkpoint(checkpoint, ema=True).model.state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in expected.items())
    scheduler_class: Any = diffusers.FlowMatchEulerDiscreteScheduler
    assert scheduler_class.from_pretrained(str(tmp_path / "out"), subfolder="scheduler").config.shift == 1.0


def test_the_single_file_holds_the_same_weights_under_comfyuis_names(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    result = _invoke(checkpoint, "-o", out, "--for", "comfyui", "--precision", "fp32", "--raw")
    assert result.exit_code == 0, result.output
    assert "ComfyUI knows only models" in result.output, "this one paints in pixels"
    loaded = load_checkpoint(checkpoint, ema=False)
    found = from_single_file(load_file(out), loaded.config)
    assert all(torch.equal(found[name], tensor) for name, tensor in loaded.model.state_dict().items())
    small = tmp_path / "small.safetensors"
    assert _invoke(checkpoint, "-o", small, "--for", "comfyui", "--precision", "fp8").exit_code == 0
    with safe_open(small, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor(PREFIX + "joint_blocks.0.x_block.attn.qkv.weight").dtype == torch.float8_e4m3fn
        assert file.get_tensor(PREFIX + "final_layer.linear.bias").dtype == torch.bfloat16


def test_nothing_is_overwritten_and_what_no_tool_reads_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    assert isinstance(_refusal(checkpoint, "-o", tmp_path / "there.safetensors", "--for", "comfyui"), DirectoryNotEmpty)
    assert isinstance(_refusal(checkpoint, "-o", tmp_path), DirectoryNotEmpty)
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious"
    for arguments, words in (
        (("-o", tmp_path / "out", "--precision", "fp8"), "reads no fp8"),
        (("-o", tmp_path / "out.bin", "--for", "comfyui"), "does not end in .safetensors"),
        (("-o", tmp_path / "nowhere" / "out"), "no directory"),
    ):
        error = _refusal(checkpoint, *arguments)
        assert isinstance(error, UsageError)
        assert words in error.message


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pictures_can_be_drawn_from_an_export_but_no_second_export(
    checkpoint: Path, tmp_path: Path, precision: Precision
) -> None:
    assert _invoke(checkpoint, "-o", tmp_path / "out", "--precision", precision).exit_code == 0
    result = CliRunner().invoke(
        app, ["sample", str(tmp_path / "out"), "light", "-o", str(tmp_path / "1.png"), "--steps", "1"]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "1.png").exists()
    exported = load_checkpoint(tmp_path / "out", widen=True).model.state_dict()
    for name, tensor in load_checkpoint(checkpoint, ema=True).model.state_dict().items():
        assert torch.equal(exported[name], tensor.to(PRECISIONS[precision]).float())
    if precision != "fp32":
        again = _refusal(tmp_path / "out", "-o", tmp_path / "again")
        assert isinstance(again, UsageError)
        assert "That is an export; give the checkpoint that it was made from." in again.message


def test_weights_that_no_number_of_fp32_stands_for_are_no_export(checkpoint: Path, tmp_path: Path) -> None:
    assert _invoke(checkpoint, "-o", tmp_path / "out").exit_code == 0
    path = tmp_path / "out" / layout.WEIGHTS
    state = load_file(path)
    for dtype, kind in ((torch.float8_e4m3fn, UsageError), (torch.int8, CheckpointCorrupt)):
        save_file({name: tensor.to(dtype) for name, tensor in state.items()}, path)
        refused = CliRunner().invoke(app, ["sample", str(tmp_path / "out"), "light", "-o", str(tmp_path / "1.png")])
        assert isinstance(refused.exception, kind), refused.exception


def test_a_single_file_is_no_checkpoint_to_draw_from(checkpoint: Path, tmp_path: Path) -> None:
    assert _invoke(checkpoint, "-o", tmp_path / "model.safetensors", "--for", "comfyui").exit_code == 0
    for command in (["sample", "CHECKPOINT", "light", "-o", "1.png"], ["export", "CHECKPOINT", "-o", "out"]):
        arguments = [word.replace("CHECKPOINT", str(tmp_path / "model.safetensors")) for word in command]
        refused = CliRunner().invoke(app, arguments).exception
        assert isinstance(refused, UsageError)
        assert "is a file. A single file of weights does not say" in refused.message
