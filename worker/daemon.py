"""A worker from start to end: prove who answers, ask its owner, lease, train, deliver, hear the verdicts, stop cleanly.

with the home locked:
  identity -> connection -> consent -> session
  named tasks: prepare (torch), produce (lease and train), deliver (one per unit), verdicts
The first task that fails ends all of them, and the error is the worker's. What is finished is on the disk by then.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diloco import NUMERICS
from protocol.errors import CommonweightError
from protocol.join import JoinString
from verify.hearing import refuse_unnamed
from worker.backoff import DEFAULT_BACKOFF, Backoff
from worker.cache import FileCache
from worker.calling import Introduction
from worker.client import CoordinatorClient
from worker.consent import Ask, ensure_consent
from worker.fetching import AHEAD_SECONDS
from worker.hardware import DeviceChoice
from worker.home import WorkerHome
from worker.identity import Identity, load_or_make_identity
from worker.lifecycle import HOLDS_DELTA
from worker.machine import this_machine
from worker.producer import FILES_SECONDS, Allowance
from worker.progress import Connected, Failed
from worker.reporters import Reporter
from worker.shift import Shift
from worker.spool import Spool
from worker.station import Farewell, Station, wall_ms
from worker.stop import Stop
from worker.tally import Tally
from worker.trainer import Trainer, train_unit

SPOOLED_UNITS: Final = 4
"""Finished units that may wait on the disk before training waits too."""
_FAREWELL: Final = Farewell(
    soon="what has just begun is handed back, the rest is delivered first; Ctrl-C again ends it now.",
    now="at once; a unit in training is handed back.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What the owner decided.

    Args:
        units: stop after so many units; None is never.
        cache_bytes: cap on the public files kept on this disk.
        files_seconds: how long a lease is held while nothing comes of its files.
        ahead_seconds: how often to look for a newer checkpoint while training.
        threads: CPU threads for training; None is all that this process may use.
        networks: folder of the text encoders, for runs whose shards hold captions alone.
        train: what makes a unit's result.
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
    ahead_seconds: float = AHEAD_SECONDS
    networks: Path | None = None
    backoff: Backoff = DEFAULT_BACKOFF
    train: Trainer = train_unit


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
            await _work(settings, tally, ask, stop)
    except CommonweightError as error:
        reporter.report(Failed(code=error.code, sentence=error.message))
        raise


async def _work(settings: WorkerSettings, tally: Tally, ask: Ask | None, stop: Stop) -> None:
    """One run of a worker, from the locked home to the last event."""
    identity = await asyncio.to_thread(load_or_make_identity, WorkerHome(settings.home).keys)
    client = CoordinatorClient(settings.join, identity.papers, wall_ms=wall_ms)
    station = Station(settings.join, backoff=settings.backoff, reporter=tally, stop=stop, farewell=_FAREWELL)
    try:
        async with station:
            shift = await _admitted(settings, station, client, identity, ask)
            reason = "Stopped as asked." if shift is None else await shift.run()
            tally.finish(reason, waiting_units=0 if shift is None else shift.waiting_units)
    finally:
        await client.close()


async def _admitted(
    settings: WorkerSettings, station: Station, client: CoordinatorClient, identity: Identity, ask: Ask | None
) -> Shift | None:
    """Connect, ask the owner, open a session; return the work to do, or None if asked to stop meanwhile."""
    home, run = WorkerHome(settings.home), settings.join.run
    link = await station.connect(client)
    if link is None:
        return None
    config = link.trust.config
    refuse_unnamed(config, named=settings.networks is not None)  # before anything is agreed to or fetched
    # Asked in the main thread, while nothing else runs; nothing of value was sent so far.
    ensure_consent(home.consent(run), config, accept_terms=settings.accept_terms, ask=ask)
    machine = this_machine(settings.device, settings.threads, identity.device)
    client.introduce(
        Introduction(numerics=NUMERICS, trainer_version=machine.trainer_version, device_class=machine.device_class)
    )
    spool = await station.disk.run(Spool, home.spool(run))
    await station.disk.run(spool.forget_old, wall_ms())
    cache = await station.disk.run(FileCache, home.cache, settings.cache_bytes)
    waiting = await station.disk.run(spool.pending)
    await station.patiently(client.open_session)
    if station.stop.asked.is_set():
        return None
    await station.disk.run(home.remember_join, settings.join)
    station.reporter.report(
        Connected(
            run=run,
            name=config.name,
            host=settings.join.target,
            device=identity.device.public.key_id,
            device_class=machine.device_class,
            trainer_version=machine.trainer_version,
            public_url=link.endpoint.public_url,
            waiting_units=sum(entry.state in HOLDS_DELTA for entry in waiting),
        )
    )
    library = await station.library(cache, config, networks=settings.networks)
    if library is None:
        return None
    allowance = Allowance(
        units=settings.units,
        spooled=settings.spooled_units,
        files_seconds=settings.files_seconds,
        ahead_seconds=settings.ahead_seconds,
    )
    return Shift(
        client=client,
        config=config,
        machine=machine,
        train=settings.train,
        allowance=allowance,
        library=library,
        spool=spool,
        disk=station.disk,
        patience=station.patience,
        reporter=station.reporter,
        stop=station.stop,
    )
