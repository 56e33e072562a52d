"""The run's public files over plain HTTP or HTTPS: one address, no redirects, no way into the volunteer's own network.

What comes back is believed only by its signature or its SHA-256, so plain HTTP is as good as HTTPS; it is only less
private. The address was signed under the run's id.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Final, cast
from urllib.parse import urlsplit

from protocol.errors import AnswerInvalid, EndpointUntrusted, NotServed, ServerBusy, Unreachable
from worker.line import DEFAULT_PACE, BreakOff, Line, Pace

CONNECT_SECONDS: Final = 15.0
_MOST_ADDRESSES: Final = 8
"""Addresses of one name that are tried; a name server of a stranger can give any number."""
_CHUNK: Final = 1 << 20
_NO_SUCH_FILE: Final = 404
_BUSY: Final = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The rest of a file from `offset` on; the server may have answered with the whole file, then `offset` is 0."""

    offset: int
    response: HTTPResponse
    line: Line

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes as they come; raise `Unreachable` when the line breaks, stays silent or only drips."""
        while True:
            try:
                chunk = self.response.read1(_CHUNK)
            except (OSError, HTTPException) as error:
                raise Unreachable(f"The download broke off: {error or type(error).__name__}.") from None
            if not chunk:
                return
            self.line.came(len(chunk))
            handed_over = time.monotonic()
            yield chunk
            self.line.extend(time.monotonic() - handed_over)


class PublicSite:
    """The files under a run's public URL."""

    def __init__(
        self, url: str, *, allow_private: bool, break_off: BreakOff | None = None, pace: Pace = DEFAULT_PACE
    ) -> None:
        """Take a signed public URL.

        Args:
            url: http or https.
            allow_private: whether addresses of private networks may be asked, which is right only if the run itself was
                joined at such an address.
            break_off: ends transfers at once, also one in which a thread waits; raises `UnitAbandoned` there.
            pace: how slow the server may be.

        Raises:
            EndpointUntrusted: the URL is of another kind.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
            plain = parts.scheme in ("http", "https") and parts.hostname and port != 0 and _is_plain(url)
        except ValueError:  # an address in brackets that is none, or a port that is no number up to 65535
            plain = False
        if not plain or parts.username is not None or parts.query:
            raise EndpointUntrusted(f"The run's public address {url[:200]!r} is not a plain http or https address.")
        self.url = url.rstrip("/")
        self._host = parts.hostname or ""
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (80 if self._tls is None else 443)
        self._allow_private = allow_private
        self._break_off = break_off or BreakOff()
        self._pace = pace

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
            UnitAbandoned: the transfer was broken off.
        """
        sock = self._connect()
        try:
            with self._break_off.covering(sock):
                line = Line(sock, self._break_off, self._pace)
                response = self._ask(line, path, offset)
                line.begin_body()
                yield Body(offset=self._start(path, offset, response), response=response, line=line)
        finally:
            sock.close()

    def _ask(self, line: Line, path: str, offset: int) -> HTTPResponse:
        headers = {"User-Agent": "commonweight-worker", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        if self._tls is None:
            connection = HTTPConnection(self._host, self._port)
        else:
            connection = HTTPSConnection(self._host, self._port, context=self._tls)
        connection.sock = cast("socket.socket", line)  # it has all of a socket that http.client uses
        try:
            connection.request("GET", f"{self._prefix}/{path}", headers=headers)
            return connection.getresponse()
        except (OSError, HTTPException) as error:
            raise Unreachable(f"{self.url} did not answer: {error or type(error).__name__}.") from None

    def _start(self, path: str, offset: int, response: HTTPResponse) -> int:
        if response.status == 200:
            return 0
        if response.status == 206 and (response.headers["Content-Range"] or "").startswith(f"bytes {offset}-"):
            return offset
        if response.status in _BUSY:
            raise ServerBusy(f"{self.url} is busy (HTTP {response.status}).")
        if response.status == _NO_SUCH_FILE:
            raise NotServed(f"{self.url} has no file {path}.")
        # Redirects are not followed: they would be a way round the signed address.
        raise Unreachable(f"{self.url}/{path} can't be fetched: HTTP {response.status}.")

    def _connect(self) -> socket.socket:
        sock = self._open_socket()
        try:
            sock.settimeout(self._pace.silence_seconds)
            if self._tls is None:
                return sock
            # The handshake is begun apart, so that it can be broken off: its timeout is for all of it.
            secure = self._tls.wrap_socket(sock, server_hostname=self._host, do_handshake_on_connect=False)
            sock = secure
            with self._break_off.covering(secure):
                secure.do_handshake()
        except ValueError as error:
            sock.close()
            raise EndpointUntrusted(f"{self.url} has a name that TLS does not take: {error}.") from None
        except OSError as error:
            sock.close()
            self._break_off.check()
            raise Unreachable(f"{self.url} did not answer: {error}.") from None
        except BaseException:
            sock.close()
            raise
        return sock

    def _open_socket(self) -> socket.socket:
        # The very address that was looked at is connected to, so that a name can't change its meaning in between.
        problem: OSError | None = None
        for family, address in _resolve(self._host, self._port)[:_MOST_ADDRESSES]:
            if not self._allow_private and not is_public(address[0]):
                raise EndpointUntrusted(
                    f"The run's public address {self.url} leads to {address[0]}, inside a private network; "
                    "nothing was asked there."
                )
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(CONNECT_SECONDS)
            try:
                with self._break_off.covering(sock):
                    sock.connect(address)
            except OSError as error:
                sock.close()
                problem = error
                self._break_off.check()
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise Unreachable(f"{self.url} can't be reached: {problem or 'no address'}.")


def _is_plain(url: str) -> bool:
    """Return whether a URL holds nothing that http.client would refuse, or that a person would not see."""
    return url.isascii() and url.isprintable() and " " not in url


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
