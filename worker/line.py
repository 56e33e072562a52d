"""A connection to a file server that need not be honest: it answers in time, keeps a pace, and can be cut at any time.

A timeout of a socket begins anew with each byte, so that a server that drips holds its reader for ever. Here every
read is under a deadline, which only enough bytes move on; and whoever asks to break off ends a read that is under way.
"""

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from protocol.errors import UnitAbandoned
from protocol.limits import KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How slow a server may be: its whole header in `header_seconds`, a word now and then, `bytes` in each window."""

    header_seconds: float
    silence_seconds: float
    window_seconds: float
    bytes: int


DEFAULT_PACE: Final = Pace(header_seconds=30.0, silence_seconds=30.0, window_seconds=60.0, bytes=64 * KIB)
"""64 KiB a minute is a modem of the eighties."""


class BreakOff:
    """A request to end every transfer at once. It is made once, from any thread, and stays."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._sockets: set[socket.socket] = set()

    def ask(self) -> None:
        """End what is under way, and let nothing begin any more."""
        with self._lock:
            self._asked = True
            for sock in self._sockets:
                with suppress(OSError):
                    # The plain socket's method: TLS's own would take the session away from the thread that reads.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise `UnitAbandoned` if somebody asked."""
        if self._asked:
            raise UnitAbandoned("The download was broken off on request; it goes on from here next time.")

    @contextmanager
    def covering(self, sock: socket.socket) -> Iterator[None]:
        """Cut this socket when somebody asks meanwhile; raise `UnitAbandoned` if somebody did already."""
        with self._lock:
            self.check()
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)


class Line:
    """What `http.client` takes for its socket."""

    def __init__(self, sock: socket.socket, break_off: BreakOff, pace: Pace) -> None:
        self._sock = sock
        self._break_off = break_off
        self._pace = pace
        self._came = 0
        self._ends = time.monotonic() + pace.header_seconds
        self._complaint = f"there was no whole answer in {pace.header_seconds:g} seconds"

    def begin_body(self) -> None:
        """From here on the deadline is that of the first bytes of the body."""
        self._next_window()
        self._complaint = f"less than {self._pace.bytes:,} bytes came in {self._pace.window_seconds:g} seconds"

    def came(self, count: int) -> None:
        """Count bytes of the body. Only these move the deadline on: framing around nothing does not."""
        self._came += count
        if self._came >= self._pace.bytes:
            self._next_window()

    def extend(self, seconds: float) -> None:
        """Do not count time that passed on our side."""
        self._ends += seconds

    def receive_into(self, buffer: memoryview) -> int:
        """Read what there is.

        Raises:
            TimeoutError: nothing came for too long, or the deadline has passed.
            UnitAbandoned: somebody asked to break off.
        """
        self._break_off.check()
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError(self._complaint)
        try:
            self._sock.settimeout(min(left, self._pace.silence_seconds))
            count = self._sock.recv_into(buffer)
        except TimeoutError:
            self._break_off.check()
            silent = left > self._pace.silence_seconds
            silence = f"nothing came for {self._pace.silence_seconds:g} seconds"
            raise TimeoutError(silence if silent else self._complaint) from None
        except OSError:
            self._break_off.check()
            raise
        if not count:
            self._break_off.check()
        return count

    def sendall(self, data: bytes) -> None:
        """Send a request."""
        self._sock.settimeout(self._pace.silence_seconds)
        try:
            self._sock.sendall(data)
        except OSError:
            self._break_off.check()
            raise

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the answer as a file; `mode` is always "rb"."""
        assert mode == "rb"
        return io.BufferedReader(_Reads(self))

    def close(self) -> None:
        """Do nothing: `http.client` lets go while the answer is still being read; the socket's owner closes it."""

    def _next_window(self) -> None:
        self._came = 0
        self._ends = time.monotonic() + self._pace.window_seconds


class _Reads(io.RawIOBase):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._line.receive_into(buffer)
