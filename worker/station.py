"""What a worker and an auditor have in common around their work: a coordinator, patience, a disk, and an ear for stops.

    async with Station(join, backoff=..., reporter=..., stop=..., farewell=...) as station:
        link = await station.connect(client)        # None: asked to stop meanwhile
        library = await station.library(cache, config, networks=...)

When it is left, transfers are broken off and the disk's thread is let go.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from protocol.documents import RunConfig
from protocol.errors import TryLater, Unreachable
from protocol.join import JoinString
from verify.hearing import heard_by_trainers
from worker.backoff import Backoff
from worker.cache import FileCache
from worker.calling import Caller
from worker.library import Library
from worker.line import BreakOff
from worker.link import Link
from worker.machine import Machine
from worker.patience import Patience
from worker.progress import Event, Loading, Ready, Stopping
from worker.reporters import Reporter
from worker.stop import Stop, StopLevel
from worker.threads import OneThread
from worker.trainer import plan_for, prepare
from worker.web import host_is_public

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Farewell:
    """What is said when somebody asks to stop: soon, or at once."""

    soon: str
    now: str


class Station:
    """One process's place at one coordinator. Made and used in the event loop."""

    def __init__(
        self, join: JoinString, *, backoff: Backoff, reporter: Reporter, stop: Stop, farewell: Farewell
    ) -> None:
        self.join = join
        self.reporter = reporter
        self.stop = stop
        self.patience = Patience(backoff, secrets.SystemRandom().random, reporter, stop)
        self.disk = OneThread("disk")
        self._break_off = BreakOff()
        self._farewell = farewell
        self._loop = asyncio.get_running_loop()
        self._hearing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._hearing = asyncio.create_task(self._hear(), name="hear")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hearing is not None
        self._hearing.cancel()
        self._break_off.ask()
        self.disk.close()

    async def connect(self, caller: Caller) -> Link | None:
        """Return the believed connection, however long it takes; None if asked to stop meanwhile.

        Raises:
            EndpointUntrusted, DelegationInvalid: see `open_link`.
        """
        return await self.patiently(caller.connect, advice="Check host and port of the join string.")

    async def library(self, cache: FileCache, config: RunConfig, *, networks: Path | None) -> Library | None:
        """Return the run's public files; None if asked to stop meanwhile.

        Args:
            networks: see `Materials`.
        """
        join = self.join
        # Whoever joins a run inside a private network must reach its files there; nobody else may be led into one.
        public = await self.patiently(lambda: asyncio.to_thread(host_is_public, join.host, join.port))
        if public is None:
            return None
        return Library(
            cache,
            config,
            allow_private=not public,
            networks=networks,
            break_off=self._break_off,
            tell=self._tell_from_thread,
        )

    async def patiently(self, call: Callable[[], Coroutine[Any, Any, T]], *, advice: str = "") -> T | None:
        """Return what the call returns, however long it takes; None if asked to stop meanwhile.

        Args:
            advice: a sentence that is added when nobody answers.
        """
        while not self.stop.asked.is_set():
            try:
                return await self.stop.before_asked(call())
            except TryLater as error:
                await self.patience.after(error, advice=advice if isinstance(error, Unreachable) else "")
        return None

    def _tell_from_thread(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self.reporter.report, event)

    async def _hear(self) -> None:
        await self.stop.asked.wait()
        now = self.stop.level is StopLevel.NOW
        self.reporter.report(Stopping(reason=self._farewell.now if now else self._farewell.soon))
        self._break_off.ask()


async def make_ready(
    training: OneThread, machine: Machine, config: RunConfig, networks: Path | None, reporter: Reporter
) -> None:
    """Load torch in the thread that will train, and say how this machine trains the run's units.

    Args:
        networks: see `Materials`.

    Raises:
        SelfTestFailed: it must not.
        MemoryTooSmall: it can't.
        NetworksMissing: the run needs text encoders here, and they are not there.
    """
    started = time.monotonic()
    report = await training.run(prepare, machine.device, machine.threads)
    reporter.report(
        Ready(
            device=report.device,
            threads=report.threads,
            repeatable=report.bitwise_repeatable,
            reason=report.reason,
            seconds=time.monotonic() - started,
        )
    )
    heard = heard_by_trainers(config)
    if heard:
        names = tuple(encoder.name for encoder in heard)
        reporter.report(Loading(networks=names, folder=str(networks)))
    reporter.report(await training.run(plan_for, config, networks, machine.device))


def wall_ms() -> int:
    """Return the time in UTC milliseconds."""
    return time.time_ns() // 1_000_000
