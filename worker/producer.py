"""The loop that leases units and trains them, one after another."""

import asyncio
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from protocol.assignment import unit_steps
from protocol.canonical import sha256_hex
from protocol.documents import Digest, Lease, LeaseId, RunConfig, UnitId
from protocol.envelope import parse_envelope
from protocol.errors import (
    AnswerInvalid,
    BytesRefused,
    DigestMismatch,
    DiskFull,
    Refusal,
    RunFinished,
    TrainingDiverged,
    TryLater,
    UnitAbandoned,
)
from protocol.limits import LEASE_WAIT_MS
from worker.client import CoordinatorClient, NoWork
from worker.delivery import Delivery
from worker.fetching import AHEAD_SECONDS, Fetching
from worker.leases import Grant, check_grant
from worker.lifecycle import SpoolState
from worker.machine import Machine
from worker.materials import Materials
from worker.patience import Patience
from worker.progress import FILES, HandedBack, Leased, Trained, Waiting
from worker.reporters import Reporter
from worker.spool import Spool, SpoolEntry
from worker.stepwatch import StepWatch
from worker.stop import Stop
from worker.threads import OneThread
from worker.trainer import TrainedUnit, Trainer, make_claim, write_delta

HAND_BACK_SECONDS: Final = 8.0
FILES_SECONDS: Final = 30.0
"""How long a lease is held while nothing comes of the files that it needs."""


