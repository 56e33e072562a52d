"""The loading code of the real networks, on small ones of the same classes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from commonweight.components_place import find_components, hub_source
from commonweight.tiny_components import untrained_vae, write_tiny_components
from mmdit.components import (
    CLASSES,
    FOLDERS,
    TextEncoders,
    describe_encoders,
    describe_vae,
    encoders_in,
    library,
    load_encoders,
    load_vae,
)
from mmdit.encoders import EncodersConfig, Padding
from mmdit.half_weights import HalfLinear, halve
from mmdit.network_files import ComponentsMissing, folder_digest
from mmdit.presets import PRESETS
from protocol.errors import CommonweightError, LocalProblem, UsageError

SHAPE = PRESETS["rgb32"]
CAPTIONS = ("a red circle", "two blue squares", "")


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    write_tiny_components(folder, SHAPE, seed=3)
    return folder


def describe(components: Path, padding: Padding = "encoder") -> EncodersConfig:
    return describe_encoders(
        components,
        encoders_in(components),
        token_dim=SHAPE.joint_attention_dim,
        pooled_dim=SHAPE.pooled_projection_dim,
        padding=padding,
        t5_tokens=20,
    )


def test_a_folder_says_which_encoders_it_holds_and_how_wide_they_are(components: Path, tmp_path: Path) -> None:
    config = describe(components)
    assert [(one.name, one.tokens, one.width, one.pooled) for one in config.encoders] == [
        ("clip_l", 77, 32, 128),
        ("clip_g", 77, 32, 128),
        ("t5", 20, 64, 0),
    ]
    shutil.copytree(components / "text_encoder", tmp_path / "text_encoder")
    assert encoders_in(tmp_path) == ()
    with pytest.raises(ComponentsMissing, match="text_encoder and tokenizer are needed"):
        describe_encoders(tmp_path, ["clip_l"], token_dim=64, pooled_dim=256, padding="encoder")


def test_the_same_seed_writes_the_same_networks(components: Path, tmp_path: Path) -> None:
    write_tiny_components(tmp_path / "again", SHAPE, seed=3)
    write_tiny_components(tmp_path / "other", SHAPE, seed=4)
    folders = [place / "text_encoder" for place in (components, tmp_path / "again", tmp_path / "other")]
    first, again, other = (folder_digest(folder) for folder in folders)
    assert first == again != other


def test_text_is_what_the_pipeline_of_diffusers_makes_of_it(components: Path) -> None:
    import torch

    from mmdit.components import library

    pipeline = library("diffusers").StableDiffusion3Pipeline
    transformers = library("transformers")
    config = describe(components)
    encoders = load_encoders(components, config, "cpu")
    loaded = {
        name: getattr(transformers, kind).from_pretrained(components / name)
        for name, kind in (
            ("text_encoder", "CLIPTextModelWithProjection"),
            ("text_encoder_2", "CLIPTextModelWithProjection"),
            ("text_encoder_3", "T5EncoderModel"),
            ("tokenizer", "AutoTokenizer"),
            ("tokenizer_2", "AutoTokenizer"),
            ("tokenizer_3", "AutoTokenizer"),
        )
    }
    whole = pipeline(transformer=None, scheduler=None, vae=None, **loaded)
    with torch.inference_mode():
        theirs, _, pooled, _ = whole.encode_prompt(
            list(CAPTIONS), None, None, do_classifier_free_guidance=False, max_sequence_length=20, device="cpu"
        )
    ours, ours_pooled = config.layout.assemble(encoders.encode(CAPTIONS))
    assert ours.shape == tuple(theirs.shape) == (3, 97, 64)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=4e-3)  # ours are rounded to half precision
    np.testing.assert_allclose(ours_pooled, pooled.numpy(), atol=4e-3)


def parameter_bytes(encoders: TextEncoders) -> int:
    networks = [network for _, network in encoders.loaded.values()]
    return sum(tensor.nbytes for network in networks for tensor in cast("Any", network).state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_published_in_half_precision_stay_so_in_memory_and_compute_the_same(
    components: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    halves = tmp_path / "halves"
    shutil.copytree(components, halves)
    transformers = library("transformers")
    for name, (folder, _) in FOLDERS.items():
        network = getattr(transformers, CLASSES[name]).from_pretrained(str(components / folder), dtype=dtype)
        network.to(dtype).save_pretrained(str(halves / folder))
    config = describe(halves)
    found = load_encoders(halves, config, "cpu")
    wide = {
        name: (
            tokenizer,
            getattr(transformers, CLASSES[name]).from_pretrained(str(halves / FOLDERS[name][0]), dtype=torch.float32),
        )
        for name, (tokenizer, _) in found.loaded.items()
    }
    plain = replace(found, loaded={name: (reads, network.eval()) for name, (reads, network) in wide.items()})
    for ours, theirs in zip(found.encode(CAPTIONS), plain.encode(CAPTIONS), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one is not None
            assert other is not None
            assert np.array_equal(one.tokens, other.tokens)
            assert np.array_equal(one.pooled, other.pooled)
    layers = [layer for _, network in wide.values() for layer in network.modules() if type(layer) is torch.nn.Linear]
    assert len(layers) > 12
    saved = parameter_bytes(plain) - parameter_bytes(found)
    assert saved == sum(layer.weight.nbytes for layer in layers) // 2


def test_weights_that_half_precision_would_change_are_kept_as_they_are() -> None:
    layers = [torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)]
    with torch.no_grad():
        layers[0].weight.fill_(1 / 3)
        layers[1].weight.fill_(0.5)
    network = torch.nn.Sequential(*layers)
    x = torch.arange(6.0).reshape(2, 3)
    before = network(x)
    halve(network)
    assert [type(layer) for layer in network] == [torch.nn.Linear, HalfLinear]
    assert torch.equal(network(x), before)


def test_without_padding_a_text_ends_where_its_caption_ends(components: Path) -> None:
    config = describe(components, padding="zeros")
    texts = load_encoders(components, config, "cpu").encode(CAPTIONS)

    def lengths(number: int) -> list[int]:
        return [len(one.tokens) for one in texts[number] if one is not None]

    assert lengths(0) == [12, 12, 13]  # start, ten letters without spaces, end; T5 has spaces and an end
    assert lengths(2) == [2, 2, 1]


def test_other_captions_are_other_numbers(components: Path) -> None:
    config = describe(components)
    encoders = load_encoders(components, config, "cpu")
    red, blue = encoders.encode(["a red circle", "a blue circle"])
    for a, b in zip(red, blue, strict=True):
        assert a is not None
        assert b is not None
        assert np.abs(a.tokens.astype(np.float32) - b.tokens.astype(np.float32)).mean() > 0.1


def test_an_encoder_runs_only_over_the_captions_that_are_wanted_of_it(components: Path) -> None:
    config = describe(components)
    encoders = load_encoders(components, config, "cpu")
    kept = [[True, False, True], [False, False, True]]
    some, whole = encoders.encode(["a red ring", "two hearts"], kept), encoders.encode(["a red ring"])
    assert [[text is not None for text in texts] for texts in some] == kept
    assert some[0][0] is not None
    assert whole[0][0] is not None
    np.testing.assert_array_equal(some[0][0].tokens, whole[0][0].tokens)  # alone in its batch, as it is there
    assert encoders.encode(["a red ring"], [[False] * 3]) == [[None] * 3]


def test_an_encoder_can_be_left_out(components: Path) -> None:
    config = describe(components)
    (texts,) = load_encoders(components, config, "cpu", without=["t5", "clip_g"]).encode(["a red circle"])
    assert [one is None for one in texts] == [False, True, True]


def test_another_network_than_the_runs_is_refused(components: Path, tmp_path: Path) -> None:
    config = describe(components)
    other = tmp_path / "other"
    shutil.copytree(components, other)
    weights = other / "text_encoder_2" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ComponentsMissing, match=r"clip_g .* another network"):
        load_encoders(other, config, "cpu")
    shutil.rmtree(other / "tokenizer_3")
    with pytest.raises(ComponentsMissing, match="tokenizer_3, which the text encoder t5 needs"):
        load_encoders(other, config, "cpu", without=["clip_l", "clip_g"])


def test_pixels_pass_through_the_autoencoder_of_pixel_models(components: Path) -> None:
    space = describe_vae(components, pixel_height=32, pixel_width=32)
    vae = load_vae(components, space, "cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    latents = vae.encode(pictures)
    np.testing.assert_allclose(latents, pictures.transpose(0, 3, 1, 2) / 127.5 - 1, atol=2e-6)
    assert np.array_equal(vae.decode(latents), pictures)


def test_the_autoencoder_of_latent_models_is_eight_times_smaller_and_follows_its_factors(tmp_path: Path) -> None:
    shape = PRESETS["d12"]
    small = tmp_path / "networks"
    untrained_vae(shape.in_channels, 0).save_pretrained(small / "vae")
    space = describe_vae(small, pixel_height=64, pixel_width=48)
    assert (space.channels, space.height, space.width, space.factor, space.pixel_channels) == (16, 8, 6, 8, 3)
    assert (space.scale, space.shift) == (1.5305, 0.0609)
    vae = load_vae(small, space, "cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
    latents = vae.encode(pictures)
    assert latents.shape == (2, 16, 8, 6)
    assert np.array_equal(latents, vae.encode(pictures))
    assert vae.decode(latents).shape == (2, 64, 48, 3)


@pytest.mark.parametrize(
    ("place", "kind", "sentence"),
    [
        ("/no/such/folder", UsageError, "there is no such folder"),
        ("a b/c", UsageError, "nor is it OWNER/NAME"),
        ("somebody/no-such-repository", LocalProblem, "can't be fetched"),
    ],
)
def test_a_place_without_networks_is_refused(
    place: str, kind: type[CommonweightError], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(kind, match=sentence):
        find_components(place)


def test_networks_of_a_hub_are_told_by_their_very_revision_and_a_folder_is_not_told(tmp_path: Path) -> None:
    assert hub_source("somebody/networks@main", Path("cache/snapshots/0123abcd")) == "somebody/networks@0123abcd"
    assert hub_source("somebody/networks", Path("cache/snapshots/0123abcd")) == "somebody/networks@0123abcd"
    assert hub_source(str(tmp_path), tmp_path) == ""
