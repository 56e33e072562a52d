"""Backups: what they hold, that they are consistent while the run is written to, and that damage is found."""

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commonweight.digits import write_digits
from coordinator.backup import LIST, backup, restore
from coordinator.blobs import DirectoryBlobs
from coordinator.directory import RunDirectory
from coordinator.founding import found
from coordinator.rounds import Round, RoundState
from coordinator.serve import serving_file
from coordinator.settings import Settings
from coordinator.sqlite_store import SqliteStore
from coordinator.status import read_status
from protocol import layout
from protocol.canonical import sha256_hex
from protocol.documents import Digest
from protocol.errors import BackupDamaged, DirectoryNotARun, DirectoryNotEmpty, LocalProblem, UsageError
from protocol.log import EMPTY_LOG_HEAD, next_head


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    place = tmp_path_factory.mktemp("original")
    shards, heldout = write_digits(place / "data", shards=2)
    directory = RunDirectory(place / "run")
    found(
        directory,
        Settings(),
        shards=shards,
        heldout=heldout,
        root_key_out=place / "root.pem",
        seed=bytes(32),
        now_ms=1_800_000_000_000,
    )
    SqliteStore.open(directory.database).close()
    return directory


@pytest.fixture
def run(original: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(original.root, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def add_blob(run: RunDirectory, content: bytes) -> tuple[Path, str]:
    run.staging.mkdir(exist_ok=True)
    staged = run.staging / "upload"
    staged.write_bytes(content)
    digest = Digest(sha256_hex(content))
    blobs = DirectoryBlobs(run.blobs)
    blobs.add(staged, digest)
    return blobs.path(digest), digest


def test_a_restored_run_has_every_file_and_the_same_identity(run: RunDirectory, tmp_path: Path) -> None:
    add_blob(run, b"a delta")
    report = backup(run, tmp_path / "backup")
    assert restore(tmp_path / "backup", RunDirectory(tmp_path / "restored")) == report
    before, after = contents(run.root), contents(tmp_path / "restored")
    assert {path for path in before.keys() ^ after.keys() if not path.startswith(("lock", "state.sqlite-"))} == set()
    del before["state.sqlite"], after["state.sqlite"]
    assert {path: before[path] for path in after} == after
    assert RunDirectory(tmp_path / "restored").identity() != run.identity()  # two objects holding secrets, not equal
    assert RunDirectory(tmp_path / "restored").identity().config_envelope == run.identity().config_envelope
    keys = RunDirectory(tmp_path / "restored").keys
    assert keys.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in keys.iterdir()} == {0o600}
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o700


def test_a_backup_taken_while_the_database_is_written_to_is_consistent(run: RunDirectory, tmp_path: Path) -> None:
    stop, written = threading.Event(), threading.Event()

    def write() -> None:
        store = SqliteStore.open(run.database)
        count = 0
        while not stop.is_set():
            with store.transaction():
                store.append_log("test", b'{"n":%d}' % count)
                store.put_meta("count", str(count := count + 1))
            written.set()
        store.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert written.wait(10)
        for n in range(3):
            backup(run, tmp_path / f"backup-{n}")
    finally:
        stop.set()
        writer.join()
    for n in range(3):
        restored = RunDirectory(tmp_path / f"restored-{n}")
        restore(tmp_path / f"backup-{n}", restored)
        store = SqliteStore.open(restored.database)
        position, head = store.log_head()
        entries = store.log_entries(1, position)
        assert position == int(store.meta("count") or 0) > 0
        expected = EMPTY_LOG_HEAD
        for entry in entries:
            expected = next_head(expected, entry.kind, entry.body)
        assert expected == head
        store.close()


def test_files_that_never_change_are_linked_and_stored_once(run: RunDirectory, tmp_path: Path) -> None:
    blob, digest = add_blob(run, b"a delta")
    public = run.public / f"deltas/{digest}.safetensors.zst"
    os.link(blob, public)
    backup(run, tmp_path / "backup")
    copies = [tmp_path / "backup" / path.relative_to(run.root) for path in (blob, public)]
    assert {copy.stat().st_ino for copy in copies} == {blob.stat().st_ino}
    assert (tmp_path / "backup/run.toml").stat().st_ino != run.settings_file.stat().st_ino
    restore(tmp_path / "backup", RunDirectory(tmp_path / "restored"))
    assert (tmp_path / "restored" / public.relative_to(run.root)).stat().st_ino != blob.stat().st_ino


def test_work_in_progress_is_left_out(run: RunDirectory, tmp_path: Path) -> None:
    making = run.public / "checkpoints/.making-000001"
    unfinished = run.public / "checkpoints/000001/transformer"
    for place in (making, unfinished, run.staging):
        place.mkdir(parents=True)
        (place / "half").write_bytes(b"half")
    backup(run, tmp_path / "backup")
    assert not list((tmp_path / "backup").rglob("half"))
    assert (tmp_path / "backup/public/checkpoints/000000/manifest.json").exists()


@pytest.mark.parametrize("state", [RoundState.COLLECTING, RoundState.CLOSED])
def test_what_is_published_of_a_round_that_the_copied_database_still_collects_is_left_out(
    run: RunDirectory, tmp_path: Path, state: RoundState
) -> None:
    """Whoever restores may merge something else into it."""
    store = SqliteStore.open(run.database)
    with store.transaction():
        closed_ms = None if state is RoundState.COLLECTING else 2
        store.add_round(Round(round=1, opened_ms=1, state=state, closed_ms=closed_ms))
    store.close()
    newer = [f"checkpoints/000001/{layout.MANIFEST}", layout.log_path(1), layout.metrics_path(1)]
    for path in newer:
        (run.public / path).parent.mkdir(parents=True, exist_ok=True)
        (run.public / path).write_bytes(b"of checkpoint 1")
    (run.public / layout.LATEST).write_bytes(b"of checkpoint 1")
    backup(run, tmp_path / "backup")
    public = tmp_path / "backup/public"
    assert [(public / path).exists() for path in newer] == [state is RoundState.CLOSED] * 3
    newest = public / layout.checkpoint_directory(int(state is RoundState.CLOSED)) / layout.MANIFEST
    assert (public / layout.LATEST).read_bytes() == newest.read_bytes()


@pytest.mark.parametrize(
    "path", ["public/checkpoints/000000/commonweight.json", "keys/run_secret", "run.toml", "state.sqlite"]
)
def test_a_changed_or_missing_file_is_found_before_anything_is_restored(
    run: RunDirectory, tmp_path: Path, path: str
) -> None:
    backup(run, tmp_path / "backup")
    file = tmp_path / "backup" / path
    content = file.read_bytes()
    file.unlink()
    target = RunDirectory(tmp_path / "restored")
    with pytest.raises(BackupDamaged, match=f"lacks the file {path}"):
        restore(tmp_path / "backup", target)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BackupDamaged, match="was changed since the backup"):
        restore(tmp_path / "backup", target)
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "backup"}


