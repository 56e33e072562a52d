"""A server that is never silent and never done: one byte, and another one, for as long as anybody listens."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

SECONDS_BETWEEN: Final = 0.05

HEADER: Final = b"HTTP/1.1 200 OK\r\nX: "
CONTINUED: Final = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\nX: "
BODY: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n"
TRAILER: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: "


class DrippingServer:
    """Sends `opening`, then drips; `asked` is set when somebody is being dripped on."""

    def __init__(self, opening: bytes) -> None:
        self._opening = opening
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.asked = threading.Event()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._start(self._accept)

    def stop(self) -> None:
        """End all of its threads."""
        self._over.set()
        with socket.create_connection(self._socket.getsockname()):
            pass
        for thread in self._threads:
            thread.join()
        self._socket.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            peer, _ = self._socket.accept()
            if self._over.is_set():
                peer.close()
                return
            self._start(self._drip, peer)

    def _drip(self, peer: socket.socket) -> None:
        with peer:
            try:
                peer.recv(4096)
                peer.sendall(self._opening)
                self.asked.set()
                while not self._over.wait(SECONDS_BETWEEN):
                    peer.sendall(b"a")
            except OSError:
                return


@contextmanager
def dripping(opening: bytes) -> Iterator[DrippingServer]:
    """Serve in threads."""
    server = DrippingServer(opening)
    try:
        yield server
    finally:
        server.stop()
