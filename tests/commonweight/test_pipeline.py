"""From pictures and captions to a pipeline of diffusers that draws from a prompt, by way of a run's own commands."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from commonweight.cli.main import app
from commonweight.data.dataset import open_dataset
from commonweight.tiny_components import write_tiny_components
from coordinator.directory import RunDirectory
from coordinator.founding_checks import check_shards
from coordinator.prepared_data import describe
from coordinator.settings import Settings
from diloco.shards import Shard
from diloco.unit import run_unit
from mmdit.components import encoders_in, library
from mmdit.encoders import EncodersConfig
from mmdit.export import WEIGHTS_PATH, load_checkpoint
from mmdit.presets import PRESETS
from protocol import layout
from protocol.documents import UnitId
from protocol.errors import ConfigInvalid, DirectoryNotEmpty, NetworksMissing, UsageError
from verify.replay import model_config, shard_set, unit_spec_of

pytestmark = pytest.mark.slow


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    write_tiny_components(folder, PRESETS["rgb16"], seed=1)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain red and plain blue pictures, in two sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(80):
        name, colour = (("red", (230, 20, 20)), ("blue", (20, 20, 230)))[number % 2]
        side = 40 if number % 4 < 2 else 20
        pixels = np.clip(np.array(colour) + draw.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"all {name}")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, components: Path, pictures: Path) -> RunDirectory:
    """A run over captions that tiny text encoders have read, founded by the commands."""
    place = tmp_path_factory.mktemp("run")
    options = ("--preset", "rgb16", "--text", "encoders", "--components", components, "--t5-tokens", 16)
    command(
        "data", "prepare", pictures, "-o", place / "data", *options, "--licence", "CC0-1.0", "--heldout", 8,
        "--shard-mib", 0.5, "--least-side", 16, "--processes", 1,
    )  # fmt: skip
    command(
        "coordinator", "init", place / "run", "--data", place / "data", "--root-key", place / "root.pem",
        "--set", "training.text_dropout=0.464", "--set", "training.steps=240", "--set", "training.batch=8",
        "--set", "training.lr=0.003", "--set", "rounds.shards_per_unit=1", "--seed", "5d" * 32,
    )  # fmt: skip
    return RunDirectory(place / "run")


def test_the_run_says_which_networks_read_its_captions(run: RunDirectory, components: Path) -> None:
    config = run.identity().config
    loaded = load_checkpoint(run.public / layout.checkpoint_directory(0))
    assert isinstance(loaded.conditioning, EncodersConfig)
    assert [encoder.name for encoder in loaded.conditioning.encoders] == ["clip_l", "clip_g", "t5"]
    assert config.conditioning["kind"] == "encoders"
    assert loaded.conditioning.layout.rows == 77 + 16
    shard = Shard.open(run.public / layout.shard_path(config.data.shards[0].sha256))
    assert shard.caption(0) in ("all red", "all blue")
    assert set(shard.parts) == {"clip_l", "clip_g", "t5"}
    assert "text" in (run.root / "run.toml").read_text()


@pytest.fixture(scope="module")
def trained(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory whose weights have gone through a unit as the run has them; always the same one.

    By the public rule it would be another one with every run's keys, and now and then one that hears T5 too little.
    """
    config = run.identity().config
    genesis = run.public / layout.checkpoint_directory(0)
    base = {name: tensor.numpy() for name, tensor in load_checkpoint(genesis).model.state_dict().items()}
    names = [shard.sha256 for shard in config.data.shards]
    shards = shard_set(config, [Shard.open(run.public / layout.shard_path(name)) for name in names])
    spec = unit_spec_of(config, 1, UnitId("5d" * 32))
    result = run_unit(spec, model_config(config), base, shards, device="cpu", on_step=None)
    assert result.loss_last < 0.6 * result.loss_first
    place = tmp_path_factory.mktemp("trained")
    for path in genesis.rglob("*"):
        if path.is_file() and path.relative_to(genesis) != WEIGHTS_PATH and path.name != layout.MANIFEST:
            (place / path.relative_to(genesis)).parent.mkdir(parents=True, exist_ok=True)
            (place / path.relative_to(genesis)).write_bytes(path.read_bytes())
    weights = {name: torch.from_numpy(values - result.delta.get(name, 0)) for name, values in base.items()}
    from safetensors.torch import save_file

    (place / WEIGHTS_PATH).parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, place / WEIGHTS_PATH)
    return place


