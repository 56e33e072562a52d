import os
from pathlib import Path

import pytest

from coordinator.blobs import BlobStore, DirectoryBlobs
from tests.coordinator.blob_conformance import BlobConformance, staged


class TestDirectoryBlobs(BlobConformance):
    def open_blobs(self, directory: Path) -> BlobStore:
        return DirectoryBlobs(directory / "blobs")


def test_a_blob_lies_under_the_first_two_digits_of_its_digest_and_cannot_be_written(tmp_path: Path) -> None:
    path, sha256 = staged(tmp_path, b"delta")
    blobs = DirectoryBlobs(tmp_path / "blobs")
    blobs.add(path, sha256)
    place = tmp_path / "blobs" / "sha256" / sha256[:2] / sha256
    assert blobs.path(sha256) == place
    assert place.stat().st_mode & 0o777 == 0o444


def test_what_somebody_else_put_there_is_no_blob(tmp_path: Path) -> None:
    path, sha256 = staged(tmp_path, b"delta")
    blobs = DirectoryBlobs(tmp_path / "blobs")
    blobs.add(path, sha256)
    (blobs.path(sha256).parent / "lost.tmp").touch()
    (tmp_path / "blobs" / "sha256" / "README").touch()
    assert list(blobs.digests()) == [sha256]


def test_a_blob_and_every_directory_above_it_are_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    path, sha256 = staged(tmp_path, b"delta")
    DirectoryBlobs(tmp_path / "blobs").add(path, sha256)
    root = (tmp_path / "blobs").resolve()
    assert set(synced) == {root.parent, root, root / "sha256", root / "sha256" / sha256[:2]}
