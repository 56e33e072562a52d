"""Bringing finished units to the coordinator: claim, sketch, bytes, receipt; each unit on its own, beside the training.

Every step can be repeated, since the coordinator answers the same question the same way; so any failure is met by
waiting and doing the step again, for ever. Only a refusal of this very claim ends the attempt, and even then the unit
stays on the disk.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from protocol.calls import Instruction
from protocol.documents import Artifact, ClaimReceipt, Digest, LeaseId, RunConfig, Verdict, parse_payload
from protocol.envelope import parse_envelope
from protocol.errors import (
    AccessRefused,
    ClaimUnknown,
    DigestMismatch,
    DiskFull,
    Refusal,
    StepOutOfOrder,
    TryLater,
    UploadOffsetWrong,
    WorkRefused,
)
from protocol.layout import ROLE_DELTA
from worker.client import CoordinatorClient
from worker.lifecycle import (
    AWAITS_VERDICT,
    HOLDS_DELTA,
    BytesReceipted,
    ClaimReceipted,
    Event,
    Forgotten,
    RefusedForGood,
    SpoolState,
    UploadExcused,
    UploadWanted,
    VerdictAccepts,
    VerdictRejects,
)
from worker.patience import Patience
from worker.progress import STEP_EVENTS_EVERY_SECONDS, Claimed, Refused, Sending, Uploaded, VerdictCame
from worker.reporters import Reporter
from worker.spool import BYTES_RECEIPT, CLAIM_RECEIPT, VERDICT, Spool, SpoolEntry
from worker.stop import Stop
from worker.threads import OneThread
from worker.trainer import check_size, file_is, sketch_delta

ON_THE_WAY: Final = frozenset({SpoolState.TRAINED, SpoolState.CLAIMED, SpoolState.SKETCHED})
TRIES_TO_AGREE: Final = 3
"""How often a unit starts again from its claim, when the coordinator remembers something else, before it is refused."""


class Delivery:
    """The units of the spool on their way. Everything but the file work happens in the event loop."""

    def __init__(
        self,
        *,
        client: CoordinatorClient,
        spool: Spool,
        disk: OneThread,
        config: RunConfig,
        torch_ready: asyncio.Event,
        patience: Patience,
        reporter: Reporter,
        stop: Stop,
    ) -> None:
        self._client = client
        self._spool = spool
        self._disk = disk
        self._config = config
        self._torch_ready = torch_ready
        self._patience = patience
        self._reporter = reporter
        self._stop = stop
        self._entries: dict[Digest, SpoolEntry] = {}
        self._active: dict[Digest, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._sending = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None

    # --- what others see -----------------------------------------------------------------------------------------

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Take up what the spool holds; from here on every unit has a task in `group`."""
        self._group = group
        for entry in await self._disk.run(self._spool.pending):
            self.add(entry)

    def add(self, entry: SpoolEntry) -> None:
        """Bring a unit on its way, unless it only waits for its verdict."""
        self._entries[entry.unit.claim] = entry
        if entry.state is not SpoolState.RECEIVED:
            self.ask_again(entry)

    def ask_again(self, entry: SpoolEntry) -> None:
        """Go on with a unit that rests, if nobody is at it."""
        claim = entry.unit.claim
        if claim not in self._active:
            assert self._group is not None, "start comes first"
            self._active[claim] = self._group.create_task(self._deliver(entry), name=f"deliver {claim[:12]}")

    @property
    def leases(self) -> frozenset[LeaseId]:
        """Leases of the units that are on their way or wait for their verdict."""
        return frozenset(entry.unit.lease for entry in self._entries.values())

    def count(self, *states: SpoolState) -> int:
        """Return how many units are in one of the states."""
        return sum(entry.state in states for entry in self._entries.values())

    @property
    def holding(self) -> int:
        """How many deltas this disk must keep."""
        return self.count(*HOLDS_DELTA)

    @property
    def unsent(self) -> int:
        """How many of them are still on their way; the others are replicas, kept until their verdict."""
        return self.count(*ON_THE_WAY)

    def awaiting_verdict(self) -> tuple[SpoolEntry, ...]:
        """Return the units for which only the verdict is missing."""
        return tuple(
            entry
            for claim, entry in self._entries.items()
            if entry.state in AWAITS_VERDICT and claim not in self._active
        )

    async def settle(self, entry: SpoolEntry, raw: bytes, verdict: Verdict) -> SpoolEntry:
        """Store a unit's verdict, first or later, tell it, and forget the unit."""
        lease = await self._disk.run(entry.lease)
        event = VerdictAccepts() if verdict.outcome == "accepted" else VerdictRejects()
        entry = await self._disk.run_to_the_end(partial(self._spool.record, entry, event, (VERDICT, raw)))
        self._entries.pop(entry.unit.claim, None)
        self._notify()
        self._reporter.report(
            VerdictCame(
                claim=verdict.claim,
                unit=verdict.unit,
                round=None if lease is None else lease.round,
                index=None if lease is None else lease.index,
                outcome=verdict.outcome,
                code=verdict.code,
                sentence=verdict.sentence,
                weight=verdict.weight,
                checkpoint=verdict.checkpoint,
            )
        )
        return entry

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to become true of the units, or for a request to stop."""
        asked = asyncio.ensure_future(self._stop.asked.wait())
        try:
            # The event is taken before the look at the condition, so that no change in between is missed.
            while (changed := self._changed) and not condition() and not asked.done():
                change = asyncio.ensure_future(changed.wait())
                await asyncio.wait({asked, change}, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
        finally:
            asked.cancel()

    async def drained(self, seconds: float | None) -> None:
        """Wait until no unit is on its way any more; leave what is not delivered after `seconds` on the disk."""
        ends = None if seconds is None else time.monotonic() + seconds
        while self._active:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            _, late = await asyncio.wait(set(self._active.values()), timeout=left)
            if left == 0.0:
                for task in late:
                    task.cancel()
                ends = None  # what is being written is written to its end

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # --- one unit ------------------------------------------------------------------------------------------------

    async def _deliver(self, entry: SpoolEntry) -> None:
        patience = self._patience.another()
        problem: Refusal | None = None
        problems = 0
        try:
            while True:
                try:
                    if problem is None:
                        entry = await self._step(entry)
                        patience.reset()
                    else:
                        entry = await self._meet(entry, problem, problems)
                        problem = None
                    if entry.state not in ON_THE_WAY:
                        return
                except AccessRefused:
                    raise  # not about this claim: the daemon ends, the unit stays
                except (TryLater, DiskFull) as error:
                    if self._stop.asked.is_set():
                        return  # kept on disk; the next start goes on
                    await patience.after(error)
                except Refusal as refusal:
                    problem, problems = refusal, problems + 1
        finally:
            self._active.pop(entry.unit.claim, None)
            self._notify()

    async def _step(self, entry: SpoolEntry) -> SpoolEntry:
        match entry.state:
            case SpoolState.TRAINED:
                return await self._claim(entry)
            case SpoolState.CLAIMED:
                return await self._sketch(entry)
            case SpoolState.SKETCHED:
                return await self._send(entry)
            case SpoolState.KEPT:
                _, wanted = await self._client.submit_claim(entry.unit.claim, entry.claim_envelope)
                return await self._record(entry, UploadWanted()) if wanted is Instruction.UPLOAD else entry
            case _:
                return entry

    async def _claim(self, entry: SpoolEntry) -> SpoolEntry:
        receipt, wanted = await self._client.submit_claim(entry.unit.claim, entry.claim_envelope)
        entry = await self._record(entry, ClaimReceipted(), (CLAIM_RECEIPT, receipt))
        self._reporter.report(Claimed(claim=entry.unit.claim, unit=entry.claim.unit))
        return entry if wanted is Instruction.SKETCH else await self._follow(entry, wanted)

    async def _sketch(self, entry: SpoolEntry) -> SpoolEntry:
        raw = entry.document(CLAIM_RECEIPT)
        if raw is None:
            return await self._record(entry, Forgotten())
        receipt = parse_payload(ClaimReceipt, parse_envelope(raw).payload)  # verified before it was stored
        await self._torch_ready.wait()
        path = entry.artifact_path(ROLE_DELTA)
        sketch = await asyncio.to_thread(sketch_delta, self._config, entry.claim, receipt, path)
        return await self._follow(entry, await self._client.submit_sketch(entry.unit.claim, sketch))

    async def _follow(self, entry: SpoolEntry, wanted: Instruction) -> SpoolEntry:
        """Go where the coordinator says a sketched claim is."""
        if wanted is Instruction.KEEP:
            return await self._record(entry, UploadExcused())
        if wanted is Instruction.SKETCH:
            return entry
        # DONE too: the receipt of the bytes is fetched on the same way as after an upload.
        return await self._record(entry, UploadWanted())

    async def _send(self, entry: SpoolEntry) -> SpoolEntry:
        # One after another: two uploads side by side only make both slower, and the first receipt later.
        async with self._sending:
            started, sent = time.monotonic(), 0
            receipt = b""
            for artifact in entry.claim.artifacts:
                stand = await self._client.upload_stand(entry.unit.claim, entry.claim.artifacts, artifact.role)
                receipt = stand.receipt_envelope
                if receipt:
                    break
                receipt = await self._send_artifact(entry, artifact, stand.offset)
                sent += artifact.size - stand.offset
            if not receipt:
                raise TryLater("The coordinator has all bytes of a finished unit and gave no receipt yet.")
            entry = await self._record(entry, BytesReceipted(), (BYTES_RECEIPT, receipt))
        self._reporter.report(
            Uploaded(claim=entry.unit.claim, unit=entry.claim.unit, bytes=sent, seconds=time.monotonic() - started)
        )
        return entry

    async def _send_artifact(self, entry: SpoolEntry, artifact: Artifact, offset: int) -> bytes:
        at, last = offset, time.monotonic()

        def on_sent(count: int) -> None:
            nonlocal at, last
            at += count
            if time.monotonic() - last >= STEP_EVENTS_EVERY_SECONDS:
                last = time.monotonic()
                self._reporter.report(
                    Sending(claim=entry.unit.claim, unit=entry.claim.unit, sent=at, size=artifact.size)
                )

        path = entry.artifact_path(artifact.role)
        await asyncio.to_thread(check_size, path, artifact)
        return await self._client.upload(entry.unit.claim, entry.claim.artifacts, artifact.role, path, offset, on_sent)

    # --- refusals ------------------------------------------------------------------------------------------------

    async def _meet(self, entry: SpoolEntry, refusal: Refusal, problems: int) -> SpoolEntry:
        """Go back to the claim if the two sides may still agree; else set the unit aside."""
        if problems >= TRIES_TO_AGREE or not await self._may_agree(entry, refusal):
            return await self._refused(entry, refusal)
        if isinstance(refusal, (ClaimUnknown, StepOutOfOrder)) and entry.state is not SpoolState.TRAINED:
            return await self._record(entry, Forgotten())
        return entry

    async def _may_agree(self, entry: SpoolEntry, refusal: Refusal) -> bool:
        """Return whether the refusal may come from bytes lost on the way, or from a coordinator that forgot."""
        if isinstance(refusal, DigestMismatch):
            # If our own file is still what we claimed, then the way or the other disk is to blame.
            sound = [
                await asyncio.to_thread(file_is, entry.artifact_path(artifact.role), artifact)
                for artifact in entry.claim.artifacts
            ]
            return all(sound)
        return isinstance(refusal, (ClaimUnknown, StepOutOfOrder, UploadOffsetWrong))

    async def _refused(self, entry: SpoolEntry, refusal: Refusal) -> SpoolEntry:
        if (judged := await self._judged(entry)) is not None:
            return await self.settle(entry, *judged)
        entry = await self._record(entry, RefusedForGood(code=refusal.code, sentence=refusal.message))
        self._entries.pop(entry.unit.claim, None)
        self._reporter.report(
            Refused(claim=entry.unit.claim, unit=entry.claim.unit, code=refusal.code, sentence=refusal.message)
        )
        # A lease whose claim was refused would otherwise be given to this device again until it ends.
        with suppress(TryLater, WorkRefused):
            await self._client.hand_back(entry.unit.lease)
        return entry

    async def _judged(self, entry: SpoolEntry) -> tuple[bytes, Verdict] | None:
        """Return the verdict on a unit that was judged before its bytes came: it says more than a refusal."""
        if entry.state is SpoolState.TRAINED:
            return None
        try:
            found = await self._client.verdicts((entry.unit.claim,))
        except AccessRefused:
            raise
        except Refusal:
            return None
        return found[0] if found else None

    async def _record(self, entry: SpoolEntry, event: Event, *documents: tuple[str, bytes]) -> SpoolEntry:
        stored = await self._disk.run_to_the_end(partial(self._spool.record, entry, event, *documents))
        self._entries[stored.unit.claim] = stored
        self._notify()
        return stored
