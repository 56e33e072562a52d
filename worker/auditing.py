"""The auditor's loop: take claims of one unit, fetch them, run the unit once, compare, sign, submit; and again.

An audit that can't be finished is dropped: the coordinator gives it out again when its time is over. Only bytes that
are exactly the claimed ones can be held against a claim; whatever else the coordinator sends is its own fault.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from protocol.documents import Artifact, Opinion, RunConfig, parse_payload
from protocol.envelope import parse_envelope
from protocol.errors import (
    AnswerInvalid,
    AuditUnknown,
    BytesRefused,
    CommonweightError,
    DigestMismatch,
    DiskFull,
    RunFinished,
    TrainingDiverged,
    TryLater,
    UnitAbandoned,
)
from protocol.limits import LEASE_WAIT_MS
from worker.audit_client import AuditorClient, AuditTask, ClaimToJudge
from worker.audit_home import Workbench
from worker.audit_progress import AuditDropped, AuditTaken, OpinionGiven
from worker.client import NoWork
from worker.library import Library, Needs
from worker.machine import Machine
from worker.materials import Materials
from worker.patience import Patience
from worker.progress import FILES
from worker.referee import Found, Replay, delta_artifact, inadmissible, judge_file, opinion_on, replay
from worker.reporters import Reporter
from worker.stepwatch import StepWatch
from worker.stop import Stop
from worker.threads import OneThread
from worker.trainer import file_is

T = TypeVar("T")


class Auditing:
    """Takes audits and gives opinions. `run` ends when somebody asks, or after so many audits."""

    def __init__(
        self,
        *,
        client: AuditorClient,
        config: RunConfig,
        machine: Machine,
        library: Library,
        bench: Workbench,
        audits: int | None,
        disk: OneThread,
        training: OneThread,
        patience: Patience,
        reporter: Reporter,
        stop: Stop,
    ) -> None:
        self._client = client
        self._config = config
        self._machine = machine
        self._library = library
        self._bench = bench
        self._audits = audits
        self._disk = disk
        self._training = training
        self._asking, self._failing = patience.another(), patience.another()
        self._reporter = reporter
        self._stop = stop
        self.judged = 0

    async def run(self) -> str:
        """Judge until there is a reason to end; return it."""
        while not self._stop.asked.is_set():
            if self._audits is not None and self.judged >= self._audits:
                return "All audits that were asked for are done."
            try:
                task = await self._next_task()
            except RunFinished as finished:
                return finished.message
            if task is not None:
                await self._judge(task)
        return "Stopped as asked."

    async def _next_task(self) -> AuditTask | None:
        """Return claims to judge; None after a wait, or when asked to stop."""
        try:
            answer = await self._stop.before_asked(self._client.take_audit(LEASE_WAIT_MS))
        except TryLater as error:
            await self._asking.after(error)
            return None
        self._asking.reset()
        if isinstance(answer, NoWork):
            await self._asking.as_asked(answer.reason, answer.retry_after_ms)
            return None
        return answer

    # --- one audit -----------------------------------------------------------------------------------------------

    async def _judge(self, task: AuditTask) -> None:
        self._reporter.report(
            AuditTaken(
                round=task.round,
                index=task.index,
                unit=task.unit,
                claims=tuple(judged.digest for judged in task.claims),
                remaining_seconds=task.ends - time.monotonic(),
            )
        )
        try:
            opinions = await self._opinions(task)
            await self._submit(opinions)
        except UnitAbandoned as error:
            self._dropped(task, error)
        except (AuditUnknown, TryLater, BytesRefused, TrainingDiverged, DiskFull) as error:
            # Not the same audit again at once: what failed will mostly fail again.
            self._dropped(task, error)
            await self._failing.after(error)
        else:
            self._failing.reset()
            self.judged += 1
        finally:
            await self._disk.run_to_the_end(self._bench.clear)

    def _dropped(self, task: AuditTask, error: CommonweightError) -> None:
        self._reporter.report(
            AuditDropped(round=task.round, index=task.index, unit=task.unit, code=error.code, reason=error.message)
        )

    async def _opinions(self, task: AuditTask) -> tuple[bytes, ...]:
        """Return a signed opinion on each claim, kept on the disk."""
        artifacts = [await self._fetched(task, judged) for judged in task.claims]
        own = await self._replay(task, await self._in_time(task, lambda: self._materials(task)))
        envelopes = []
        for judged, artifact in zip(task.claims, artifacts, strict=True):
            found = artifact if isinstance(artifact, Found) else await self._compare(task, judged, artifact, own)
            envelope = opinion_on(judged, found, own, run=self._client.join.run, machine=self._machine)
            await self._in_time(
                task, partial(self._disk.run_to_the_end, self._bench.keep_opinion, judged.digest, envelope)
            )
            envelopes.append(envelope)
        return tuple(envelopes)

    async def _replay(self, task: AuditTask, materials: Materials) -> Replay:
        on_step = StepWatch(task.unit, task.round, self._stop, self._reporter, asyncio.get_running_loop())
        return await self._training.run(
            partial(
                replay,
                self._config,
                task.round,
                task.unit,
                materials,
                device=self._machine.device,
                on_step=on_step,
            )
        )

    async def _compare(self, task: AuditTask, judged: ClaimToJudge, artifact: Artifact, own: Replay) -> Found:
        path = self._bench.container(judged.digest)
        return await self._training.run(judge_file, self._config, task.unit, artifact, path, own)

    async def _submit(self, envelopes: tuple[bytes, ...]) -> None:
        """Hand the opinions in, however long the coordinator is away; the training is too dear to be thrown away."""
        patience = self._failing.another()
        while True:
            try:
                await self._client.submit_opinions(envelopes)
                break
            except TryLater as error:
                if self._stop.asked.is_set():
                    raise
                await patience.after(error)
        for envelope in envelopes:
            opinion = parse_payload(Opinion, parse_envelope(envelope).payload)  # our own
            self._reporter.report(
                OpinionGiven(
                    claim=opinion.claim,
                    unit=opinion.unit,
                    finding=opinion.finding,
                    raw_difference=opinion.raw_difference,
                    code_difference=opinion.code_difference,
                    trail_agrees=opinion.trail_agrees,
                    seconds=opinion.seconds,
                )
            )

    # --- its files -----------------------------------------------------------------------------------------------

    async def _in_time(self, task: AuditTask, call: Callable[[], Awaitable[T]]) -> T:
        """Return what the call returns; try again until the audit's time is over, or somebody asks to stop."""
        patience = self._failing.another()
        while True:
            if self._stop.asked.is_set():
                raise UnitAbandoned("asked to stop before it was judged")
            try:
                return await call()
            except (TryLater, DigestMismatch, DiskFull) as error:
                if time.monotonic() > task.ends:
                    raise
                await patience.after(error, part=FILES)

    async def _materials(self, task: AuditTask) -> Materials:
        link = await self._client.connect()
        needs = Needs.of_unit(self._config, task.round, task.index)
        try:
            return await asyncio.to_thread(self._library.fetch, link.endpoint.public_url, link.trust, needs)
        except (TryLater, DigestMismatch):
            # The operator may have moved the files: the next try asks the coordinator anew where they are.
            await self._client.drop(link)
            raise

    async def _fetched(self, task: AuditTask, judged: ClaimToJudge) -> Artifact | Found:
        """Fetch a claim's delta; return what was claimed of it, or what follows if the claim itself can't be honest."""
        try:
            artifact = await self._training.run(delta_artifact, self._config, judged.claim.artifacts)
        except BytesRefused as refusal:
            return inadmissible(refusal)
        await self._in_time(task, lambda: self._read(judged, artifact))
        return artifact

    async def _read(self, judged: ClaimToJudge, artifact: Artifact) -> None:
        """Read the container from where it stopped, and check that it is what the device signed for."""
        claim, bench = judged.digest, self._bench
        while (offset := await self._disk.run(bench.come, claim)) < artifact.size:
            piece = await self._stop.before_asked(self._client.read_artifact(claim, artifact.role, offset))
            if piece is None:
                raise UnitAbandoned("asked to stop while its files came")
            if not piece or offset + len(piece) > artifact.size:
                raise AnswerInvalid(f"The coordinator has another number of bytes than claim {claim[:12]} says.")
            await self._disk.run_to_the_end(bench.append, claim, piece)
        if not await self._disk.run(file_is, bench.container(claim), artifact):
            await self._disk.run_to_the_end(bench.discard, claim)
            # Never the volunteer's fault: the coordinator gave a receipt for other bytes than it keeps.
            raise AnswerInvalid(f"What the coordinator keeps is not what claim {claim[:12]} committed to.")
