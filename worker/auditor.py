"""An auditor from start to end: prove who answers, show the root's delegation, judge what it is given, stop cleanly.

It runs units again and says what it found; it trains nothing of its own and decides nothing: what follows from an
opinion is the coordinator's business, and everybody's to check.
"""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diloco import NUMERICS
from protocol.errors import CommonweightError, DelegationInvalid, UnitAbandoned
from protocol.join import JoinString
from verify.hearing import refuse_unnamed
from worker.audit_client import AuditorClient
from worker.audit_home import Workbench, load_papers
from worker.audit_progress import AuditDropped, AuditsDone, OpinionGiven
from worker.auditing import Auditing
from worker.backoff import DEFAULT_BACKOFF, Backoff
from worker.cache import FileCache
from worker.calling import Introduction
from worker.hardware import DeviceChoice
from worker.home import WorkerHome
from worker.identity import Papers
from worker.link import Link
from worker.machine import this_machine
from worker.progress import Connected, Downloaded, Event, Failed
from worker.reporters import Reporter
from worker.station import Farewell, Station, make_ready, wall_ms
from worker.stop import Stop
from worker.threads import OneThread

_FAREWELL: Final = Farewell(
    soon="a replay that has just begun is dropped, one that is mostly done is finished; Ctrl-C again ends it now.",
    now="at once; the coordinator gives the audit out again.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditorSettings:
    """What the operator decided.

    Args:
        home: keeps the opinions and the cache.
        key, delegation: files of the auditor's key and of the root's delegation of it.
        threads: CPU threads for training; None is all that this process may use.
        audits: stop after so many audits; None is never.
        cache_bytes: cap on the public files kept on this disk.
        networks: folder of the text encoders, for runs whose shards hold captions alone.
    """

    join: JoinString
    home: Path
    key: Path
    delegation: Path
    device: DeviceChoice
    threads: int | None
    audits: int | None
    cache_bytes: int
    networks: Path | None = None
    backoff: Backoff = DEFAULT_BACKOFF


async def run_auditor(settings: AuditorSettings, reporter: Reporter, *, stop: Stop) -> None:
    """Judge until somebody stops it, or the asked-for audits are done.

    Raises:
        CommonweightError: the auditor can't go on; its sentence says what its operator can do. Told as `Failed` before.
    """
    tally = AuditTally(reporter)
    try:
        papers = load_papers(settings.key, settings.delegation)
        with WorkerHome(settings.home).lock():
            await _work(settings, papers, tally, stop)
    except CommonweightError as error:
        reporter.report(Failed(code=error.code, sentence=error.message))
        raise


async def _work(settings: AuditorSettings, papers: Papers, tally: "AuditTally", stop: Stop) -> None:
    client = AuditorClient(settings.join, papers, wall_ms=wall_ms)
    station = Station(settings.join, backoff=settings.backoff, reporter=tally, stop=stop, farewell=_FAREWELL)
    training = OneThread("training")
    try:
        async with station:
            auditing = await _admitted(settings, station, client, papers, training)
            reason = "Stopped as asked." if auditing is None else await _until_stopped(auditing, stop)
            tally.finish(reason, audits=0 if auditing is None else auditing.judged)
    finally:
        training.close()
        await client.close()


async def _until_stopped(auditing: Auditing, stop: Stop) -> str:
    """Let the auditor work; end it at once when that is asked for. Nothing is lost: an audit is given out again."""
    work = asyncio.create_task(auditing.run(), name="audit")
    now = asyncio.create_task(stop.now.wait(), name="stop at once")
    try:
        await asyncio.wait({work, now}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return await work
        return "Stopped at once, as asked."
    finally:
        now.cancel()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)  # what it holds of others' work is removed by then


async def _admitted(
    settings: AuditorSettings, station: Station, client: AuditorClient, papers: Papers, training: OneThread
) -> Auditing | None:
    """Connect, open a session, load torch; return the work to do, or None if asked to stop meanwhile."""
    link = await station.connect(client)
    if link is None:
        return None
    check_delegated(papers, link)
    refuse_unnamed(link.trust.config, named=settings.networks is not None)
    machine = this_machine(settings.device, settings.threads, papers.key)
    # The terms are for volunteers; that the operator's own auditor names them only says which run it audits.
    client.introduce(
        Introduction(numerics=NUMERICS, trainer_version=machine.trainer_version, device_class=machine.device_class)
    )
    await station.patiently(client.open_session)
    if station.stop.asked.is_set():
        return None
    config = link.trust.config
    station.reporter.report(
        Connected(
            run=settings.join.run,
            name=config.name,
            host=settings.join.target,
            device=papers.key.public.key_id,
            device_class=machine.device_class,
            trainer_version=machine.trainer_version,
            public_url=link.endpoint.public_url,
            waiting_units=0,
        )
    )
    cache = await station.disk.run(FileCache, WorkerHome(settings.home).cache, settings.cache_bytes)
    library = await station.library(cache, config, networks=settings.networks)
    if library is None:
        return None
    await make_ready(training, machine, config, settings.networks, station.reporter)
    return Auditing(
        client=client,
        config=config,
        machine=machine,
        library=library,
        bench=await station.disk.run(Workbench, settings.home, settings.join.run),
        audits=settings.audits,
        disk=station.disk,
        training=training,
        patience=station.patience,
        reporter=station.reporter,
        stop=station.stop,
    )


def check_delegated(papers: Papers, link: Link) -> None:
    """Raise `DelegationInvalid` or `WrongRun` unless the run's root delegated this very key; nothing was sent then."""
    delegated = link.trust.admit_auditor(papers.delegation_envelope, now_ms=wall_ms())
    if delegated != papers.key.public:
        raise DelegationInvalid(
            f"The delegation is for key {delegated.key_id[:12]}; this auditor has key {papers.key.public.key_id[:12]}."
        )


class AuditTally:
    """A reporter that passes an auditor's events on and counts them, for the last line."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._started = time.monotonic()
        self._confirmed = self._refuted = self._dropped = self._bytes_down = 0

    def report(self, event: Event) -> None:
        """Count an event and pass it on."""
        match event:
            case OpinionGiven():
                self._confirmed += event.finding == "confirmed"
                self._refuted += event.finding != "confirmed"
            case AuditDropped():
                self._dropped += event.code != UnitAbandoned.code
            case Downloaded():
                self._bytes_down += event.bytes
            case _:
                pass
        self._reporter.report(event)

    def close(self) -> None:
        """Close the reporter."""
        self._reporter.close()

    def finish(self, reason: str, *, audits: int) -> None:
        """Tell the end."""
        self._reporter.report(
            AuditsDone(
                reason=reason,
                audits=audits,
                confirmed=self._confirmed,
                refuted=self._refuted,
                dropped=self._dropped,
                bytes_down=self._bytes_down,
                seconds=time.monotonic() - self._started,
            )
        )