def redness(path: Path) -> float:
    """Mean of red less blue, -1 to 1."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"), dtype=np.float32) / 255
    return float((pixels[..., 0] - pixels[..., 2]).mean())


def test_a_caption_is_drawn_through_the_networks(trained: Path, components: Path, tmp_path: Path) -> None:
    drawn = {}
    for name in ("red", "blue"):
        out = tmp_path / f"{name}.png"
        command("sample", trained, f"all {name}", "-o", out, "--components", components, "--steps", 12)
        drawn[name] = redness(out)
    assert drawn["red"] > 0.3
    assert drawn["blue"] < -0.3


def test_any_of_the_encoders_can_be_left_out(trained: Path, components: Path, tmp_path: Path) -> None:
    for without in ("t5", "clip_l,clip_g", "clip_l,t5"):
        drawn = []
        for name in ("red", "blue"):
            out = tmp_path / f"{name}.png"
            command(
                "sample", trained, f"all {name}", "-o", out, "--components", components, "--steps", 12,
                "--without", without,
            )  # fmt: skip
            drawn.append(redness(out))
        assert drawn[0] > drawn[1] + 0.2, without


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "draws with networks of others (clip_l, clip_g, t5)"),
        (("--components", "COMPONENTS", "--without", "bert"), "'bert' is none of the checkpoint's text encoders"),
        (("--components", "/no/such"), "there is no such folder"),
    ],
)
def test_networks_that_are_not_there_are_asked_for(
    trained: Path, components: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    words = [str(components) if word == "COMPONENTS" else word for word in options]
    done = CliRunner().invoke(app, ["sample", str(trained), "all red", "-o", str(tmp_path / "x.png"), *words])
    assert isinstance(done.exception, UsageError)
    assert sentence in str(done.exception)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def pipeline(trained: Path, components: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "pipeline"
    command("export", trained, "-o", out, "--precision", "fp32", "--components", components)
    return out


def test_the_exported_pipeline_opens_with_no_further_arguments_and_draws_from_a_prompt(pipeline: Path) -> None:
    with quiet():
        opened = library("diffusers").StableDiffusion3Pipeline.from_pretrained(str(pipeline))
        opened.set_progress_bar_config(disable=True)
        drawn = {}
        for name in ("red", "blue"):
            generator = torch.Generator().manual_seed(0)
            (picture,) = opened(
                f"all {name}", num_inference_steps=12, guidance_scale=3.0, generator=generator, max_sequence_length=16
            ).images
            pixels = np.asarray(picture, dtype=np.float32) / 255
            drawn[name] = float((pixels[..., 0] - pixels[..., 2]).mean())
            assert picture.size == (16, 16)
    # Under guidance the pipeline leads away from the empty caption, of which training has seen enough.
    assert drawn["red"] > 0.3
    assert drawn["blue"] < -0.3


def test_the_model_card_says_how_to_open_the_pipeline_and_with_how_many_tokens(pipeline: Path) -> None:
    card = (pipeline / "README.md").read_text()
    assert 'StableDiffusion3Pipeline.from_pretrained(".", dtype=torch.float32)' in card
    assert 'pipeline("a caption", max_sequence_length=16).images[0]' in card
    assert "others' work, with licences of their" in card
    assert "it hands pixels through" in card


def test_everything_of_a_pipeline_is_counted_and_may_be_read_by_whom_the_umask_lets(
    trained: Path, components: Path, tmp_path: Path
) -> None:
    said = command("export", trained, "-o", tmp_path / "pipeline", "--components", components)
    files = [path for path in (tmp_path / "pipeline").rglob("*") if path.is_file()]
    assert f": {sum(path.stat().st_size for path in files):,} bytes, of which the transformer's weights are " in said
    (tmp_path / "plain").write_bytes(b"")
    mode = (tmp_path / "plain").stat().st_mode
    assert all(path.stat().st_mode == mode for path in [*files, *components.rglob("*.safetensors")])


def test_a_run_without_t5_is_opened_as_its_model_card_says(
    components: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(
        "data", "prepare", pictures, "-o", tmp_path / "data", "--preset", "rgb16", "--text", "encoders",
        "--components", components, "--encoders", "clip_l,clip_g", "--licence", "CC0-1.0", "--heldout", 8,
        "--least-side", 16, "--processes", 1,
    )  # fmt: skip
    made = ("--data", tmp_path / "data", "--root-key", tmp_path / "root.pem", "--set", "rounds.shards_per_unit=1")
    command("coordinator", "init", tmp_path / "run", *made)
    said = command("export", tmp_path / "run", "-o", tmp_path / "pipeline", "--components", components)
    assert "open the pipeline with text_encoder_3=None, tokenizer_3=None" in said
    _, code, alone = (
        part.split("```")[0] for part in (tmp_path / "pipeline" / "README.md").read_text().split("```python\n")
    )
    monkeypatch.chdir(tmp_path / "pipeline")
    found: dict[str, Any] = {}
    with quiet():
        exec(code + "picture = pipeline('all red', num_inference_steps=2).images[0]", found)
        exec(alone, found)
    assert found["picture"].size == (16, 16)
    assert found["pipeline"].transformer.dtype == found["model"].dtype == torch.bfloat16


def test_the_pipeline_draws_with_all_its_defaults(pipeline: Path) -> None:
    with quiet():
        opened = library("diffusers").StableDiffusion3Pipeline.from_pretrained(str(pipeline))
        opened.set_progress_bar_config(disable=True)
        (picture,) = opened("all red", generator=torch.Generator().manual_seed(0)).images
    assert picture.size == (16, 16)


def test_our_own_sampler_draws_from_the_exported_pipeline_too(pipeline: Path, tmp_path: Path) -> None:
    command("sample", pipeline, "all blue", "-o", tmp_path / "blue.png", "--steps", 12)
    assert redness(tmp_path / "blue.png") < -0.3


def test_a_checkpoint_that_reads_bytes_is_no_pipeline(components: Path, tmp_path: Path) -> None:
    command("coordinator", "init", tmp_path / "digits", "--root-key", tmp_path / "root.pem")
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "digits"), "-o", str(tmp_path / "out"), "--components", str(components)]
    )
    assert isinstance(done.exception, UsageError)
    assert "reads captions byte by byte" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_several_sizes_are_prepared_for_runs_in_stages(pictures: Path, tmp_path: Path) -> None:
    command(
        "data", "prepare", pictures, "-o", tmp_path / "data", "--preset", "rgb16", "--licence", "CC0-1.0",
        "--side", 8, "--side", 16, "--side", 32, "--heldout", 8, "--shard-mib", 0.05, "--processes", 1,
    )  # fmt: skip
    manifest = open_dataset(tmp_path / "data").manifest
    counts: dict[int, int] = {}
    for shard in manifest.shards:
        counts[shard.height] = counts.get(shard.height, 0) + shard.samples
    # Half of the pictures are 20 pixels wide; eight of the large ones are held out, in every size.
    assert counts == {8: 72, 16: 72, 32: 32}
    assert manifest.heldout.height == 32


def test_inspect_says_what_each_choice_of_text_would_have_volunteers_fetch(run: RunDirectory, tmp_path: Path) -> None:
    data = run.root.parent / "data"
    said = command("data", "inspect", data, "--sheet", tmp_path / "sheet.png")
    assert "with other choices of text" in said
    table = [line for line in said.splitlines() if line.startswith("  ")]
    rows = {line.strip().split("  ")[0]: line.split(", ")[-1].split()[:2] for line in table}
    assert list(rows) == [
        "captions, for encoders where training is",
        "text of the CLIPs",
        "text of the CLIPs, without padding, about",
        "text of all encoders",
        "text of all encoders, without padding, about",
    ]
    (own,) = (line for line in table if line.endswith("(this set)"))
    assert own.startswith("  text of all encoders  ")
    assert "--text encoders --encoders clip_l,clip_g --padding zeros" in table[2]
    shard = open_dataset(data).manifest.shards[0]
    # What is said of all encoders is what the data set has, but for offsets and the empty caption.
    number, unit = rows["text of all encoders"]
    bytes_a_picture = float(number) * {"kB": 1e3, "B": 1}[unit]
    assert bytes_a_picture == pytest.approx(shard.size / shard.samples, rel=0.05)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] >= 64


@pytest.fixture(scope="module")
def captions_only(tmp_path_factory: pytest.TempPathFactory, components: Path, pictures: Path) -> Path:
    """A data set for volunteers who run the encoders themselves."""
    place = tmp_path_factory.mktemp("captions")
    command(
        "data", "prepare", pictures, "-o", place / "data", "--preset", "rgb16", "--text", "encoders", "--captions-only",
        "--components", components, "--licence", "CC0-1.0", "--heldout", 8, "--least-side", 16, "--processes", 1,
        "--networks-from", "somebody/networks@1",
    )  # fmt: skip
    return place / "data"


def test_captions_alone_are_a_small_part_of_the_bytes_and_the_held_out_pictures_keep_their_text(
    captions_only: Path, run: RunDirectory
) -> None:
    alone, whole = (open_dataset(place).manifest for place in (captions_only, run.root.parent / "data"))
    assert alone.encoder["conditioning"]["stored"] is False
    assert alone.encoder["conditioning"]["source"] == "somebody/networks@1"
    assert 3 * alone.shards[0].size / alone.shards[0].samples < whole.shards[0].size / whole.shards[0].samples
    heldout = Shard.open(open_dataset(captions_only).path(alone.heldout))
    assert set(heldout.parts) == {"clip_l", "clip_g", "t5"}


def test_no_run_is_founded_whose_held_out_pictures_have_captions_alone(captions_only: Path) -> None:
    """The coordinator measures on them, and has no encoders."""
    opened = open_dataset(captions_only)
    shards = [opened.path(shard) for shard in opened.manifest.shards]
    words = ["model.preset=rgb16", "model.text=encoders", "data.source=here", "rounds.shards_per_unit=1"]
    settings = Settings.parse("", words)
    described = describe(settings, opened.manifest)
    check_shards(settings, described, shards, opened.path(opened.manifest.heldout))
    with pytest.raises(ConfigInvalid, match=r"needs text of .* but .* has None"):
        check_shards(settings, described, shards, shards[0])


def test_captions_only_is_for_text_encoders(pictures: Path, tmp_path: Path) -> None:
    words = ["data", "prepare", str(pictures), "-o", str(tmp_path / "data"), "--preset", "rgb16", "--captions-only"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UsageError)
    assert "goes with --text encoders" in str(done.exception)


def test_tiny_networks_are_written_by_a_command_and_never_over_something_else(tmp_path: Path) -> None:
    said = command("data", "tiny-networks", "-o", tmp_path / "networks", "--preset", "digits")
    assert "an autoencoder for digits" in said
    assert encoders_in(tmp_path / "networks") == ("clip_l", "clip_g", "t5")
    done = CliRunner().invoke(app, ["data", "tiny-networks", "-o", str(tmp_path / "networks"), "--preset", "digits"])
    assert isinstance(done.exception, DirectoryNotEmpty)


def test_a_run_whose_own_auditor_could_not_hear_captions_is_not_served(captions_only: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert len(open_dataset(captions_only).manifest.shards) == 1
    said = command("coordinator", "init", run, "--data", captions_only)
    assert RunDirectory(run).settings().rounds.shards_per_unit == 1, "as many as there are"
    assert f"  commonweight coordinator serve {run} --components FOLDER\n" in said
    assert re.search(r"  commonweight worker start --join \S+ --components FOLDER\s", said)
    write_tiny_components(tmp_path / "others", PRESETS["rgb16"], seed=2)
    for named, sentence in (
        ((), "runs its text encoders, clip_l, clip_g, t5"),
        (("--components", str(tmp_path / "others")), "it is another network"),
    ):
        done = CliRunner().invoke(app, ["coordinator", "serve", str(run), *named])
        assert isinstance(done.exception, NetworksMissing)
        assert sentence in str(done.exception)
        assert "--no-auditor" in str(done.exception)
        assert not (run / "serving.json").exists()
