"""Whatever way the weights of a checkpoint come, they are the same bytes, and no more is fetched than need be."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protocol import layout
from protocol.documents import Manifest
from protocol.errors import BytesRefused, NotServed
from protocol.trust import RunTrust
from tests.verify.examples import RUN, PublishedRun, publish_run
from tests.worker.files_server import FilesServer, serving
from verify.plain_files import file_sha256
from worker.cache import FileCache
from worker.library import Library, Needs
from worker.line import BreakOff
from worker.public_files import DirectoryFiles, believe, fetch_materials

UNITS = (((1, 0), (1, 1)), ((2, 0), (2, 1)), ((3, 0), (3, 1)))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    torch.set_num_threads(1)
    return publish_run(tmp_path_factory.mktemp("run") / "public", merged_units=UNITS)


@pytest.fixture
def mirror(published: PublishedRun, tmp_path: Path) -> Iterator["Mirror"]:
    run = published.copy(tmp_path / "mirror")
    with serving(run.public) as server:
        yield Mirror(run, server, tmp_path / "cache")


class Mirror:
    """A run's public files behind a real server, and a worker's library."""

    def __init__(self, run: PublishedRun, server: FilesServer, cache: Path) -> None:
        self.run = run
        self.server = server
        self.cache = cache
        self.trust: RunTrust = believe(DirectoryFiles(run.public), RUN)

    def fetch(self, checkpoint: int, cap_bytes: int = 1 << 30) -> tuple[Path, list[str]]:
        """Return the weights' path, and the model files that were asked for."""
        library = Library(
            FileCache(self.cache, cap_bytes),
            self.run.config,
            allow_private=True,
            break_off=BreakOff(),
            tell=lambda _: None,
        )
        before = len(self.server.requests)
        found = library.fetch(self.server.url, self.trust, Needs(round=checkpoint + 1, shards=()))
        asked = [path.removeprefix("/checkpoints/") for path, _ in self.server.requests[before:]]
        return found.base, [path for path in asked if not path.endswith(layout.MANIFEST)]

    def sha256(self, checkpoint: int) -> str:
        return self.run.manifest(checkpoint).file(layout.WEIGHTS).sha256

    def alter(self, checkpoint: int, name: str) -> str:
        """Flip a bit at a file's end, sign for what it is now, and return its SHA-256."""
        path = self.run.checkpoint(checkpoint) / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        sha256 = file_sha256(path)

        def forged(manifest: Manifest) -> Manifest:
            files = (replace(entry, sha256=sha256) if entry.path == name else entry for entry in manifest.files)
            return replace(manifest, files=tuple(files))

        self.run.forge(checkpoint, forged)
        return sha256

    def thin(self, checkpoint: int) -> None:
        """Leave of a checkpoint what the coordinator leaves of one that is no snapshot."""

        def older(manifest: Manifest) -> Manifest:
            return replace(manifest, snapshot=checkpoint - 1)

        self.run.forge(checkpoint, older)
        for path in layout.STATE:
            (self.run.checkpoint(checkpoint) / path).unlink()


def weights(number: int) -> str:
    return f"{number:06d}/{layout.WEIGHTS}"


def patch(number: int) -> str:
    return f"{number:06d}/{layout.PATCH}"


def test_a_newcomer_fetches_the_weights_whole(mirror: Mirror) -> None:
    path, asked = mirror.fetch(2)
    assert file_sha256(path) == mirror.sha256(2)
    assert asked == [weights(2)]


def test_who_has_the_checkpoint_before_fetches_its_patch_alone(mirror: Mirror) -> None:
    mirror.fetch(1)
    path, asked = mirror.fetch(2)
    assert file_sha256(path) == mirror.sha256(2)
    assert asked == [patch(2)]
    assert mirror.fetch(2)[1] == []


def test_who_was_away_for_some_rounds_fetches_all_the_patches_since(mirror: Mirror) -> None:
    mirror.fetch(1)
    path, asked = mirror.fetch(3)
    assert file_sha256(path) == mirror.sha256(3)
    assert sorted(asked) == [patch(2), patch(3)]


def test_who_has_no_room_for_two_models_fetches_the_weights_whole(mirror: Mirror) -> None:
    cap = mirror.run.manifest(2).file(layout.WEIGHTS).size * 3 // 2
    mirror.fetch(1, cap)
    path, asked = mirror.fetch(2, cap)
    assert file_sha256(path) == mirror.sha256(2)
    assert asked == [weights(2)]


def test_weights_that_are_not_kept_follow_from_the_snapshot_before_them(mirror: Mirror) -> None:
    mirror.thin(2)
    path, asked = mirror.fetch(2)
    assert file_sha256(path) == mirror.sha256(2)
    assert asked == [weights(2), weights(1), patch(2)]


def test_a_patch_that_leads_elsewhere_is_not_believed_and_the_weights_are_fetched_whole(mirror: Mirror) -> None:
    """Its bytes are as signed, but what it leads to is not."""
    mirror.fetch(1)
    signed = mirror.alter(2, layout.WEIGHTS)
    path, asked = mirror.fetch(2)
    assert file_sha256(path) == signed
    assert asked == [patch(2), weights(2)]


def test_a_patch_that_is_none_costs_its_bytes_and_no_more(mirror: Mirror) -> None:
    mirror.fetch(1)
    mirror.alter(2, layout.PATCH)
    path, asked = mirror.fetch(2)
    assert file_sha256(path) == mirror.sha256(2)
    assert asked == [patch(2), weights(2)]


def test_where_only_a_bad_patch_is_left_nothing_is_believed(mirror: Mirror) -> None:
    mirror.alter(2, layout.PATCH)
    mirror.thin(2)
    with pytest.raises(BytesRefused):
        mirror.fetch(2)


def test_weights_that_nobody_keeps_are_said_to_be_missing(mirror: Mirror) -> None:
    (mirror.run.checkpoint(2) / layout.WEIGHTS).unlink()
    with pytest.raises(NotServed, match="has no file"):
        mirror.fetch(2)


def test_from_a_directory_old_weights_are_made_beside_it_and_not_in_it(mirror: Mirror, tmp_path: Path) -> None:
    mirror.thin(2)
    before = sorted(mirror.run.public.rglob("*"))
    needs = Needs(round=3, shards=())
    base = fetch_materials(DirectoryFiles(mirror.run.public, tmp_path / "made"), mirror.trust, needs).base
    assert file_sha256(base) == mirror.sha256(2)
    assert sorted(mirror.run.public.rglob("*")) == before
    with pytest.raises(NotServed, match="not kept any more"):
        fetch_materials(DirectoryFiles(mirror.run.public), mirror.trust, needs)


def test_old_manifests_make_room_for_new_ones_and_not_for_themselves(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.library._MANIFESTS_KEPT", 1)
    mirror.fetch(1)
    path, asked = mirror.fetch(3)
    assert file_sha256(path) == mirror.sha256(3)
    assert sorted(asked) == [patch(2), patch(3)]
