"""The public HTTP process: static files with Range under a run's `public/` directory. No database, no keys.

A CDN or any web server over the same directory does as well.
"""

import logging
import socket
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from protocol import layout

_FOR_EVER = "public, max-age=31536000, immutable"
_NAMED_BY_CONTENT = ("checkpoints/", "shards/", "deltas/", "log/")


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


def application(public: Path) -> Starlette:
    """Return the ASGI application over a public directory."""
    return Starlette(
        routes=[
            Route("/healthz", endpoint=lambda _: PlainTextResponse("ok\n")),
            Mount("/", app=PublicFiles(directory=public)),
        ]
    )


def main(arguments: list[str]) -> int:
    """Entry of the process: `python -P -m coordinator.public DIR SOCKET_FD LIFELINE_FD`."""
    from coordinator.lifeline import exit_with_parent

    logging.basicConfig(level=logging.INFO, format="%(levelname)s public: %(message)s")
    exit_with_parent(int(arguments[2]))
    config = uvicorn.Config(
        application(Path(arguments[0]) / "public"),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=20,
        limit_concurrency=512,
        h11_max_incomplete_event_size=16_384,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(arguments[1]))])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
