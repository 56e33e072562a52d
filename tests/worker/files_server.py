"""A real HTTP server with Range over a directory, which can be told to behave badly."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast


class FilesServer(ThreadingHTTPServer):
    """Serves files and remembers what was asked for."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[tuple[str, int]] = []
        self.cut_after: int | None = None
        self.ignore_range = False
        self.answer: int | None = None
        self.redirect_to: str | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = cast("FilesServer", self.server)
        path = server.root / self.path.lstrip("/")
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")
        offset = 0 if server.ignore_range or match is None else int(match[1])
        server.requests.append((self.path, offset))
        if server.redirect_to is not None:
            self.send_response(302)
            self.send_header("Location", server.redirect_to)
            self.end_headers()
            return
        if server.answer is not None or not path.is_file():
            self.send_error(server.answer or 404)
            return
        content = path.read_bytes()
        self.send_response(206 if offset else 200)
        self.send_header("Content-Length", str(len(content) - offset))
        if offset:
            self.send_header("Content-Range", f"bytes {offset}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[offset:]
        if server.cut_after is not None:
            body, server.cut_after = body[: server.cut_after], None
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


@contextmanager
def serving(root: Path) -> Iterator[FilesServer]:
    """Serve a directory in a thread."""
    server = FilesServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
