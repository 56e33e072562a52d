"""Where the coordinator gets the time from: one injected clock, UTC milliseconds."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time. An implementation MUST never answer less than it answered before, from any thread."""

    def now_ms(self) -> int:
        """Return the UTC time in milliseconds since 1970."""
        ...


class WallClock:
    """The machine's clock, kept from going back: below `floor_ms` (the last time that was stored) or its last answer.

    A machine that starts with a wrong clock, or whose clock is set back, must neither reopen deadlines that have passed
    nor stand still until the clock has caught up: time then goes on at its own pace from where it was.
    """

    def __init__(self, floor_ms: int = 0) -> None:
        self._last_ms = floor_ms
        self._last_ticks = time.monotonic_ns()
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        """Return the wall clock, or the last answer and what has passed since, whichever is later."""
        with self._lock:
            ticks = time.monotonic_ns()
            passed_ms = (ticks - self._last_ticks) // 1_000_000
            self._last_ms = max(self._last_ms + passed_ms, time.time_ns() // 1_000_000)
            self._last_ticks += passed_ms * 1_000_000
            return self._last_ms


class ManualClock:
    """A clock that moves only when it is told to; for tests and for replaying a run's history."""

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        """Return the time it was last moved to."""
        return self._now_ms

    def advance(self, ms: int) -> int:
        """Move forward by `ms` milliseconds and return the new time; raise `ValueError` for a step back."""
        if ms < 0:
            raise ValueError(f"a clock does not go back ({ms} ms)")
        self._now_ms += ms
        return self._now_ms
