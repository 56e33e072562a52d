"""What every implementation of `coordinator.blobs.BlobStore` must do; an implementation's test class inherits this."""

import hashlib
from pathlib import Path

import pytest

from coordinator.blobs import BlobStore
from protocol.documents import Digest
from protocol.errors import DigestMismatch


def staged(directory: Path, content: bytes, name: str = "upload") -> tuple[Path, Digest]:
    path = directory / name
    path.write_bytes(content)
    return path, Digest(hashlib.sha256(content).hexdigest())


class BlobConformance:
    """The suite. Each test names one MUST of the `BlobStore` docstrings."""

    def open_blobs(self, directory: Path) -> BlobStore:
        raise NotImplementedError

    @pytest.fixture
    def blobs(self, tmp_path: Path) -> BlobStore:
        return self.open_blobs(tmp_path)

    def test_a_blob_is_found_by_its_digest_also_after_opening_again(self, blobs: BlobStore, tmp_path: Path) -> None:
        path, sha256 = staged(tmp_path, b"delta")
        assert not blobs.has(sha256)
        blobs.add(path, sha256)
        for view in (blobs, self.open_blobs(tmp_path)):
            assert view.has(sha256)
            assert view.size(sha256) == 5
            assert view.path(sha256).read_bytes() == b"delta"
            assert list(view.digests()) == [sha256]
        assert not path.exists()

    def test_adding_again_changes_nothing(self, blobs: BlobStore, tmp_path: Path) -> None:
        path, sha256 = staged(tmp_path, b"delta")
        blobs.add(path, sha256)
        blobs.add(path, sha256)  # the call before a crash had already taken the file
        again, _ = staged(tmp_path, b"delta", "another upload")
        blobs.add(again, sha256)
        assert not again.exists()
        assert blobs.path(sha256).read_bytes() == b"delta"
        assert list(blobs.digests()) == [sha256]

    def test_another_size_under_the_same_digest_is_refused_and_the_first_stays(
        self, blobs: BlobStore, tmp_path: Path
    ) -> None:
        path, sha256 = staged(tmp_path, b"delta")
        blobs.add(path, sha256)
        other, _ = staged(tmp_path, b"another delta", "other")
        with pytest.raises(DigestMismatch):
            blobs.add(other, sha256)
        assert blobs.path(sha256).read_bytes() == b"delta"
        assert other.exists()

    def test_the_digest_is_taken_on_trust_since_the_caller_has_hashed(self, blobs: BlobStore, tmp_path: Path) -> None:
        path, _ = staged(tmp_path, b"delta")
        blobs.add(path, Digest("0" * 64))
        assert blobs.path(Digest("0" * 64)).read_bytes() == b"delta"

    def test_adding_what_is_nowhere_raises(self, blobs: BlobStore, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            blobs.add(tmp_path / "nothing", Digest("0" * 64))
        assert list(blobs.digests()) == []

    def test_a_removed_blob_is_gone_and_removing_again_is_harmless(self, blobs: BlobStore, tmp_path: Path) -> None:
        path, sha256 = staged(tmp_path, b"delta")
        blobs.add(path, sha256)
        blobs.remove(sha256)
        blobs.remove(sha256)
        assert not blobs.has(sha256)
        with pytest.raises(FileNotFoundError):
            blobs.size(sha256)

    def test_digests_come_in_order(self, blobs: BlobStore, tmp_path: Path) -> None:
        added = []
        for number in range(20):
            path, sha256 = staged(tmp_path, b"delta %d" % number)
            blobs.add(path, sha256)
            added.append(sha256)
        assert list(blobs.digests()) == sorted(added)

    @pytest.mark.parametrize("bad", ["", "abc", "A" * 64, "0" * 63 + "\n", "../" + "0" * 61, "0" * 64 + "\n"])
    def test_what_is_no_digest_never_becomes_a_path(self, blobs: BlobStore, tmp_path: Path, bad: str) -> None:
        path, _ = staged(tmp_path, b"delta")
        for attempt in (blobs.path, blobs.has, blobs.size, blobs.remove):
            with pytest.raises(ValueError, match="not a SHA-256"):
                attempt(Digest(bad))
        with pytest.raises(ValueError, match="not a SHA-256"):
            blobs.add(path, Digest(bad))
        assert path.exists()
