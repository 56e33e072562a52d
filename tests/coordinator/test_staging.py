import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.staging import Staging
from protocol.documents import Digest
from protocol.errors import CoordinatorDiskFull, DeltaOversized, UploadInProgress, UploadOffsetWrong

ROOT = Path(__file__).parents[2]
CLAIM = Digest("c1" * 32)
OTHER = Digest("c2" * 32)


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "staging", reserve_bytes=0)


def test_an_upload_resumes_where_it_stopped_also_in_another_process(staging: Staging, tmp_path: Path) -> None:
    assert staging.offset(CLAIM, "delta") == 0
    assert staging.append(CLAIM, "delta", 0, b"first ", 11) == 6
    again = Staging(tmp_path / "staging", reserve_bytes=0)
    assert again.offset(CLAIM, "delta") == 6
    assert again.append(CLAIM, "delta", 6, b"then ", 11) == 11
    again.sync(CLAIM, "delta")
    assert again.path(CLAIM, "delta").read_bytes() == b"first then "


def test_claims_and_roles_have_files_of_their_own(staging: Staging) -> None:
    staging.append(CLAIM, "delta", 0, b"1", 9)
    staging.append(CLAIM, "moments", 0, b"22", 9)
    staging.append(OTHER, "delta", 0, b"333", 9)
    lengths = [staging.offset(CLAIM, "delta"), staging.offset(CLAIM, "moments"), staging.offset(OTHER, "delta")]
    assert lengths == [1, 2, 3]


@pytest.mark.parametrize("offset", [0, 4, 6])
def test_a_chunk_that_does_not_start_at_the_end_is_refused_with_both_numbers(staging: Staging, offset: int) -> None:
    staging.append(CLAIM, "delta", 0, b"five!", 99)
    with pytest.raises(UploadOffsetWrong, match=f"starts at byte {offset}, but 5 bytes are stored"):
        staging.append(CLAIM, "delta", offset, b"more", 99)
    assert staging.path(CLAIM, "delta").read_bytes() == b"five!"


def test_a_chunk_beyond_the_size_that_was_claimed_is_refused_whole(staging: Staging) -> None:
    staging.append(CLAIM, "delta", 0, b"five!", 8)
    with pytest.raises(DeltaOversized, match="would have 9 bytes; 8 are expected"):
        staging.append(CLAIM, "delta", 5, b"more", 8)
    assert staging.offset(CLAIM, "delta") == 5
    assert staging.append(CLAIM, "delta", 5, b"mor", 8) == 8


def test_two_connections_cannot_write_the_same_file_at_once(staging: Staging) -> None:
    staging.append(CLAIM, "delta", 0, b"first", 99)
    with staging.path(CLAIM, "delta").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UploadInProgress):
            staging.append(CLAIM, "delta", 5, b"second", 99)
    assert staging.append(CLAIM, "delta", 5, b"second", 99) == 11


def test_nothing_is_taken_that_would_touch_the_reserve(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    all_of_it = free.f_blocks * free.f_frsize
    staging = Staging(tmp_path / "staging", reserve_bytes=all_of_it)
    with pytest.raises(CoordinatorDiskFull):
        staging.append(CLAIM, "delta", 0, b"chunk", 99)
    assert staging.offset(CLAIM, "delta") == 0


@pytest.mark.parametrize(
    ("claim", "role"), [("../" + "0" * 61, "delta"), ("C1" * 32, "delta"), (CLAIM, "../delta"), (CLAIM, "")]
)
def test_a_malformed_claim_or_role_never_becomes_a_path(staging: Staging, claim: str, role: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        staging.append(Digest(claim), role, 0, b"chunk", 99)


def test_a_link_in_the_place_of_an_upload_is_not_followed(staging: Staging, tmp_path: Path) -> None:
    staging.append(OTHER, "delta", 0, b"x", 9)
    (tmp_path / "precious").write_bytes(b"")
    staging.path(CLAIM, "delta").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        staging.append(CLAIM, "delta", 0, b"chunk", 99)
    assert (tmp_path / "precious").read_bytes() == b""


def test_a_discarded_upload_begins_anew_and_discarding_again_is_harmless(staging: Staging) -> None:
    staging.append(CLAIM, "delta", 0, b"wrong", 99)
    staging.discard(CLAIM, "delta")
    staging.discard(CLAIM, "delta")
    assert staging.offset(CLAIM, "delta") == 0


def test_the_sweep_takes_old_uploads_only_and_nothing_that_is_not_one(staging: Staging, tmp_path: Path) -> None:
    assert staging.sweep(older_than_ms=0, now_ms=10**13) == 0
    staging.append(CLAIM, "delta", 0, b"old", 99)
    staging.append(OTHER, "delta", 0, b"new", 99)
    (tmp_path / "staging" / "README").touch()
    os.utime(staging.path(CLAIM, "delta"), (1_000, 1_000))
    os.utime(staging.path(OTHER, "delta"), (2_000, 2_000))
    os.utime(tmp_path / "staging" / "README", (1_000, 1_000))

    assert staging.sweep(older_than_ms=500_000, now_ms=1_500_000) == 0
    assert staging.sweep(older_than_ms=500_000, now_ms=1_500_001) == 1
    assert sorted(path.name for path in (tmp_path / "staging").iterdir()) == ["README", f"{OTHER}.delta"]


# --- a disk that is really full -----------------------------------------------------------------------------------

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from coordinator.staging import Staging
from protocol.errors import CoordinatorDiskFull
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
staging, claim = Staging(Path(sys.argv[1]), reserve_bytes=0), "c1" * 32
staging.append(claim, "delta", 0, bytes(600), 10_000)
try:
    staging.append(claim, "delta", 600, bytes(600), 10_000)
except CoordinatorDiskFull:
    print("told", staging.offset(claim, "delta"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(staging.append(claim, "delta", 600, bytes(600), 10_000))
"""


def test_a_file_that_can_grow_no_more_is_cut_back_and_continued_later(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert said.split() == ["told", "600", "1200"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_file_system_takes_no_half_chunk_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    staging = Staging(small_disk / "staging", reserve_bytes=-(2**40))  # without a reserve, to meet ENOSPC itself
    chunk = bytes(100_000)
    staging.append(OTHER, "delta", 0, chunk, 10**6)
    staging.append(CLAIM, "delta", 0, chunk, 10**6)
    with pytest.raises(CoordinatorDiskFull) as full:
        staging.append(CLAIM, "delta", 100_000, chunk, 10**6)
    assert "No space left" in full.value.private
    assert staging.offset(CLAIM, "delta") == 100_000

    staging.discard(OTHER, "delta")
    assert staging.append(CLAIM, "delta", 100_000, chunk, 10**6) == 200_000


def test_the_reserve_is_left_free_on_a_real_file_system(small_disk: Path) -> None:
    staging = Staging(small_disk / "staging", reserve_bytes=128 * 1024)
    staging.append(CLAIM, "delta", 0, bytes(100_000), 10**6)
    with pytest.raises(CoordinatorDiskFull):
        staging.append(CLAIM, "delta", 100_000, bytes(50_000), 10**6)
    free = os.statvfs(small_disk)
    assert free.f_bavail * free.f_frsize >= 128 * 1024
