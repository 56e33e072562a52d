"""Exported weights, read back by diffusers and by our own reader."""

import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from commonweight.cli.main import app
from commonweight.model_card import model_card
from commonweight.provenance import Provenance
from mmdit.comfyui import PREFIX, from_single_file
from mmdit.encoders import EncodersConfig, TextEncoder
from mmdit.export import load_checkpoint
from mmdit.precision import PRECISIONS, Precision
from mmdit.space import VaeSpace
from protocol import layout
from protocol.canonical import sha256_hex
from protocol.errors import CheckpointCorrupt, CommonweightError, DirectoryNotEmpty, LocalProblem, UsageError
from tests.verify.examples import RUN, SHARDS, PublishedRun

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
    model = model_class.from_pretrained(str(tmp_path / "out"), subfolder="transformer", dtype=dtype)
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
        (("-o", tmp_path / "out.safetensors", "--for", "diffusers"), "diffusers gets a directory"),
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


def test_a_name_that_ends_in_safetensors_asks_for_a_single_file(checkpoint: Path, tmp_path: Path) -> None:
    assert _invoke(checkpoint, "-o", tmp_path / "model.safetensors", "--precision", "fp8").exit_code == 0
    assert (tmp_path / "model.safetensors").is_file()


def test_an_export_says_which_run_and_checkpoint_it_is_of_and_what_it_was_trained_on(
    published: PublishedRun, checkpoint: Path, tmp_path: Path
) -> None:
    assert _invoke(checkpoint, "-o", tmp_path / "out").exit_code == 0
    assert _invoke(checkpoint, "-o", tmp_path / "raw.safetensors", "--raw").exit_code == 0
    config, shards = published.config, [sha256_hex(content) for content in SHARDS]
    assert [shard.sha256 for shard in config.data.shards] == shards
    expected = {
        "format": "pt",
        "license": "CC0-1.0",
        "commonweight.run": RUN,
        "commonweight.run_name": "tiny",
        "commonweight.checkpoint": "2",
        "commonweight.data": "shades",
        "commonweight.data_source": config.data.source,
        "commonweight.data_license": "CC0-1.0",
        "commonweight.data_root": config.data.root,
        "commonweight.data_shards": " ".join(shards),
    }
    for file, weights in (
        (tmp_path / "out" / layout.WEIGHTS, layout.EMA),
        (tmp_path / "raw.safetensors", layout.WEIGHTS),
    ):
        digest = sha256_hex((checkpoint / weights).read_bytes())
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {
                **expected,
                "commonweight.weights": weights,
                "commonweight.weights_sha256": digest,
            }
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert front.splitlines()[:3] == ["license: cc0-1.0", "library_name: diffusers", "pipeline_tag: text-to-image"]
    assert f'  run: "{RUN}"' in front
    for words in (
        "# tiny, checkpoint 2",
        RUN,
        "shades",
        config.data.root,
        "dtype=torch.bfloat16",
        *shards,
    ):
        assert words in body, words


def test_the_same_checkpoint_is_exported_to_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        assert _invoke(checkpoint, "-o", tmp_path / name).exit_code == 0
        assert _invoke(checkpoint, "-o", tmp_path / f"{name}.safetensors", "--precision", "fp8").exit_code == 0
    files = [path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert len(files) == 5
    for first, second in (
        *((tmp_path / "1" / path, tmp_path / "2" / path) for path in files),
        (tmp_path / "1.safetensors", tmp_path / "2.safetensors"),
    ):
        assert first.read_bytes() == second.read_bytes()


def test_weights_that_the_run_has_not_signed_for_are_not_exported_in_its_name(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    raw = bytearray((copy / layout.EMA).read_bytes())
    raw[-1] ^= 1
    (copy / layout.EMA).write_bytes(raw)
    refused = _refusal(copy, "-o", tmp_path / "out")
    assert isinstance(refused, CheckpointCorrupt)
    assert "does not have the SHA-256" in refused.message
    assert not (tmp_path / "out").exists()
    (copy / layout.MANIFEST).unlink()
    result = _invoke(copy, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "names no run, no licence and no data" in result.output
    assert "license" not in (tmp_path / "out" / "README.md").read_text()


def test_words_of_strangers_stay_words_in_a_model_card(published: PublishedRun) -> None:
    data = replace(published.config.data, name="<script>\n# Title", source="[here](javascript:x)")
    origin = Provenance(
        takedowns_sha256="7a" * 32,
        run_id=RUN,
        run_name="a: b\nlicense: mit",
        checkpoint=1,
        path=layout.WEIGHTS,
        sha256="0" * 64,
        licence='mine"\nlibrary_name: evil',
        data=data,
    )
    _, front, body = model_card(origin, "bf16").split("---\n", 2)
    assert front.splitlines()[:3] == [
        "license: other",
        'license_name: "mine\\" library_name: evil"',
        "library_name: diffusers",
    ]
    assert "<script>" not in body
    assert "[here](" not in body
    assert "\n# Title" not in body


def test_a_card_names_the_networks_of_others_and_how_to_give_them() -> None:
    encoders = EncodersConfig(
        encoders=(TextEncoder(name="clip_l", tokens=77, width=768, pooled=768, sha256="c1" * 32),),
        token_dim=4096,
        pooled_dim=2048,
        padding="encoder",
    )
    vae = VaeSpace(channels=16, height=32, width=32, factor=8, pixel_channels=3, shift=0.0, scale=1.0, sha256="ae" * 32)
    alone = model_card(None, "bf16", encoders=encoders, autoencoder=vae)
    assert 'commonweight sample . "a caption" -o picture.png --components FOLDER\n' in alone
    for words in ("- Text encoder `clip_l`, SHA-256 of its files `c1c1", "- Autoencoder, SHA-256 of its files `aeae"):
        assert words in alone
    whole = model_card(None, "bf16", encoders=encoders, autoencoder=vae, whole=True)
    assert 'commonweight sample . "a caption" -o picture.png\n' in whole
    assert "they are others' work, with licences of their" in whole
    told = model_card(None, "bf16", encoders=replace(encoders, source="somebody/<networks>@1"))
    assert "got from somebody/\\<networks\\>@1." in told
    assert "hands pixels through" in model_card(None, "bf16", encoders=encoders, whole=True)
    assert "others" not in model_card(None, "bf16")


def test_an_export_that_fails_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    # A limit on a file's size stands for a full disk: the weights are the only file that is longer.
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "empty").mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        for name in ("out", "empty", "out.safetensors"):
            assert isinstance(_refusal(checkpoint, "-o", tmp_path / name), LocalProblem)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())
