"""The run's public files over plain HTTP or HTTPS: one address, no redirects, no way into the volunteer's own network.

What comes back is believed only by its signature or its SHA-256, so plain HTTP is as good as HTTPS; it is only less
private. The address was signed under the run's id.
"""

import ipaddress
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

from protocol.errors import AnswerInvalid, EndpointUntrusted, ServerBusy, Unreachable

CONNECT_SECONDS: Final = 15.0
READ_SECONDS: Final = 30.0
"""Longest silence in the middle of a transfer."""
_CHUNK: Final = 1 << 20
_BUSY: Final = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The rest of a file from `offset` on; the server may have answered with the whole file, then `offset` is 0."""

    offset: int
    response: HTTPResponse

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes as they come; raise `Unreachable` when the line breaks or stays silent."""
        while True:
            try:
                chunk = self.response.read1(_CHUNK)
            except (OSError, HTTPException) as error:
                raise Unreachable(f"The download broke off: {error or type(error).__name__}.") from None
            if not chunk:
                return
            yield chunk


class PublicSite:
    """The files under a run's public URL."""

    def __init__(self, url: str, *, allow_private: bool) -> None:
        """Take a signed public URL.

        Args:
            url: http or https.
            allow_private: whether addresses of private networks may be asked, which is right only if the run itself was
                joined at such an address.

        Raises:
            EndpointUntrusted: the URL is of another kind.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise EndpointUntrusted(f"The run's public address {url[:200]!r} is not a plain http or https address.")
        self.url = url.rstrip("/")
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port or (443 if self._secure else 80)
        self._prefix = parts.path.rstrip("/")
        self._allow_private = allow_private

    def document(self, path: str, max_bytes: int) -> bytes:
        """Return a whole small file.

        Raises:
            AnswerInvalid: it is larger than `max_bytes`; no more than that is read.
            Unreachable: the server does not answer, or has no such file (yet).
        """
        found = bytearray()
        with self.open(path) as body:
            for chunk in body.chunks():
                found += chunk
                if len(found) > max_bytes:
                    raise AnswerInvalid(f"{path} is larger than the {max_bytes:,} bytes that are taken.")
        return bytes(found)

    @contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[Body]:
        """Ask for a file from `offset` on.

        Raises:
            EndpointUntrusted: the server's name leads to a private address.
            Unreachable: the server does not answer, or has no such file (yet).
        """
        connection = self._connect()
        try:
            headers = {"User-Agent": "commonweight-worker", "Accept-Encoding": "identity"}
            if offset:
                headers["Range"] = f"bytes={offset}-"
            try:
                connection.request("GET", f"{self._prefix}/{path}", headers=headers)
                response = connection.getresponse()
            except (OSError, HTTPException) as error:
                raise Unreachable(f"{self.url} did not answer: {error or type(error).__name__}.") from None
            yield Body(offset=self._start(path, offset, response), response=response)
        finally:
            connection.close()

    def _start(self, path: str, offset: int, response: HTTPResponse) -> int:
        if response.status == 200:
            return 0
        if response.status == 206 and (response.headers["Content-Range"] or "").startswith(f"bytes {offset}-"):
            return offset
        if response.status in _BUSY:
            raise ServerBusy(f"{self.url} is busy (HTTP {response.status}).")
        # Redirects are not followed: they would be a way round the signed address.
        raise Unreachable(f"{self.url}/{path} can't be fetched: HTTP {response.status}.")

    def _connect(self) -> HTTPConnection:
        sock = self._open_socket()
        try:
            sock.settimeout(READ_SECONDS)
            if not self._secure:
                plain = HTTPConnection(self._host, self._port)
                plain.sock = sock
                return plain
            context = ssl.create_default_context()
            secure = HTTPSConnection(self._host, self._port, context=context)
            secure.sock = context.wrap_socket(sock, server_hostname=self._host)
        except OSError as error:
            sock.close()
            raise Unreachable(f"{self.url} did not answer: {error}.") from None
        return secure

    def _open_socket(self) -> socket.socket:
        # The very address that was looked at is connected to, so that a name can't change its meaning in between.
        problem: OSError | None = None
        for family, address in _resolve(self._host, self._port):
            if not self._allow_private and not is_public(address[0]):
                raise EndpointUntrusted(
                    f"The run's public address {self.url} leads to {address[0]}, inside a private network; "
                    "nothing was asked there."
                )
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(CONNECT_SECONDS)
            try:
                sock.connect(address)
            except OSError as error:
                sock.close()
                problem = error
            else:
                return sock
        raise Unreachable(f"{self.url} can't be reached: {problem or 'no address'}.")


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public Internet."""
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.is_global and not ip.is_multicast


def host_is_public(host: str, port: int) -> bool:
    """Return whether every address of a host is public; raise `Unreachable` if it has none."""
    return all(is_public(address[0]) for _, address in _resolve(host.strip("[]"), port))


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"The name {host[:100]} has no address: {error}.") from None
    return [(family, address) for family, _, _, _, address in found if family in (socket.AF_INET, socket.AF_INET6)]  # type: ignore[misc]
