"""`commonweight coordinator`, as an operator types it, and the digits that it starts with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from commonweight.cli.main import run
from commonweight.digits import LICENCE, SOURCE, caption, load_digits, write_digits
from coordinator.directory import RunDirectory
from diloco import NUMERICS
from diloco.shards import Shard
from protocol.keys import PrivateKey

HELDOUT_START = [8, 9, 5, 0, 0, 8, 7, 0, 2, 7, 3, 2]
"""Labels of the first held-out pictures: a change here would change every score that was ever published."""


def ok(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = run([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = run([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_the_way_of_an_operator_from_the_template_to_a_restored_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    ok(capsys, "coordinator", "init", place, "--template-only", "--set", "training.steps=20")
    assert [path.name for path in place.iterdir()] == ["run.toml"]
    assert "no run yet" in ok(capsys, "coordinator", "config", "check", place)
    toml = (place / "run.toml").read_text()
    (place / "run.toml").write_text(toml.replace("planned = 20", "planned = 7"))

    shown = ok(capsys, "coordinator", "init", place, "--set", "training.lr=0.001", "--seed", "ab" * 32)
    identity = RunDirectory(place).identity()
    assert f"cw1:127.0.0.1:7700:{identity.run}" in shown
    assert f"ROOT KEY: {tmp_path / 'run-root.pem'}" in shown
    assert "Move this file off this machine now" in shown
    assert "your own words are in run.toml.old" in shown, "the template was edited, and an option won over it"
    for line in ("model: ", "disk: ", "uplink: ", "downlink: ", "next:", f"  commonweight coordinator serve {place}"):
        assert line in shown
    config = identity.config
    assert (config.training.steps, config.rounds.planned, config.training.lr) == (20, 7, 0.001)
    assert config.seed == "ab" * 32
    assert PrivateKey.load(tmp_path / "run-root.pem").public == identity.root_public

    assert "its signatures hold" in ok(capsys, "coordinator", "config", "check", place)
    assert "the run was never served" in ok(capsys, "coordinator", "status", place)
    status = json.loads(ok(capsys, "coordinator", "status", place, "--json"))
    assert (status["run"], status["checkpoint"], status["round"], status["join"]) == (identity.run, 0, None, None)

    assert "secret keys" in ok(capsys, "coordinator", "backup", place, tmp_path / "backup")
    ok(capsys, "coordinator", "restore", tmp_path / "backup", tmp_path / "again")
    assert RunDirectory(tmp_path / "again").identity().run == identity.run


def test_config_check_says_which_signed_settings_differ_and_lets_the_server_move(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    ok(capsys, "coordinator", "init", place)
    toml = (place / "run.toml").read_text()
    (place / "run.toml").write_text(toml.replace("port = 7700", "port = 7800"))
    ok(capsys, "coordinator", "config", "check", place)
    (place / "run.toml").write_text(toml.replace("steps = 30", "steps = 31").replace("min_units = 3", "min_units = 2"))
    code, error = refused(capsys, "coordinator", "config", "check", place)
    assert code == 2
    assert "training.steps is 31 in run.toml, but 30 in the signed run." in error
    assert "rounds.min_units is 2 in run.toml, but 3 in the signed run." in error
    assert error.endswith("[CONFIG_INVALID]\n")


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["init", "DIR", "--set", "training.stps=3"], 2, "did you mean training.steps? [CONFIG_INVALID]"),
        (["init", "DIR", "--set", "rounds.min_units=9"], 2, "rounds.min_units is 9, but rounds.units is 4"),
        (["init", "DIR", "--shards", "1"], 2, "rounds.shards_per_unit is 2, but the data has 1"),
        (["init", "DIR", "--data", "DIR"], 2, "heldout.safetensors"),
        (["init", "DIR", "--seed", "12"], 2, "it must be 64 hex digits. [USAGE]"),
        (["init", "DIR", "--root-key", "/proc/none/key"], 1, "there is no directory /proc/none. [KEY_UNREADABLE]"),
        (["init"], 2, "[USAGE]"),
        (["config", "check", "DIR"], 2, "run.toml can't be read"),
        (["serve", "DIR"], 2, "holds no run; `commonweight coordinator init"),
        (["status", "DIR"], 2, "[DIRECTORY_NOT_A_RUN]"),
        (["backup", "DIR", "TARGET"], 2, "[DIRECTORY_NOT_A_RUN]"),
        (["restore", "DIR", "TARGET"], 1, "[BACKUP_DAMAGED]"),
        (["destroy"], 2, "[USAGE]"),
    ],
)
def test_a_wrong_command_is_one_sentence_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, named: str
) -> None:
    places = {"DIR": str(tmp_path / "run"), "TARGET": str(tmp_path / "target")}
    given, error = refused(capsys, "coordinator", *(places.get(argument, argument) for argument in arguments))
    assert given == code
    assert error.startswith("error: ")
    assert named in error
    assert not list(tmp_path.iterdir())


def test_a_run_may_be_made_in_a_folder_that_is_not_there_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "all/runs/digits"
    code, error = refused(capsys, "coordinator", "init", place, "--shards", "1")
    assert (code, list(tmp_path.iterdir())) == (2, []), error
    assert "in 8 shards" in ok(capsys, "coordinator", "init", place)
    assert PrivateKey.load(tmp_path / "all/runs/digits-root.pem").public == RunDirectory(place).identity().root_public


def test_a_second_init_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run.toml" not in ok(capsys, "coordinator", "init", tmp_path / "run")
    before = RunDirectory(tmp_path / "run").identity().run
    code, error = refused(capsys, "coordinator", "init", tmp_path / "run", "--root-key", tmp_path / "other.pem")
    assert code == 2
    assert "holds a run already; nothing was changed. [DIRECTORY_NOT_EMPTY]" in error
    assert RunDirectory(tmp_path / "run").identity().run == before
    assert not (tmp_path / "other.pem").exists()


def test_shards_from_a_folder_keep_their_names_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, _ = write_digits(tmp_path / "data", shards=3)
    paths[0].rename(tmp_path / "data/zz.safetensors")
    ok(capsys, "coordinator", "init", tmp_path / "run", "--data", tmp_path / "data", "--set", "server.port=0")
    samples = [shard.samples for shard in RunDirectory(tmp_path / "run").config().data.shards]
    names = ("0001", "0002", "zz")
    assert samples == [Shard.open(tmp_path / f"data/{name}.safetensors").n for name in names]


def test_the_command_is_a_real_process_with_a_version_and_quick_help() -> None:
    command = [sys.executable, "-P", "-m", "commonweight"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("commonweight ")
    assert f"numerics {NUMERICS}" in done.stdout
    listing = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", "-m", "commonweight", "coordinator", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "torch" not in listing.stderr
    failed = subprocess.run(
        [*command, "coordinator", "status", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: /nowhere holds no run")


def test_the_digits_are_split_evenly_and_always_the_same() -> None:
    digits = load_digits()
    assert len(digits.train.labels) + len(digits.heldout.labels) == 1797
    for digit in range(10):
        held, trained = (int(np.sum(split.labels == digit)) for split in (digits.heldout, digits.train))
        assert 0.19 < held / (held + trained) <= 0.2
    assert (digits.train.pixels.min(), digits.train.pixels.max()) == (0.0, 1.0)
    again = load_digits()
    assert np.array_equal(again.heldout.pixels, digits.heldout.pixels)
    assert digits.heldout.labels[:12].tolist() == HELDOUT_START


def test_shards_hold_every_training_digit_once_with_its_caption(tmp_path: Path) -> None:
    paths, heldout = write_digits(tmp_path, shards=5)
    shards = [Shard.open(path) for path in paths]
    digits = load_digits()
    pixels = np.concatenate([np.asarray(shard.latent) for shard in shards]).astype(np.float32)
    assert sorted(map(bytes, (pixels[:, 0] + 1) / 2)) == sorted(map(bytes, digits.train.pixels))
    assert {shard.info.licence for shard in shards} == {LICENCE}
    assert {shard.info.source for shard in shards} == {SOURCE}
    assert max(shard.n for shard in shards) - min(shard.n for shard in shards) <= 1
    held = Shard.open(heldout)
    for i in (0, 7, held.n - 1):
        assert held.caption(i) == caption(int(digits.heldout.labels[i]))
        assert np.array_equal(held.latent[i, 0], digits.heldout.pixels[i] * 2 - 1)
