import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from protocol import layout
from protocol.documents import Delegation, RunId, StateEntry, sign
from protocol.errors import (
    CheckpointCorrupt,
    CommonweightError,
    DelegationInvalid,
    DocumentRefused,
    SignatureInvalid,
    WrongRun,
)
from tests.verify.examples import COORDINATOR, ROOT, RUN, STRANGER, PublishedRun
from verify.checkpoint import verify_checkpoint
from verify.plain_files import file_sha256


@pytest.fixture
def directory(published: PublishedRun, tmp_path: Path) -> Path:
    """A downloaded copy of checkpoint 2, alone."""
    return Path(shutil.copytree(published.checkpoint(2), tmp_path / "downloaded"))


def test_every_published_checkpoint_verifies(published: PublishedRun) -> None:
    for number, merged in enumerate((0, 2, 4)):
        report = verify_checkpoint(published.checkpoint(number), RUN)
        assert (report.run, report.run_given, report.checkpoint, report.merged) == (RUN, True, number, merged)
        assert report.config == published.config
        assert report.weights_sha256 == file_sha256(published.checkpoint(number) / layout.WEIGHTS)
        assert report.files == len(published.manifest(number).files)


def test_a_copy_verifies_alone_and_says_that_the_run_id_is_its_own(directory: Path) -> None:
    report = verify_checkpoint(directory)
    assert report.run == RUN
    assert not report.run_given


def test_the_papers_of_the_run_are_found_in_the_grandparent(published: PublishedRun, tmp_path: Path) -> None:
    run = published.copy(tmp_path / "public")
    papers = (layout.ROOT_KEY, layout.RUN_CONFIG, layout.DELEGATION)
    for name in papers:
        (run.checkpoint(2) / name).unlink()
    run.forge(2, lambda manifest: replace(manifest, files=tuple(f for f in manifest.files if f.path not in papers)))
    assert verify_checkpoint(run.checkpoint(2), RUN).checkpoint == 2
    (run.public / layout.ROOT_KEY).unlink()
    with pytest.raises(CheckpointCorrupt, match=r"root\.pub can't be read"):
        verify_checkpoint(run.checkpoint(2), RUN)


def test_another_run_than_asked_for_is_refused(directory: Path) -> None:
    other = RunId(STRANGER.public.key_id)
    with pytest.raises(WrongRun, match=f"is of run {RUN[:12]}, not of run {other[:12]}"):
        verify_checkpoint(directory, other)


def test_an_old_checkpoint_stays_verifiable_after_its_delegation_has_expired(directory: Path) -> None:
    # The example's delegation ended in 1970.
    assert verify_checkpoint(directory, RUN).checkpoint == 2


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return write


def _append(name: str) -> Callable[[Path], None]:
    def append(directory: Path) -> None:
        with (directory / name).open("ab") as file:
            file.write(b"\0")

    return append