def test_an_unfinished_backup_is_not_restored(run: RunDirectory, tmp_path: Path) -> None:
    backup(run, tmp_path / "backup")
    (tmp_path / "backup" / LIST).unlink()
    with pytest.raises(BackupDamaged, match="no finished backup"):
        restore(tmp_path / "backup", RunDirectory(tmp_path / "restored"))


@pytest.mark.parametrize("path", ["../outside", "/tmp/outside", "keys/../../outside", ""])
def test_a_list_that_points_outside_is_refused(run: RunDirectory, tmp_path: Path, path: str) -> None:
    backup(run, tmp_path / "backup")
    listed = json.loads((tmp_path / "backup" / LIST).read_bytes())
    listed["files"][0]["path"] = path
    (tmp_path / "backup" / LIST).write_text(json.dumps(listed))
    with pytest.raises(BackupDamaged, match="no path inside a run"):
        restore(tmp_path / "backup", RunDirectory(tmp_path / "restored"))


HEX = "0" * 64


@pytest.mark.parametrize(
    "change",
    [
        lambda listed: listed.update(run=5),
        lambda listed: listed.update(run="ab"),
        lambda listed: listed.pop("run"),
        lambda listed: listed.update(files={"a": 1}),
        lambda listed: listed.update(format="1"),
        lambda listed: listed["files"].append(5),
        lambda listed: listed["files"].append({"path": 5, "sha256": HEX, "size": 0}),
        lambda listed: listed["files"].append({"path": "a", "sha256": HEX, "size": "0"}),
        lambda listed: listed["files"].append({"path": "a", "sha256": "../" + HEX[3:], "size": 0}),
        lambda listed: listed["files"].append({"path": "a\0b", "sha256": HEX, "size": 0}),
        lambda listed: listed["files"].append({"path": "\ud800", "sha256": HEX, "size": 0}),
        lambda listed: listed["files"].append({"path": "public", "sha256": HEX, "size": 0}),
        lambda listed: listed["files"].append({**listed["files"][0], "path": "./" + listed["files"][0]["path"]}),
    ],
)
def test_a_list_that_is_made_to_break_its_reader_is_refused(
    run: RunDirectory, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    backup(run, tmp_path / "backup")
    listed = json.loads((tmp_path / "backup" / LIST).read_bytes())
    change(listed)
    (tmp_path / "backup" / LIST).write_text(json.dumps(listed))
    with pytest.raises(BackupDamaged):
        restore(tmp_path / "backup", RunDirectory(tmp_path / "restored"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "backup"}


@pytest.mark.parametrize("kind", ["pipe", "endless", "link", "folder", "longer"])
@pytest.mark.parametrize("path", ["public/run.json", "keys/run_secret"])
def test_what_lies_in_the_place_of_a_listed_file_is_not_waited_for_and_not_copied(
    run: RunDirectory, tmp_path: Path, kind: str, path: str
) -> None:
    backup(run, tmp_path / "backup")
    file = tmp_path / "backup" / path
    content = file.read_bytes()
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "longer":
        with file.open("wb") as large:
            large.write(content)
            large.truncate(10**13)
    else:
        (tmp_path / "backup/elsewhere").write_bytes(content)
        file.symlink_to("/dev/zero" if kind == "endless" else tmp_path / "backup/elsewhere")
    with pytest.raises(BackupDamaged, match="no plain file" if kind != "longer" else "was changed since"):
        restore(tmp_path / "backup", RunDirectory(tmp_path / "restored"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "backup"}


def test_a_pipe_in_place_of_the_list_is_not_waited_for(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    os.mkfifo(tmp_path / "backup" / LIST)
    with pytest.raises(BackupDamaged, match="no plain file"):
        restore(tmp_path / "backup", RunDirectory(tmp_path / "restored"))
    (tmp_path / "backup" / LIST).unlink()
    (tmp_path / "backup" / LIST).write_bytes(b"[" * 100_000)
    with pytest.raises(BackupDamaged, match="can't be read"):
        restore(tmp_path / "backup", RunDirectory(tmp_path / "restored"))


@pytest.mark.parametrize(
    "content",
    [
        b"{garbage",
        b"[" * 100_000,
        b"\xff\xfe",
        b"5",
        b"{}",
        b'{"join":"cw1","pids":5}',
        b'{"join":5,"pids":{"supervisor":1}}',
        b'{"join":"cw1","pids":{"supervisor":-1}}',
        b'{"join":"cw1","pids":{"supervisor":%d}}' % 10**40,
        None,
    ],
)
def test_a_damaged_serving_file_is_named_by_the_status(run: RunDirectory, content: bytes | None) -> None:
    if content is None:
        os.mkfifo(serving_file(run))
    else:
        serving_file(run).write_bytes(content)
    with pytest.raises(LocalProblem, match=r"serving\.json can't be read"):
        read_status(run)


def test_the_status_of_a_served_run_says_where_and_commands_no_terminal(run: RunDirectory) -> None:
    pids = {"supervisor": os.getpid(), "control": 1}
    serving = {"join": "cw1:x\x1b[2J", "public_url": "http://x", "pids": pids}
    serving_file(run).write_text(json.dumps(serving))
    assert read_status(run).join == "cw1:x?[2J"
    named = dataclasses.replace(read_status(run), name="n\x1b[5m")
    assert all(line.isprintable() for line in named.lines())


def test_nothing_is_overwritten(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    with pytest.raises(DirectoryNotEmpty):
        backup(run, tmp_path / "full")
    backup(run, tmp_path / "backup")
    with pytest.raises(DirectoryNotEmpty):
        restore(tmp_path / "backup", RunDirectory(tmp_path / "full"))
    assert contents(tmp_path / "full") == {"mine": b"mine"}
    (tmp_path / "empty").mkdir()
    assert restore(tmp_path / "backup", RunDirectory(tmp_path / "empty")).run == run.identity().run


def test_a_backup_of_no_run_or_into_the_run_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(DirectoryNotARun):
        backup(RunDirectory(tmp_path / "missing"), tmp_path / "backup")
    with pytest.raises(UsageError, match="inside"):
        backup(run, run.root / "backup")
    assert not (tmp_path / "backup").exists()