KEPT_UNITS: Final = 32
"""Replicas that may be kept on the disk until their verdicts, before training waits too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What the owner allows: units to train before stopping (None: no end), finished deltas waiting on the disk.

    `files_seconds`: how long a lease may be held while nothing comes of its files. `ahead_seconds`: how often to look
    for a newer checkpoint while training.
    """

    units: int | None
    spooled: int
    files_seconds: float = FILES_SECONDS
    ahead_seconds: float = AHEAD_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why no more units are trained: a code (of an error, or empty) and a sentence for a person."""

    code: str
    sentence: str


class Producer:
    """Leases and trains. `holding` is the unit in work, which somebody must hand back if the loop is cancelled."""

    def __init__(
        self,
        *,
        client: CoordinatorClient,
        config: RunConfig,
        machine: Machine,
        train: Trainer,
        allowance: Allowance,
        fetching: Fetching,
        delivery: Delivery,
        spool: Spool,
        disk: OneThread,
        training: OneThread,
        patience: Patience,
        reporter: Reporter,
        stop: Stop,
    ) -> None:
        self._client = client
        self._config = config
        self._machine = machine
        self._train_unit = train
        self._allowance = allowance
        self._files = fetching
        self._delivery = delivery
        self._spool = spool
        self._disk = disk
        self._training = training
        self._asking, self._working, self._fetching = patience.another(), patience.another(), patience.another()
        self._files_failing_since: float | None = None
        self._reporter = reporter
        self._stop = stop
        self.holding: Grant | None = None
        self.trained = 0

    async def run(self) -> Ending:
        """Lease and train until there is a reason to end; return the reason."""
        while True:
            if self._allowance.units is not None and self.trained >= self._allowance.units:
                return Ending(code="", sentence="All units that were asked for are trained.")
            await self._room()
            if self._stop.asked.is_set():
                return Ending(code="", sentence="Stopped as asked.")
            try:
                grant = await self._next_grant()
            except RunFinished as finished:
                return Ending(code=finished.code, sentence=finished.message)
            if grant is not None:
                await self._work(grant)

    async def _room(self) -> None:
        # An unclaimed unit comes first: until its claim is known, the coordinator would lease the same unit again.
        allowed, delivery = self._allowance.spooled, self._delivery
        if delivery.unsent >= allowed:
            reason = f"{delivery.unsent} finished units wait to be delivered; {allowed} may. Training goes on then."
            self._reporter.report(Waiting(reason=reason, code="", seconds=0))
        elif delivery.count(SpoolState.KEPT) >= KEPT_UNITS:
            reason = f"{KEPT_UNITS} replicas are kept here until their verdicts come. Training goes on then."
            self._reporter.report(Waiting(reason=reason, code="", seconds=0))
        await delivery.wait_until(
            lambda: (
                delivery.unsent < allowed
                and delivery.count(SpoolState.KEPT) < KEPT_UNITS
                and not delivery.count(SpoolState.TRAINED)
            )
        )

    # --- a lease -------------------------------------------------------------------------------------------------

    async def _next_grant(self) -> Grant | None:
        """Return a lease that holds; None after a wait, or when asked to stop."""
        try:
            answer = await self._stop.before_asked(self._client.lease_unit(LEASE_WAIT_MS))
            if answer is None:
                return None
            if isinstance(answer, NoWork):
                self._asking.reset()
                await self._asking.as_asked(answer.reason, answer.retry_after_ms)
                return None
            check_grant(answer, self._config, Digest(answer.lease.config_sha256), self._machine.key.public.key_id)
            await self._check_new(answer)
        except TryLater as error:
            await self._asking.after(error)
            return None
        self._asking.reset()
        return answer

    async def _check_new(self, grant: Grant) -> None:
        lease = grant.lease.lease
        if lease in self._delivery.leases:
            raise AnswerInvalid("The coordinator leased a unit again that is finished and on its way.")
        if lease in await self._disk.run(self._spool.refused_leases):
            await self._hand_back(grant)
            raise AnswerInvalid("The coordinator leased a unit again whose result it had refused; it was handed back.")

    async def _hand_back(self, grant: Grant) -> None:
        try:
            async with asyncio.timeout(HAND_BACK_SECONDS):
                await self._client.hand_back(LeaseId(grant.lease.lease))
        except (TimeoutError, TryLater, Refusal):
            return  # the lease ends by itself; and why the worker stops must not be hidden by this

    async def give_up(self, reason: str) -> None:
        """Hand back the unit in work, if there is one; say why."""
        grant, self.holding = self.holding, None
        if grant is not None:
            await self._hand_back(grant)
            self._reporter.report(HandedBack(unit=grant.lease.unit, round=grant.lease.round, reason=reason))

    # --- a unit --------------------------------------------------------------------------------------------------

    async def _work(self, grant: Grant) -> None:
        lease = grant.lease
        self.holding = grant
        self._reporter.report(
            Leased(
                lease=lease.lease,
                unit=lease.unit,
                round=lease.round,
                index=lease.index,
                steps=unit_steps(self._config, UnitId(lease.unit)),
                base_checkpoint=grant.base_checkpoint,
                remaining_seconds=grant.remaining_ms / 1000,
            )
        )
        try:
            materials = await self._materials(grant)
            if materials is None:
                return
            trained = await self._train(lease, materials)
            entry = await self._keep(grant, trained)
        except UnitAbandoned as abandoned:
            await self.give_up(abandoned.message)
        except (TrainingDiverged, BytesRefused, AnswerInvalid) as error:
            # The unit is at fault, or this machine: others may fare better. Not the same unit again at once.
            await self.give_up(error.message)
            await self._working.after(error)
        else:
            self._working.reset()
            self.trained += 1
            self._reporter.report(
                Trained(
                    unit=lease.unit,
                    round=lease.round,
                    loss=trained.loss,
                    samples=trained.samples,
                    seconds=trained.seconds,
                    bytes=entry.claim.artifacts[0].size,
                )
            )
            self._delivery.add(entry)

    async def _materials(self, grant: Grant) -> Materials | None:
        """Return the unit's files; None if they did not come and the lease was handed back.

        How long the files have failed is remembered from lease to lease: once they did not come in time, each further
        lease is given up at the first failure, so that it is free for those who can reach them.
        """
        ends = time.monotonic() + grant.remaining_ms / 1000
        while True:
            if self._stop.asked.is_set():
                raise UnitAbandoned("asked to stop before its files were here")
            before = self._files.received_bytes
            try:
                materials = await self._files.materials(grant.lease)
            except (TryLater, DigestMismatch) as error:
                if self._files.received_bytes > before or self._files_failing_since is None:
                    self._files_failing_since = time.monotonic()
                if time.monotonic() > min(ends, self._files_failing_since + self._allowance.files_seconds):
                    await self.give_up(f"its files did not come: {error.message}")
                    await self._fetching.after(error, part=FILES)
                    return None
                await self._fetching.after(error, part=FILES)
            except DiskFull as error:
                if await self._disk.run(self._spool.free_one):
                    continue
                if time.monotonic() > ends:
                    await self.give_up(f"there was no room for its files before its lease ended: {error.message}")
                    return None
                await self._fetching.after(error, part=FILES)
            else:
                self._files_failing_since = None
                self._fetching.reset()
                return materials

    async def _train(self, lease: Lease, materials: Materials) -> TrainedUnit:
        on_step = StepWatch(lease.unit, lease.round, self._stop, self._reporter, asyncio.get_running_loop())
        ahead = asyncio.create_task(self._files.ahead(lease, on_step.begun), name="fetch ahead")
        try:
            return await self._training.run(
                partial(
                    self._train_unit,
                    self._config,
                    lease,
                    materials,
                    device=self._machine.device,
                    on_step=on_step,
                )
            )
        finally:
            ahead.cancel()

    async def _keep(self, grant: Grant, trained: TrainedUnit) -> SpoolEntry:
        """Put a trained unit into the spool; while the disk is full it stays in memory, and the worker waits."""
        lease_sha256 = Digest(sha256_hex(parse_envelope(grant.envelope).payload))
        salt = os.urandom(32)

        def claim(delta: Path) -> tuple[Digest, bytes]:
            return make_claim(
                trained,
                grant.lease,
                lease_sha256,
                delta,
                key=self._machine.key,
                salt=salt,
                trainer_version=self._machine.trainer_version,
                device_class=self._machine.device_class,
            )

        patience = self._working.another()
        lease = LeaseId(grant.lease.lease)
        while True:
            try:
                entry = await self._disk.run_to_the_end(
                    self._spool.add, lease, grant.envelope, partial(write_delta, trained, grant.lease), claim
                )
            except DiskFull as error:
                await patience.after(error)
            else:
                self.holding = None
                return entry
