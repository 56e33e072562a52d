import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from commonweight.cli.checkpoint import app
from protocol import layout
from protocol.documents import RunConfig
from protocol.errors import (
    CheckpointCorrupt,
    CommonweightError,
    DeltasPruned,
    JoinStringInvalid,
    RebuildDiffers,
    UsageError,
    WrongRun,
)
from tests.verify.examples import RUN, STRANGER, PublishedRun
from verify.checkpoint import open_run
from verify.plain_files import file_sha256


@pytest.fixture
def spoilable(run_directory: Path, tmp_path: Path) -> PublishedRun:
    """A mirror of the run's public directory that a test may change."""
    mirror = Path(shutil.copytree(run_directory / "public", tmp_path / "mirror"))
    return PublishedRun(public=mirror, config=_config(mirror))


def _config(public: Path) -> RunConfig:
    return open_run(public, RUN).config


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _refusal(*arguments: object) -> CommonweightError:
    error = _invoke(*arguments).exception
    assert isinstance(error, CommonweightError), error
    return error


def test_verify_says_what_the_checkpoint_is_and_that_the_run_id_was_its_own(run_directory: Path) -> None:
    place = run_directory / "public" / layout.checkpoint_directory(1)
    result = _invoke("verify", place)
    assert result.exit_code == 0, result.output
    assert f"checkpoint 1 of run 'tiny': {place}" in result.output
    assert f"SHA-256 {file_sha256(place / layout.WEIGHTS)}" in result.output
    assert re.search(r"merged +2 deltas", result.output)
    assert re.search(f"run id +{RUN}", result.output)
    assert "The run id was read from the directory itself." in result.output


@pytest.mark.parametrize("given", [RUN, f"cw1:example.org:7000:{RUN}"])
def test_verify_takes_a_run_id_or_a_join_string(run_directory: Path, given: str) -> None:
    result = _invoke("verify", run_directory / "public" / layout.checkpoint_directory(2), "--run", given)
    assert result.exit_code == 0, result.output
    assert "read from the directory itself" not in result.output


@pytest.mark.parametrize("inside", ["", "public"])
def test_verify_of_a_run_takes_its_newest_checkpoint(run_directory: Path, inside: str) -> None:
    assert "checkpoint 2 of run 'tiny'" in _invoke("verify", run_directory / inside).output


def test_verify_refuses_another_run_and_a_run_id_that_is_none(run_directory: Path) -> None:
    assert isinstance(_refusal("verify", run_directory, "--run", STRANGER.public.key_id), WrongRun)
    wrong = _refusal("verify", run_directory, "--run", RUN[:-1])
    assert isinstance(wrong, UsageError)
    assert RUN[:-1] in wrong.message
    assert isinstance(_refusal("verify", run_directory, "--run", "cw1:example.org"), JoinStringInvalid)


def test_verify_refuses_an_altered_file_by_its_name(spoilable: PublishedRun) -> None:
    path = spoilable.checkpoint(2) / layout.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    error = _refusal("verify", spoilable.checkpoint(2))
    assert isinstance(error, CheckpointCorrupt)
    assert str(path) in error.message


def test_a_directory_of_something_else_is_a_mistake_in_usage(tmp_path: Path) -> None:
    for command in ("verify", "rebuild"):
        error = _refusal(command, tmp_path)
        assert isinstance(error, UsageError)
        assert str(tmp_path) in error.message
        missing = _refusal(command, tmp_path / "nowhere")
        assert isinstance(missing, UsageError)
        assert missing.message == f"There is no directory {tmp_path / 'nowhere'}."


@pytest.mark.parametrize("inside", ["", "public"])
def test_rebuild_shows_every_round_and_the_final_digest(run_directory: Path, inside: str) -> None:
    result = _invoke("rebuild", run_directory / inside, "--run", RUN)
    assert result.exit_code == 0, result.output
    digests = [file_sha256(run_directory / "public" / layout.checkpoint_directory(n) / layout.WEIGHTS) for n in (1, 2)]
    assert result.output.splitlines() == [
        f"checkpoint 1 of 2: 2 deltas merged again, weights {digests[0][:16]} as published",
        f"checkpoint 2 of 2: 4 deltas merged again, weights {digests[1][:16]} as published",
        f"Checkpoint 2 follows from 6 deltas, byte for byte: weights SHA-256 {digests[1]}",
    ]


def test_rebuild_keeps_its_result_where_it_is_told(run_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "rebuilt"
    result = _invoke("rebuild", run_directory, "--out", out)
    assert f"It lies in {out}: weights and description" in result.output
    published = run_directory / "public" / layout.checkpoint_directory(2)
    assert (out / layout.WEIGHTS).read_bytes() == (published / layout.WEIGHTS).read_bytes()


def test_rebuild_leaves_no_temporary_files(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert _invoke("rebuild", run_directory).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_rebuild_says_where_the_published_bytes_differ(spoilable: PublishedRun) -> None:
    spoilable.forge(
        1,
        lambda manifest: replace(
            manifest,
            files=tuple(
                replace(entry, sha256="ab" * 32) if entry.path == layout.WEIGHTS else entry for entry in manifest.files
            ),
        ),
    )
    error = _refusal("rebuild", spoilable.public)
    assert isinstance(error, RebuildDiffers)
    assert error.exit_code == 1
    assert "Checkpoint 1 does not follow from its deltas" in error.message


def test_rebuild_names_a_pruned_delta(spoilable: PublishedRun) -> None:
    name = layout.delta_path(spoilable.manifest(1).merged[0].blob_sha256)
    (spoilable.public / name).unlink()
    error = _refusal("rebuild", spoilable.public)
    assert isinstance(error, DeltasPruned)
    assert name in error.message
