"""The public address leads to public places only, and nowhere else by redirect."""

import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol.errors import AnswerInvalid, EndpointUntrusted, UnitAbandoned, Unreachable
from tests.worker.dripping import BODY, CONTINUED, HEADER, TRAILER, dripping
from tests.worker.files_server import serving
from worker.line import BreakOff, Pace
from worker.web import PublicSite, host_is_public, is_public


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/run",
        "http://user:word@example.org/run",
        "http://example.org/run?x=1",
        "https:///run",
        "http://127.0.0.1:99999",
        "http://h:x/",
        "http://h:0/",
        "http://[::1/",
        "http://exam ple.org/",
        "http://example.org/\r\nX: y",
        "http://ex\u00e4mple.org/",
    ],
)
def test_other_addresses_than_plain_http_are_refused(url: str) -> None:
    with pytest.raises(EndpointUntrusted):
        PublicSite(url, allow_private=True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
    ],
)
def test_private_addresses_are_known(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_private_address_is_not_asked_unless_the_run_is_private_itself(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    with serving(tmp_path) as server:
        with pytest.raises(EndpointUntrusted, match=r"127\.0\.0\.1"):
            PublicSite(server.url, allow_private=False).document("a", 100)
        assert server.requests == []
        assert PublicSite(server.url, allow_private=True).document("a", 100) == b"text"


def test_a_name_that_leads_into_the_own_network_is_refused_too(tmp_path: Path) -> None:
    with serving(tmp_path) as server, pytest.raises(EndpointUntrusted):
        PublicSite(f"http://localhost:{server.server_port}", allow_private=False).document("a", 100)
    assert server.requests == []
    assert not host_is_public("localhost", 80)
    assert host_is_public("8.8.8.8", 443)


def test_redirects_are_not_followed(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.redirect_to = server.url + "/b"
        with pytest.raises(Unreachable, match="302"):
            PublicSite(server.url, allow_private=True).document("a", 100)

    assert server.requests == [("/a", 0)]


def test_a_document_beyond_its_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10_000_000))
    with serving(tmp_path) as server, pytest.raises(AnswerInvalid, match="larger"):
        PublicSite(server.url, allow_private=True).document("a", 1000)


def test_a_server_that_is_gone_is_unreachable(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        url = server.url
    with pytest.raises(Unreachable):
        PublicSite(url, allow_private=True).document("a", 100)


SHORT = Pace(header_seconds=0.5, silence_seconds=0.5, window_seconds=0.6, bytes=1000)
OPENINGS = {"header": HEADER, "continued": CONTINUED, "body": BODY, "trailer": TRAILER}


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
def test_a_server_that_only_drips_is_left_in_time(opening: bytes) -> None:
    with dripping(opening) as server:
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"no whole answer in 0\.5|less than 1,000 bytes came in 0\.6"):
            PublicSite(server.url, allow_private=True, pace=SHORT).document("a", 10_000)
    assert 0.4 < time.monotonic() - began < 5


def test_a_silent_server_is_left_in_time_and_called_silent() -> None:
    quiet = Pace(header_seconds=60, silence_seconds=0.2, window_seconds=60, bytes=1000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        site = PublicSite(f"http://127.0.0.1:{server.getsockname()[1]}", allow_private=True, pace=quiet)
        with pytest.raises(Unreachable, match=r"nothing came for 0\.2 seconds"):
            site.document("a", 100)


def test_time_that_passes_on_our_own_side_is_not_held_against_the_server(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(5_000_000))
    pace = Pace(header_seconds=5, silence_seconds=5, window_seconds=0.3, bytes=4_000_000)
    with (
        serving(tmp_path) as server,
        PublicSite(server.url, allow_private=True, pace=pace).open("a") as body,
    ):
        received = 0
        for chunk in body.chunks():
            if not received:
                time.sleep(0.6)
            received += len(chunk)
    assert received == 5_000_000


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
def test_a_read_that_waits_is_broken_off_from_another_thread(opening: bytes) -> None:
    break_off = BreakOff()
    ended: list[BaseException] = []

    def fetch(url: str) -> None:
        try:
            PublicSite(url, allow_private=True, break_off=break_off).document("a", 10_000)
        except UnitAbandoned as abandoned:
            ended.append(abandoned)

    with dripping(opening) as server:
        thread = threading.Thread(target=fetch, args=(server.url,))
        thread.start()
        assert server.asked.wait(10)
        break_off.ask()
        thread.join(5)
        assert not thread.is_alive()
    assert len(ended) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_never_says_a_word_is_broken_off_too(scheme: str) -> None:
    break_off = BreakOff()
    with socket.create_server(("127.0.0.1", 0)) as server:
        site = PublicSite(f"{scheme}://127.0.0.1:{server.getsockname()[1]}", allow_private=True, break_off=break_off)
        timer = threading.Timer(0.3, break_off.ask)
        timer.start()
        began = time.monotonic()
        with pytest.raises(UnitAbandoned):
            site.document("a", 100)
        timer.join()
    assert time.monotonic() - began < 5


def test_an_attempt_to_connect_is_broken_off_too() -> None:
    break_off = BreakOff()
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # the kernel leaves what comes after these without an answer
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        site = PublicSite(f"http://127.0.0.1:{server.getsockname()[1]}", allow_private=True, break_off=break_off)
        timer = threading.Timer(0.3, break_off.ask)
        timer.start()
        began = time.monotonic()
        with pytest.raises(UnitAbandoned):
            site.document("a", 100)
        timer.join()
    assert 0.2 < time.monotonic() - began < 5
