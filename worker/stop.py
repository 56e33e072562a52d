"""Being asked to stop: once means finish what is nearly done, twice (or SIGTERM) means now."""

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import suppress
from enum import IntEnum, unique
from typing import Any, TypeVar

from protocol.errors import CommonweightError

T = TypeVar("T")


@unique
class StopLevel(IntEnum):
    """How much of a hurry there is."""

    NONE = 0
    SOON = 1
    NOW = 2


class Stop:
    """A request that only grows. `level` may be read from any thread; everything else belongs to the event loop."""

    __slots__ = ("asked", "level", "now")

    def __init__(self) -> None:
        self.level = StopLevel.NONE
        self.asked = asyncio.Event()
        self.now = asyncio.Event()

    def ask(self) -> None:
        """Ask once more."""
        self.raise_to(StopLevel.SOON if self.level is StopLevel.NONE else StopLevel.NOW)

    def raise_to(self, level: StopLevel) -> None:
        """Ask with at least this much hurry."""
        self.level = max(self.level, level)
        if self.level >= StopLevel.SOON:
            self.asked.set()
        if self.level >= StopLevel.NOW:
            self.now.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until somebody asks."""
        if self.asked.is_set():
            return
        try:
            async with asyncio.timeout(seconds):
                await self.asked.wait()
        except TimeoutError:
            return

    async def before_asked(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Return the result of `work`; break it off and return None if somebody asks meanwhile."""
        task = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self.asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return await task
            task.cancel()
            with suppress(asyncio.CancelledError, CommonweightError):
                await task
            return None
        finally:
            asked.cancel()
            task.cancel()

    def listen(self) -> None:
        """Take SIGINT as a request, SIGTERM as an urgent one. Main thread only."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self.ask)
        loop.add_signal_handler(signal.SIGTERM, self.raise_to, StopLevel.NOW)
