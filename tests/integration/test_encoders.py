"""A run whose volunteers hear captions with text encoders of their own, over pictures of several sizes, end to end."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commonweight.demo_story import read_entries
from commonweight.tiny_components import write_tiny_components
from diloco.shards import Shard
from mmdit.presets import PRESETS
from protocol import layout
from protocol.assignment import unit_shards
from tests.integration.live_run import LiveRun, LiveWorker, command, environment, until
from worker.public_files import DirectoryFiles, believe

pytestmark = pytest.mark.slow

STAGED = (
    "verification.mode=replay",
    "verification.probation=1",
    "verification.floor=1.0",
    "verification.referee_share=0",
    "training.text_dropout=0.464",
    "rounds.units=2",
    "rounds.min_units=1",
    "rounds.min_window_seconds=0.1",
    "rounds.lease_seconds=60",
    "rounds.planned=4",
    "rounds.stages=1:16 3:32",
)
COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}


def told(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(command(*map(str, arguments)), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + done.stderr


def write_pictures(folder: Path) -> None:
    draw = np.random.default_rng(0)
    folder.mkdir()
    for number in range(40):
        name, colour = list(COLOURS.items())[number % 2]
        pixels = np.clip(np.array(colour) + draw.normal(0, 6, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"all {name}, number {number}")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    write_tiny_components(folder, PRESETS["rgb16"], seed=1)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, networks: Path) -> Path:
    place = tmp_path_factory.mktemp("data")
    write_pictures(place / "pictures")
    told(
        "data", "prepare", place / "pictures", "-o", place / "set", "--preset", "rgb16", "--text", "encoders",
        "--components", networks, "--captions-only", "--t5-tokens", 16, "--side", 16, "--side", 32,
        "--licence", "CC0-1.0", "--heldout", 8, "--shard-mib", 0.05, "--processes", 1,
    )  # fmt: skip
    return place / "set"


def test_volunteers_hear_captions_themselves_and_auditors_hear_the_same(
    folder: Path, data: Path, networks: Path
) -> None:
    heard = ("--components", str(networks))
    with LiveRun(folder, STAGED, data=data) as run, LiveWorker(run.start(*heard), "worker", *heard) as worker:
        public = run.directory.public
        run.await_checkpoint(4, 240)
        assert worker.wait() == 0, worker.errors.read_text()
        told_of = [event["event"] for event in worker.events()]
        assert told_of.index("loading") < told_of.index("lease"), "no lease runs while networks load"
        assert worker.events("loading")[0]["networks"] == ["clip_l", "clip_g", "t5"]
        until(lambda: len([1 for kind, _ in read_entries(public) if kind == "opinion"]) >= 4, 60, "opinions")
    opinions = [body for kind, body in read_entries(public) if kind == "opinion"]
    assert {body["finding"] for body in opinions} == {"confirmed"}

    config = believe(DirectoryFiles(public), None).config
    for shard in config.data.shards:
        opened = Shard.open(public / layout.shard_path(shard.sha256))
        assert opened.has_captions
        assert not opened.parts, "what encoders make of captions is not fetched"
    heldout = Shard.open(public / layout.shard_path(config.data.heldout.sha256))
    assert set(heldout.parts) == {"clip_l", "clip_g", "t5"}, "the coordinator has no encoders, and measures"
    measured = [json.loads((public / layout.metrics_path(number)).read_text()) for number in (1, 2)]
    assert measured[0]["validation_loss"] != measured[1]["validation_loss"]

    sides = {shard.sha256: shard.height for shard in config.data.shards}
    trained = {number: {sides[name] for name in unit_shards(config, number, 0)} for number in (1, 2, 3, 4)}
    assert trained == {1: {16}, 2: {16}, 3: {32}, 4: {32}}, "small pictures first, then large ones"

    told("checkpoint", "rebuild", run.directory.root)
    place = ("--public", public, "--device", "cpu", "--threads", 1)
    said = told("verify", "replay", "3/0", *place, *heard)
    assert f"loading clip_l, clip_g, t5 from {networks}" in said
    assert "confirmed" in said
    refused = told("verify", "replay", "3/0", *place, code=1)
    assert "NETWORKS_MISSING" in refused
    assert "--components" in refused


def test_without_the_run_s_own_encoders_nobody_works(folder: Path, data: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    write_tiny_components(others, PRESETS["rgb16"], seed=2)
    with LiveRun(folder, STAGED, data=data) as run:
        run.start("--no-auditor")
        for name, more, words in (
            ("nothing", (), "runs its text encoders, clip_l, clip_g, t5"),
            ("others", ("--components", str(others)), "it is another network"),
        ):
            with LiveWorker(run, name, *more) as worker:
                assert worker.wait() != 0
                assert words in worker.await_event("failed")["sentence"]
                assert worker.events("failed")[0]["code"] == "NETWORKS_MISSING"
                assert not worker.events("lease"), "nothing was leased that could not be trained"
