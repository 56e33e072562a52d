"""A worker from start to end: prove who answers, ask its owner, lease, train, deliver, hear the verdicts, stop cleanly.

with the home locked:
  identity -> connection -> consent -> session
  named tasks: prepare (torch), produce (lease and train), deliver (one per unit), verdicts
The first task that fails ends all of them, and the error is the worker's. What is finished is on the disk by then.
"""

import asyncio
import importlib.metadata
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from diloco import NUMERICS
from protocol.errors import CommonweightError, TryLater, Unreachable
from protocol.join import JoinString
from worker.backoff import DEFAULT_BACKOFF, Backoff
from worker.cache import FileCache
from worker.calling import Introduction
from worker.client import CoordinatorClient
from worker.consent import Ask, ensure_consent
from worker.hardware import DeviceChoice, device_class, resolve_device, resolve_threads
from worker.home import WorkerHome
from worker.identity import Identity, load_or_make_identity
from worker.library import Library
from worker.lifecycle import HOLDS_DELTA
from worker.line import BreakOff
from worker.patience import Patience
from worker.producer import FILES_SECONDS, Allowance, Machine
from worker.progress import Connected, Event, Failed, Stopping
from worker.reporters import Reporter
from worker.shift import Shift
from worker.spool import Spool
from worker.stop import Stop, StopLevel
from worker.tally import Tally
from worker.threads import OneThread
from worker.web import host_is_public

T = TypeVar("T")

SPOOLED_UNITS: Final = 4
"""Finished units that may wait on the disk before training waits too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What the owner decided.

    Args:
        units: stop after so many units; None is never.
        cache_bytes: cap on the public files kept on this disk.
        files_seconds: how long a lease is held while nothing comes of its files.
        threads: CPU threads for training; None is all that this process may use.
    """

    join: JoinString
    home: Path
    device: DeviceChoice
    threads: int | None
    units: int | None
    cache_bytes: int
    accept_terms: bool
    spooled_units: int = SPOOLED_UNITS
    files_seconds: float = FILES_SECONDS
    backoff: Backoff = DEFAULT_BACKOFF


def trainer_version() -> str:
    """Return what this worker says of its own version."""
    try:
        return f"commonweight {importlib.metadata.version('commonweight')}"
    except importlib.metadata.PackageNotFoundError:
        return "commonweight, not installed"


def wall_ms() -> int:
    """Return the time in UTC milliseconds."""
    return time.time_ns() // 1_000_000


async def run_worker(settings: WorkerSettings, reporter: Reporter, *, ask: Ask | None, stop: Stop) -> None:
    """Work until the run is finished, the asked-for units are done, or somebody stops it.

    Args:
        ask: shows terms to a person and asks; None if there is nobody to show them to.
        stop: the caller's way to end it; see `Stop.listen`.

    Raises:
        CommonweightError: the worker can't go on; its sentence says what its owner can do. Told as `Failed` before.
    """
    tally = Tally(reporter)
    try:
        with WorkerHome(settings.home).lock():
            await _Daemon(settings, tally, ask, stop).run()
    except CommonweightError as error:
        reporter.report(Failed(code=error.code, sentence=error.message))
        raise


class _Daemon:
    """One run of a worker, from the locked home to the last event."""

    def __init__(self, settings: WorkerSettings, tally: Tally, ask: Ask | None, stop: Stop) -> None:
        self._settings = settings
        self._home = WorkerHome(settings.home)
        self._tally = tally
        self._ask = ask
        self._stop = stop
        self._patience = Patience(settings.backoff, secrets.SystemRandom().random, tally, stop)
        self._break_off = BreakOff()
        self._disk = OneThread("disk")
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        identity = await asyncio.to_thread(load_or_make_identity, self._home.keys)
        client = CoordinatorClient(self._settings.join, identity, wall_ms=wall_ms)
        hearing = asyncio.create_task(self._hear(), name="hear")
        try:
            shift = await self._admitted(client, identity)
            reason = "Stopped as asked." if shift is None else await shift.run()
            self._tally.finish(reason, waiting_units=0 if shift is None else shift.waiting_units)
        finally:
            hearing.cancel()
            self._break_off.ask()
            self._disk.close()
            await client.close()

    async def _admitted(self, client: CoordinatorClient, identity: Identity) -> Shift | None:
        """Connect, ask the owner, open a session; return the work to do, or None if asked to stop meanwhile."""
        settings = self._settings
        link = await self._patiently(client.connect, advice="Check host and port of the join string.")
        if link is None:
            return None
        config = link.trust.config
        # Asked in the main thread, while nothing else runs; nothing of value was sent so far.
        ensure_consent(self._home.consent(settings.join.run), config, accept_terms=settings.accept_terms, ask=self._ask)
        machine = self._machine(identity)
        client.introduce(
            Introduction(numerics=NUMERICS, trainer_version=machine.trainer_version, device_class=machine.device_class)
        )
        spool = await self._disk.run(Spool, self._home.spool(settings.join.run))
        cache = await self._disk.run(FileCache, self._home.cache, settings.cache_bytes)
        waiting = await self._disk.run(spool.pending)
        await self._patiently(client.open_session)
        if self._stop.asked.is_set():
            return None
        self._tally.report(
            Connected(
                run=settings.join.run,
                name=config.name,
                host=settings.join.target,
                device=identity.device.public.key_id,
                device_class=machine.device_class,
                trainer_version=machine.trainer_version,
                public_url=link.endpoint.public_url,
                waiting_units=sum(entry.state in HOLDS_DELTA for entry in waiting),
            )
        )
        # Whoever joins a run inside a private network must reach its files there; nobody else may be led into one.
        join = settings.join
        public = await self._patiently(lambda: asyncio.to_thread(host_is_public, join.host, join.port))
        if public is None:
            return None
        library = Library(
            cache, config, allow_private=not public, break_off=self._break_off, tell=self._tell_from_thread
        )
        return Shift(
            client=client,
            config=config,
            machine=machine,
            allowance=Allowance(
                units=settings.units, spooled=settings.spooled_units, files_seconds=settings.files_seconds
            ),
            library=library,
            spool=spool,
            disk=self._disk,
            patience=self._patience,
            reporter=self._tally,
            stop=self._stop,
        )

    def _tell_from_thread(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._tally.report, event)

    def _machine(self, identity: Identity) -> Machine:
        device, threads = resolve_device(self._settings.device), resolve_threads(self._settings.threads)
        return Machine(
            device=device,
            threads=threads,
            device_class=device_class(device, threads),
            trainer_version=trainer_version(),
            key=identity.device,
        )

    async def _patiently(self, call: Callable[[], Coroutine[Any, Any, T]], *, advice: str = "") -> T | None:
        """Return what the call returns, however long it takes; None if asked to stop meanwhile."""
        while not self._stop.asked.is_set():
            try:
                return await self._stop.before_asked(call())
            except TryLater as error:
                await self._patience.after(error, advice=advice if isinstance(error, Unreachable) else "")
        return None

    async def _hear(self) -> None:
        await self._stop.asked.wait()
        if self._stop.level is StopLevel.NOW:
            self._tally.report(Stopping(reason="at once; a unit in training is handed back."))
        else:
            self._tally.report(
                Stopping(
                    reason="what has just begun is handed back, the rest is delivered first; Ctrl-C again ends it now."
                )
            )
        self._break_off.ask()