def _flip(name: str) -> Callable[[Path], None]:
    def flip(directory: Path) -> None:
        raw = bytearray((directory / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (directory / name).write_bytes(raw)

    return flip


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _a_directory_instead(directory: Path) -> None:
    (directory / layout.WEIGHTS).unlink()
    (directory / layout.WEIGHTS).mkdir()


def _linked_folder(directory: Path) -> None:
    (directory / "more").symlink_to(directory.parent, target_is_directory=True)


STRANGERS_DELEGATION = sign(
    Delegation(run=RUN, role="coordinator", public_key=STRANGER.public.hex, not_after_ms=2**50), STRANGER
)
AUDITORS_DELEGATION = sign(
    Delegation(run=RUN, role="auditor", public_key=COORDINATOR.public.hex, not_after_ms=2**50), ROOT
)
SPOILED = [
    pytest.param(_flip(layout.WEIGHTS), CheckpointCorrupt, "does not have the SHA-256", id="a bit of the weights"),
    pytest.param(_append(layout.WEIGHTS), CheckpointCorrupt, "bytes, the manifest says", id="weights too long"),
    pytest.param(_unlink(layout.WEIGHTS), CheckpointCorrupt, "is missing", id="weights missing"),
    pytest.param(_a_directory_instead, CheckpointCorrupt, "is missing", id="a folder in place of the weights"),
    pytest.param(_flip(layout.MOMENTUM), CheckpointCorrupt, "momentum", id="a bit of the momentum"),
    pytest.param(_flip("transformer/config.json"), CheckpointCorrupt, "config.json", id="a bit of the model config"),
    pytest.param(_unlink("commonweight.json"), CheckpointCorrupt, "is missing", id="description missing"),
    pytest.param(_unlink(layout.MANIFEST), CheckpointCorrupt, "manifest.json can't be read", id="no manifest"),
    pytest.param(_flip(layout.MANIFEST), DocumentRefused, "", id="a bit of the manifest"),
    pytest.param(_write(layout.ROOT_KEY, b"\xff\n"), SignatureInvalid, "64 hex digits", id="no root key"),
    pytest.param(
        _write(layout.ROOT_KEY, STRANGER.public.hex.encode()), SignatureInvalid, "not signed by key", id="another root"
    ),
    pytest.param(
        _write(layout.DELEGATION, STRANGERS_DELEGATION), SignatureInvalid, "", id="a coordinator who delegates itself"
    ),
    pytest.param(_write(layout.DELEGATION, AUDITORS_DELEGATION), DelegationInvalid, "auditor", id="an auditor's key"),
    pytest.param(_unlink(layout.DELEGATION), CheckpointCorrupt, "delegation.json", id="no delegation"),
    pytest.param(_unlink(layout.RUN_CONFIG), CheckpointCorrupt, "run.json", id="no run config"),
    pytest.param(
        _write("transformer/diffusion_pytorch_model.safetensors.index.json", b"{}"),
        CheckpointCorrupt, "1 files that the manifest does not list", id="an index that loaders would follow",
    ),
    pytest.param(_write("extra.bin", b""), CheckpointCorrupt, "extra.bin", id="an unlisted file"),
    pytest.param(_linked_folder, CheckpointCorrupt, "more", id="an unlisted linked folder"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "said"), SPOILED)
def test_a_directory_that_is_not_what_was_published_is_refused(
    directory: Path, spoil: Callable[[Path], None], error: type[CommonweightError], said: str
) -> None:
    spoil(directory)
    with pytest.raises(error) as caught:
        verify_checkpoint(directory)
    assert said in caught.value.message


def test_hidden_files_of_the_system_do_no_harm(directory: Path) -> None:
    (directory / ".DS_Store").write_bytes(b"x")
    (directory / ".cache" / "hub").mkdir(parents=True)
    (directory / ".cache" / "hub" / "lock").write_bytes(b"x")
    assert verify_checkpoint(directory, RUN).checkpoint == 2


def test_listed_files_may_be_links_as_in_a_download_cache(directory: Path, tmp_path: Path) -> None:
    blob = (directory / layout.WEIGHTS).rename(tmp_path / "blob")
    (directory / layout.WEIGHTS).symlink_to(blob)
    assert verify_checkpoint(directory, RUN).checkpoint == 2


def test_a_checkpoint_0_other_than_the_run_config_names_is_refused(published: PublishedRun, tmp_path: Path) -> None:
    run = published.copy(tmp_path / "public")
    weights = run.checkpoint(0) / layout.WEIGHTS
    shutil.copyfile(run.checkpoint(1) / layout.WEIGHTS, weights)
    run.forge(
        0,
        lambda manifest: replace(
            manifest,
            files=tuple(
                replace(entry, sha256=file_sha256(weights)) if entry.path == layout.WEIGHTS else entry
                for entry in manifest.files
            ),
        ),
    )
    with pytest.raises(CheckpointCorrupt, match="not hold the first weights that the run config names"):
        verify_checkpoint(run.checkpoint(0), RUN)


def test_a_manifest_that_lists_a_file_twice_or_hides_its_weights_is_refused(
    published: PublishedRun, tmp_path: Path
) -> None:
    run = published.copy(tmp_path / "public")
    run.forge(2, lambda manifest: replace(manifest, files=manifest.files + manifest.files[:1]))
    with pytest.raises(CheckpointCorrupt, match="lists a file twice"):
        verify_checkpoint(run.checkpoint(2), RUN)
    run.forge(2, lambda manifest: replace(manifest, files=manifest.files[:-1], state=(
        StateEntry(role="weights", path=layout.MOMENTUM),
    )))  # fmt: skip
    with pytest.raises(CheckpointCorrupt, match=f"has no weights at {layout.WEIGHTS}"):
        verify_checkpoint(run.checkpoint(2), RUN)


@pytest.mark.parametrize("name", [layout.ROOT_KEY, layout.DELEGATION, layout.RUN_CONFIG, layout.MANIFEST])
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "huge"])
def test_what_is_no_plain_small_file_is_refused_at_once(directory: Path, name: str, kind: str) -> None:
    path = directory / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(10**13)
    with pytest.raises(CheckpointCorrupt, match="is larger than" if kind == "huge" else "it is no plain file"):
        verify_checkpoint(directory, RUN)


def test_a_pipe_in_place_of_the_weights_is_not_waited_for(directory: Path) -> None:
    (directory / layout.WEIGHTS).unlink()
    os.mkfifo(directory / layout.WEIGHTS)
    with pytest.raises(CheckpointCorrupt, match="is missing"):
        verify_checkpoint(directory, RUN)


def test_of_a_checkpoint_that_is_not_kept_whole_the_report_says_which_one_is(
    published: PublishedRun, tmp_path: Path
) -> None:
    run = published.copy(tmp_path / "public")
    run.forge(2, lambda manifest: replace(manifest, snapshot=0))
    for path in layout.STATE:
        (run.checkpoint(2) / path).unlink()
    with pytest.raises(CheckpointCorrupt, match=r"only the patch is kept here\. Checkpoint 0 is whole"):
        verify_checkpoint(run.checkpoint(2), RUN)
