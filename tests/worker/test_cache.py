"""Files are whole and right before they have a name, under the owner's cap, over a line that may break anywhere."""

import os
from pathlib import Path

import pytest

from protocol.canonical import sha256_hex
from protocol.documents import Digest
from protocol.errors import CacheTooSmall, DigestMismatch, DiskFull, ServerBusy, UnitAbandoned, Unreachable
from tests.worker.files_server import FilesServer, serving
from worker.cache import FileCache, Wanted
from worker.line import BreakOff
from worker.web import PublicSite

CONTENT = bytes(range(256)) * 4000


def publish(root: Path, name: str, content: bytes = CONTENT) -> Wanted:
    (root / name).write_bytes(content)
    return Wanted(path=name, sha256=Digest(sha256_hex(content)), size=len(content))


def fetch(cache: FileCache, server: FilesServer, wanted: Wanted, *keep: Digest) -> tuple[Path, int]:
    """Return the path and the bytes that travelled."""
    travelled: list[int] = []
    path = cache.fetch(
        PublicSite(server.url, allow_private=True),
        wanted,
        keep=keep,
        on_bytes=travelled.append,
    )
    return path, sum(travelled)


def test_a_file_is_fetched_once_and_then_found(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 30)
    with serving(tmp_path) as server:
        wanted = publish(tmp_path, "a")
        path, first = fetch(cache, server, wanted)
        _, second = fetch(cache, server, wanted)

    assert path.read_bytes() == CONTENT
    assert (first, second) == (len(CONTENT), 0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("cut", [1, 70_000, len(CONTENT) - 1])
def test_a_download_that_breaks_off_goes_on_from_there(tmp_path: Path, cut: int) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 30)
    with serving(tmp_path) as server:
        wanted = publish(tmp_path, "a")
        server.cut_after = cut
        with pytest.raises(Unreachable):
            fetch(cache, server, wanted)
        path, travelled = fetch(cache, server, wanted)

    assert path.read_bytes() == CONTENT
    assert server.requests[1] == ("/a", cut)
    assert travelled == len(CONTENT) - cut


def test_a_server_without_range_costs_traffic_and_nothing_else(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 30)
    with serving(tmp_path) as server:
        server.ignore_range = True
        wanted = publish(tmp_path, "a")
        server.cut_after = 1000
        with pytest.raises(Unreachable):
            fetch(cache, server, wanted)
        path, _ = fetch(cache, server, wanted)

    assert path.read_bytes() == CONTENT


def test_wrong_bytes_get_no_name_and_are_fetched_anew(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 30)
    with serving(tmp_path) as server:
        wanted = publish(tmp_path, "a")
        (tmp_path / "a").write_bytes(bytes(len(CONTENT)))
        with pytest.raises(DigestMismatch):
            fetch(cache, server, wanted)
        assert list((tmp_path / "cache/files").iterdir()) == []
        (tmp_path / "a").write_bytes(CONTENT)
        path, _ = fetch(cache, server, wanted)

    assert path.read_bytes() == CONTENT


def test_a_file_that_is_longer_than_was_signed_is_cut_off_early(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 30)
    with serving(tmp_path) as server:
        wanted = publish(tmp_path, "a", b"short")
        (tmp_path / "a").write_bytes(bytes(50_000_000))
        with pytest.raises(DigestMismatch, match="longer"):
            fetch(cache, server, wanted)

    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 2_000_000


def test_a_file_that_the_disk_has_damaged_is_fetched_again_by_the_next_process(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        wanted = publish(tmp_path, "a")
        path, _ = fetch(FileCache(tmp_path / "cache", 1 << 30), server, wanted)
        path.write_bytes(bytes(len(CONTENT)))
        path, _ = fetch(FileCache(tmp_path / "cache", 1 << 30), server, wanted)

    assert path.read_bytes() == CONTENT


def test_the_least_recently_used_file_makes_room_but_never_one_that_is_needed(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 2 * len(CONTENT))
    with serving(tmp_path) as server:
        old, older, new = (publish(tmp_path, name, name.encode() + CONTENT[1:]) for name in "abc")
        for number, wanted in enumerate((older, old)):
            path, _ = fetch(cache, server, wanted)
            os.utime(path, ns=(number, number))
        fetch(cache, server, new, older.sha256)

    kept = {path.name for path in (tmp_path / "cache/files").iterdir()}
    assert kept == {older.sha256, new.sha256}


def test_files_that_do_not_fit_under_the_cap_are_refused_with_both_numbers(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 3 << 30)
    wanted = [Wanted(path=name, sha256=Digest(name * 64), size=2 << 30) for name in "ab"]

    cache.check_fits(wanted[:1] * 5)  # one file, named five times
    with pytest.raises(CacheTooSmall, match=r"4\.0 GiB.*3\.0 GiB"):
        cache.check_fits(wanted)


def test_a_full_disk_keeps_what_has_come(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 30)
    with serving(tmp_path) as server:
        wanted = publish(tmp_path, "a")
        partial = tmp_path / "cache/partial" / wanted.sha256
        partial.symlink_to("/dev/full")
        with pytest.raises(DiskFull):
            fetch(cache, server, wanted)
        partial.unlink()
        path, _ = fetch(cache, server, wanted)

    assert path.read_bytes() == CONTENT


def test_a_download_can_be_broken_off(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 30)
    break_off = BreakOff()
    with serving(tmp_path) as server:
        wanted = publish(tmp_path, "a", bytes(200_000_000))
        site = PublicSite(server.url, allow_private=True, break_off=break_off)
        with pytest.raises(UnitAbandoned):
            cache.fetch(site, wanted, keep=(), on_bytes=lambda count: break_off.ask())
        with pytest.raises(UnitAbandoned):
            cache.fetch(site, wanted, keep=(), on_bytes=lambda count: None)

    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "error"), [(404, Unreachable), (503, ServerBusy), (429, ServerBusy)])
def test_a_server_that_says_no_is_asked_again_later(tmp_path: Path, status: int, error: type[Exception]) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 30)
    with serving(tmp_path) as server:
        server.answer = status
        with pytest.raises(error):
            fetch(cache, server, publish(tmp_path, "a"))
