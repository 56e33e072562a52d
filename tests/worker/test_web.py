"""The public address leads to public places only, and nowhere else by redirect."""

from pathlib import Path

import pytest

from protocol.errors import AnswerInvalid, EndpointUntrusted, Unreachable
from tests.worker.files_server import serving
from worker.web import PublicSite, host_is_public, is_public


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/run",
        "http://user:word@example.org/run",
        "http://example.org/run?x=1",
        "https:///run",
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
