"""The public HTTP process: static files with Range under a run's `public/` directory. No database, no keys.

A CDN or any web server over the same directory does as well.
"""

import asyncio
import logging
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar, Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from coordinator.ratelimit import address_prefix
from protocol import layout
from protocol.documents import Manifest, parse_payload
from protocol.envelope import parse_envelope
from protocol.limits import HTTP_HEADER_MS, MAX_HTTP_CONNECTIONS_PER_ADDRESS, MAX_PUBLIC_DOCUMENT_BYTES

_FOR_EVER = "public, max-age=31536000, immutable"
_NAMED_BY_CONTENT = ("checkpoints/", "shards/", "deltas/", "log/", "takedowns/")


class PublicFiles(StaticFiles):
    """Files whose names never change their content are cached for ever; hidden ones (half-made) are not there."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return the file, a part of it (Range), or 404."""
        if any(part.startswith(".") for part in path.split("/") if part != "."):
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        if path.startswith(_NAMED_BY_CONTENT) and path != layout.LOG_TAIL:
            response.headers["cache-control"] = _FOR_EVER
        else:
            response.headers["cache-control"] = "no-cache"
        response.headers["x-content-type-options"] = "nosniff"
        return response


_WELCOME: Final = """\
These are the public files of a Commonweight run. The newest checkpoint, with everything to check it:

  wget --force-directories --no-host-directories --input-file=URL/latest.txt

run.json        what the run is, signed by its root key
latest.json     the newest checkpoint's signed manifest
latest.txt      the addresses of the newest checkpoint's files
takedowns.json  the pictures that were taken down and are not trained on any more, once there are any, signed
checkpoints/NNNNNN/  deltas/  shards/  log/  metrics/  takedowns/
"""


def _welcome(request: Request) -> PlainTextResponse:
    return PlainTextResponse(_WELCOME.replace("URL/", str(request.base_url)))


def newest_files(public: Path, base_url: str) -> str:
    """Return the addresses of the newest checkpoint's files, one a line, as `wget --input-file` takes them."""
    envelope = parse_envelope(_read(public / layout.LATEST), max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)
    manifest = parse_payload(Manifest, envelope.payload)
    place = layout.checkpoint_directory(manifest.checkpoint)
    paths = [*(entry.path for entry in manifest.files), layout.MANIFEST]
    return "".join(f"{base_url}{place}/{path}\n" for path in paths)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise HTTPException(404) from None


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 that drops a new connection without a request, and strangers who hold too many connections.

    uvicorn waits for ever for the first request, and its own limit on connections would let one stranger's silent
    sockets shut out everybody.
    """

    _held: ClassVar[Counter[str]] = Counter()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and give it ten seconds for its first headers."""
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        family = "ipv6" if peer and ":" in peer[0] else "ipv4"
        self._prefix = address_prefix(f"{family}:{peer[0]}:{peer[1]}" if peer else "unknown")
        self._held[self._prefix] += 1
        if self._held[self._prefix] > MAX_HTTP_CONNECTIONS_PER_ADDRESS:
            transport.abort()
        self._patience = asyncio.get_running_loop().call_later(HTTP_HEADER_MS / 1000, self._drop_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._patience.cancel()
        self._held[self._prefix] -= 1
        if not self._held[self._prefix]:
            del self._held[self._prefix]
        super().connection_lost(exc)

    def _drop_silent(self) -> None:
        if getattr(self, "cycle", None) is None:
            self.transport.abort()


def application(public: Path) -> Starlette:
    """Return the ASGI application over a public directory."""

    def newest(request: Request) -> PlainTextResponse:
        return PlainTextResponse(newest_files(public, str(request.base_url)))

    return Starlette(
        routes=[
            Route("/", endpoint=_welcome),
            Route("/latest.txt", endpoint=newest),
            Route("/healthz", endpoint=lambda _: PlainTextResponse("ok\n")),
            Mount("/", app=PublicFiles(directory=public)),
        ]
    )


def main(arguments: list[str]) -> int:
    """Entry of the process: `python -P -m coordinator.public DIR SOCKET_FD LIFELINE_FD`."""
    from coordinator.lifeline import exit_with_parent, raise_file_limit

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s public: %(message)s")
    exit_with_parent(int(arguments[2]))
    raise_file_limit()
    config = uvicorn.Config(
        application(Path(arguments[0]) / "public"),
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=20,
        http=ImpatientProtocol,
        h11_max_incomplete_event_size=16_384,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(arguments[1]))])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
