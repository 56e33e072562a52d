"""Folders of networks as strangers may make them: what is loaded is what the digest covers, and nothing is run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commonweight.tiny_components import write_tiny_components
from mmdit.components import describe_encoders, describe_vae, encoders_in, load_encoders, load_vae
from mmdit.encoders import EncodersConfig
from mmdit.network_files import ComponentsMissing, folder_digest
from mmdit.presets import PRESETS

SHAPE = PRESETS["rgb16"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    write_tiny_components(folder, SHAPE, seed=3)
    return folder


@pytest.fixture
def place(networks: Path, tmp_path: Path) -> Path:
    shutil.copytree(networks, tmp_path / "networks")
    return tmp_path / "networks"


def describe(place: Path) -> EncodersConfig:
    return describe_encoders(
        place,
        encoders_in(place),
        token_dim=SHAPE.joint_attention_dim,
        pooled_dim=SHAPE.pooled_projection_dim,
        padding="encoder",
        t5_tokens=8,
    )


def load(place: Path) -> None:
    load_encoders(place, describe(place), "cpu")


def changed(path: Path, **members: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


def drop(path: Path, tensor: str) -> None:
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path, {"format": "pt"})


def point_at(folder: Path, name: str) -> None:
    """Let an index name other weights than those beside it."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / name) if ".." not in name else (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda clip: drop(clip / WEIGHTS, "text_projection.weight"), "text_projection.weight is missing"),
        (lambda clip: changed(clip / "config.json", num_hidden_layers=9), "is missing"),
        (lambda clip: point_at(clip, "w.fp16.safetensors"), "no .safetensors file beside it"),
        (lambda clip: point_at(clip, "../../w.safetensors"), "no .safetensors file beside it"),
        (lambda clip: point_at(clip, "w.bin"), "no .safetensors file beside it"),
        (lambda clip: (clip / INDEX).write_text("[]"), "is not a JSON object"),
        (lambda clip: (clip / INDEX).write_text("{}"), "no weight_map"),
        (lambda clip: (clip / WEIGHTS).write_bytes((clip / WEIGHTS).read_bytes()[:-9]), "can't be read"),
        (lambda clip: changed(clip / "config.json", auto_map={"AutoModel": "evil.Evil"}), "has auto_map"),
        (lambda clip: changed(clip / "config.json", quantization_config=5), "has quantization_config"),
        (lambda clip: changed(clip / "config.json", attn_implementation="a/kernel"), "has attn_implementation"),
        (lambda clip: changed(clip / "config.json", hidden_act="none"), "can't be loaded"),
        (lambda clip: (clip / "config.json").write_text("[" * 200_000), "can't be read"),
        (lambda clip: (clip / "config.json").write_text("{}"), "is not that of a CLIPTextModelWithProjection"),
    ],
)
def test_a_network_that_is_not_whole_or_not_plain_is_refused(
    place: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(place / "text_encoder")
    with pytest.raises(ComponentsMissing, match=words):
        load(place)


def test_weights_in_several_files_are_all_in_the_digest(place: Path) -> None:
    folder = place / "text_encoder"
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / INDEX).write_text(json.dumps(index))
    load(place)
    before = folder_digest(folder)
    save_file({key: tensors[key] + 1 for key in names[5:]}, folder / "model-2.safetensors", {"format": "pt"})
    assert folder_digest(folder) != before


def test_what_lies_elsewhere_in_the_folder_is_not_looked_at(place: Path) -> None:
    before = folder_digest(place / "text_encoder")
    for name in ("evil.py", "model.fp16.safetensors", "pytorch_model.bin", "sub/config.json"):
        (place / "text_encoder" / name).parent.mkdir(exist_ok=True)
        (place / "text_encoder" / name).write_text("nothing that could be read")
    assert folder_digest(place / "text_encoder") == before
    load(place)


@pytest.mark.parametrize(
    "members",
    [
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}},
        {"tokenizer_class": 5},
        {"pad_token": None},
    ],
)
def test_a_tokenizer_runs_no_code_of_its_folder(
    place: Path, members: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("somebody was asked whether code may be run")

    monkeypatch.setattr("builtins.input", ask)
    changed(place / "tokenizer" / "tokenizer_config.json", **members)
    marker = place / "ran"
    (place / "tokenizer" / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    try:
        load(place)
    except ComponentsMissing:
        pass
    else:
        assert members == {"pad_token": None}  # the tokenizer's own file may have one
    assert not marker.exists()


def test_an_autoencoder_that_is_not_whole_is_refused(place: Path) -> None:
    space = describe_vae(place, pixel_height=16, pixel_width=16)
    load_vae(place, space, "cpu")
    drop(place / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_out.weight")
    with pytest.raises(ComponentsMissing, match="it is another network"):
        load_vae(place, space, "cpu")
    with pytest.raises(ComponentsMissing, match=r"decoder\.conv_out\.weight"):
        load_vae(place, describe_vae(place, pixel_height=16, pixel_width=16), "cpu")
    changed(place / "vae" / "config.json", scaling_factor=10**400)
    with pytest.raises(ComponentsMissing, match="is not that of an AutoencoderKL"):
        describe_vae(place, pixel_height=16, pixel_width=16)


def test_a_caption_that_is_no_unicode_is_refused_in_words(place: Path) -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="a character that Unicode does not have"):
        load_encoders(place, describe(place), "cpu").encode(["a\udcffb"])
