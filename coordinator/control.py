"""The control process: the only writer of the database, and the only holder of the coordinator's key.

`Control` turns calls into store transactions (in one thread), runs the clockwork (expiry, closing) and settles rounds:
merge in the settler, publish, tell everybody. It keeps no truth in memory: kill it anywhere, start it again, and it
goes on from the database and the directory.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from coordinator import appeals, bans, claims, deadlines, epochs, leasing, referees, replicas, settling, verdicts
from coordinator.blobs import BlobStore
from coordinator.desk import CLOCK_KEY, Desk
from coordinator.publisher import PublishedManifest, Publisher
from coordinator.rounds import Round
from coordinator.sessions import Session
from coordinator.settler_client import SettlerClient
from coordinator.staging import Staging
from coordinator.takedowns import TakedownDesk
from coordinator.units import UnitState
from coordinator.uploads import Uploads
from protocol import layout
from protocol.calls import Instruction
from protocol.documents import Digest, FileEntry
from protocol.errors import (
    AuditUnknown,
    CommonweightError,
    CoordinatorDiskFull,
    HistoryDiffers,
)
from protocol.limits import APPEAL_MS, LEASE_WAIT_MS, SETTLER_PATIENCE_MS, STAGING_GRACE_MS, UPLOAD_CHUNK_BYTES

logger = logging.getLogger(__name__)

T = TypeVar("T")

TICK_SECONDS = 0.5
SWEEP_SECONDS = 600.0
TELL_SECONDS = 2.0
SETTLE_RETRY_SECONDS = 5.0
_THINNED_AT_ONCE = 8
"""Checkpoints that are looked at again, should a crash have come between publishing and thinning."""
CLOCK_AHEAD_MS = 2_000
WATCH_SECONDS = 30.0


class Control:
    """The coordinator's service, without its wire."""

    def __init__(
        self,
        *,
        desk: Desk,
        blobs: BlobStore,
        staging: Staging,
        publisher: Publisher,
        settler: SettlerClient,
        heldout: Path,
        takedowns: TakedownDesk,
        writer: ThreadPoolExecutor,
    ) -> None:
        self._desk = desk
        self._blobs = blobs
        self._staging = staging
        self._publisher = publisher
        self._settler = settler
        self._heldout = heldout
        self._takedowns = takedowns
        self._writer = writer
        self._clock_floor_ms = 0
        self.uploads = Uploads(
            decide=self.decide, changed=self._upload_ended, staging=staging, blobs=blobs, settler=settler
        )
        self._changed = asyncio.Condition()
        self._round_due = asyncio.Event()
        self._comparison_due = asyncio.Event()
        self._telling = asyncio.Lock()
        self._tail_position = -1
        self._background: set[asyncio.Task[None]] = set()

    # --- the database ----------------------------------------------------------------------------------------

    async def decide(self, work: Callable[[Desk], T]) -> T:
        """Run `work` as one transaction in the writer's thread; what it returns is durable before it is returned."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._transaction, work)

    def _transaction(self, work: Callable[[Desk], T]) -> T:
        with self._desk.store.transaction():
            result = work(self._desk)
            self._persist_clock()
        return result

    def _persist_clock(self) -> None:
        """Keep time from running back over a restart, even if the machine's clock does.

        The stored time is a little ahead, so that a transaction that only reads need not write.
        """
        now = self._desk.clock.now_ms()
        if now >= self._clock_floor_ms:
            self._clock_floor_ms = now + CLOCK_AHEAD_MS
            self._desk.store.put_meta(CLOCK_KEY, str(self._clock_floor_ms))

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # --- calls -----------------------------------------------------------------------------------------------

    async def lease(self, session: Session, wait_ms: int) -> leasing.Leased | leasing.NoWork:
        """Return a unit, waiting at most `wait_ms` for one."""
        if not await asyncio.to_thread(self._staging.has_room):
            # Whoever trains now could not deliver, and every lease is a row in the database.
            raise CoordinatorDiskFull("The coordinator is short of disk space and gives out no units now.")
        last: list[leasing.NoWork] = []

        def ask(desk: Desk) -> leasing.Leased | None:
            answer = leasing.lease_unit(desk, session)
            if isinstance(answer, leasing.Leased):
                return answer
            last[:] = [answer]
            return None

        return await self._await_answer(ask, wait_ms) or last[0]

    async def _await_answer(self, ask: Callable[[Desk], T | None], wait_ms: int) -> T | None:
        """Ask again whenever something has changed, until there is an answer or the time is over."""
        loop = asyncio.get_running_loop()
        end = loop.time() + min(wait_ms, LEASE_WAIT_MS) / 1000
        while True:
            async with self._changed:
                answer = await self.decide(ask)
                left = end - loop.time()
                if answer is not None or left <= 0:
                    return answer
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except TimeoutError:
                    return None

    async def hand_back(self, session: Session, lease: str) -> None:
        """Take a unit back and offer it to those who wait."""
        await self.decide(lambda desk: leasing.hand_back(desk, session, lease))
        await self._wake()

    async def submit_claim(self, session: Session, envelope: bytes) -> claims.ClaimAnswer:
        """Take a claim; a conflicting one is stored as evidence before it is refused."""
        answer = await self.decide(lambda desk: claims.submit_claim(desk, session, envelope))
        if answer.conflict is not None:
            raise answer.conflict
        return answer

    async def submit_sketch(self, session: Session, claim: bytes, sketch: bytes) -> Instruction:
        """Take a sketch."""
        following = await self.decide(lambda desk: claims.submit_sketch(desk, session, claim, sketch))
        if following is Instruction.KEEP:
            self._comparison_due.set()
        return following

    async def verdicts(self, session: Session, asked: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return the verdicts that are known."""
        return await self.decide(lambda desk: verdicts.known(desk, session, asked))

    async def appeal(self, session: Session, claim: bytes) -> None:
        """Send a refuted claim to a second referee."""
        await self.decide(lambda desk: appeals.appeal(desk, session, claim))
        await self._wake()

    # --- an auditor's calls ----------------------------------------------------------------------------------

    async def take_audit(self, session: Session, wait_ms: int) -> referees.AuditOrder | None:
        """Return claims for an auditor to judge, waiting at most `wait_ms` for some."""
        return await self._await_answer(lambda desk: referees.take_audit(desk, session), wait_ms)

    async def read_artifact(self, session: Session, claim: bytes, role: str, offset: int) -> bytes:
        """Return a piece of an artifact that an auditor judges."""
        artifact = await self.decide(lambda desk: referees.artifact_to_judge(desk, session, claim, role))
        path = self._blobs.path(Digest(artifact.blob_sha256))
        return await asyncio.to_thread(_read_piece, path, offset)

    async def submit_opinions(self, session: Session, envelopes: tuple[bytes, ...]) -> None:
        """Take an auditor's opinions, and do what follows from them."""
        await self.decide(lambda desk: referees.submit_opinions(desk, session, envelopes))
        await self.turn()
        await self._wake()

    async def _upload_ended(self) -> None:
        await self.turn()
        await self._wake()

    # --- the clockwork ---------------------------------------------------------------------------------------

    async def turn(self) -> None:
        """Do what is due: end leases, let audits go on, see whether the round must close."""

        def due(desk: Desk) -> tuple[int, bool]:
            ended = deadlines.end_what_is_due(desk)
            return ended, settling.plan_if_due(desk) is not None

        ended, round_due = await self.decide(due)
        if round_due:
            self._round_due.set()
        if ended:
            await self._wake()

    async def tick(self) -> None:
        """Turn the clockwork for ever; a full disk makes it wait, not end."""
        while True:
            try:
                await self.turn()
            except (CommonweightError, OSError) as error:
                logger.error("nothing could be decided: %s", error, extra={"action": "turn_failed"})
                await asyncio.sleep(SETTLE_RETRY_SECONDS)
            await asyncio.sleep(TICK_SECONDS)

    async def compare(self) -> None:
        """Compare replicas with what they repeat, for ever."""
        while True:
            self._comparison_due.clear()
            due = await self.decide(replicas.comparisons_due)
            for comparison in due:
                try:
                    await self._compare(comparison)
                except (CommonweightError, OSError) as error:
                    logger.error(
                        "audit %d: the replica could not be compared: %s",
                        comparison.audit,
                        error,
                        extra={"action": "compare_failed"},
                    )
                    await asyncio.sleep(SETTLE_RETRY_SECONDS)
            if due:
                await self.turn()
                await self._wake()
            else:
                await self._comparison_due.wait()

    async def _compare(self, due: replicas.ComparisonDue) -> None:
        answer = await self._settler.call(
            "compare",
            path=str(self._blobs.path(due.blob_sha256)),
            unit=due.unit,
            seed=due.seed,
            sketch=due.sketch.hex(),
        )
        difference = float(answer["difference"])
        await self.decide(lambda desk: replicas.record_comparison(desk, due.audit, difference))

    async def tell(self) -> None:
        """Reveal what may be revealed, and keep the public end of the log up to date, for ever."""
        while True:
            try:
                await self._tell()
            except (CommonweightError, OSError) as error:
                logger.error("the log's end could not be written: %s", error, extra={"action": "tell_failed"})
            await asyncio.sleep(TELL_SECONDS)

    async def _tell(self) -> None:
        def end(desk: Desk) -> tuple[int, bytes] | None:
            current = desk.store.latest_round()
            published = 0 if current is None else current.round - (current.manifest_sha256 is None)
            epochs.reveal_epochs(desk, published)
            position = desk.store.log_head()[0]
            if position == self._tail_position:
                return None
            return position, settling.log_tail(desk, published)

        async with self._telling:
            found = await self.decide(end)
            if found is not None:
                await asyncio.to_thread(self._publisher.add_log_tail, found[1])
                self._tail_position = found[0]

    async def watch_settler(self) -> None:
        """End when the settler no longer answers; the supervisor then starts everything anew."""
        while True:
            async with asyncio.timeout(SETTLER_PATIENCE_MS / 1000):
                await self._settler.call("ping")
            await asyncio.sleep(WATCH_SECONDS)

    async def sweep(self) -> None:
        """Throw away unfinished uploads that nobody continued, for ever."""
        while True:
            now = self._desk.clock.now_ms()
            older = self._desk.config.rounds.lease_ms + STAGING_GRACE_MS
            try:
                await asyncio.to_thread(self._staging.sweep, older, now)
                unmerged = await self.decide(
                    lambda desk: tuple(set(desk.store.unmerged_blobs()) - bans.appealed_blobs(desk))
                )
                await asyncio.to_thread(self._forget, unmerged, now)
            except (CommonweightError, OSError) as error:
                logger.error("unfinished uploads could not be swept: %s", error, extra={"action": "sweep_failed"})
            await asyncio.sleep(SWEEP_SECONDS)

    def _forget(self, digests: tuple[Digest, ...], now_ms: int) -> None:
        """Remove deltas that nothing merged, once nobody can appeal any more.

        A file's age is that of its arrival; its verdict may have come a while later.
        """
        for digest in digests:
            path = self._blobs.path(digest)
            if path.exists() and now_ms - path.stat().st_mtime_ns // 1_000_000 > 2 * APPEAL_MS:
                self._blobs.remove(digest)

    async def settle(self) -> None:
        """Merge and publish closed rounds as they come, for ever; begins with one that a crash interrupted."""
        while True:
            self._round_due.clear()
            closed = await self.decide(settling.unfinished_round)
            plan = None if closed is not None else await self.decide(settling.plan_if_due)
            if closed is None and plan is None:
                await self._round_due.wait()
                continue
            try:
                if plan is not None:
                    await self._close(plan)
                elif closed is not None:
                    await self._settle(closed)
            except (CommonweightError, OSError) as error:
                # A full disk, most likely. The round stays as it is, with all that came; nothing is lost by waiting.
                logger.error("the round could not be settled: %s", error, extra={"action": "settle_failed"})
                await asyncio.sleep(SETTLE_RETRY_SECONDS)
            await self._wake()

    async def _close(self, plan: settling.MergePlan) -> None:
        """Weigh what is to be merged and fix it; what stands out is audited instead, and the round waits on."""
        if plan.seed is None:
            await self.decide(lambda desk: settling.close(desk, plan, settling.weigh_plainly(desk, plan)))
            return
        answer = await self._settler.call(
            "weigh",
            base=str(self._publisher.directory(plan.round - 1) / layout.WEIGHTS),
            heldout=str(self._heldout),
            heldout_without=await asyncio.to_thread(self._takedowns.heldout_left_out, plan.round - 1),
            seed=plan.seed,
            entries=[
                {
                    **asdict(entry),
                    "path": str(self._blobs.path(Digest(entry.blob_sha256))),
                }
                for entry in plan.entries
            ],
        )
        weighed = settling.Weighed(outliers=answer["outliers"], weights=answer["weights"])
        for claim, reason in weighed.outliers.items():
            words = "has too few others beside it" if reason == "few" else f"stands out ({reason})"
            logger.info("claim %s %s and is audited", claim[:12], words, extra={"action": "outlier"})
        await self.decide(lambda desk: settling.close(desk, plan, weighed))

    async def _settle(self, closed: Round) -> None:
        number = closed.round
        merging = await self.decide(lambda desk: settling.begin_merge(desk, number))
        published = await asyncio.to_thread(self._publisher.published, number)
        if published is None:
            published = await self._merge_and_publish(merging)
        else:
            if (published.manifest.merged, published.manifest.unmerged) != (merging.merge, merging.unmerge):
                # Nobody may see two checkpoints under one number, not even after an old backup was restored.
                raise HistoryDiffers(f"Checkpoint {number} was published with other deltas than the database names.")
            ends = (published.manifest.log_position, published.manifest.log_head)
            if ends != await self.decide(lambda desk: settling.log_end(desk, number)):
                raise HistoryDiffers(f"Checkpoint {number} was published with another log than the database has.")
            await asyncio.to_thread(self._publisher.point_to, number)
        weights = published.manifest.file(layout.WEIGHTS)
        sha256, takedowns = published.sha256, published.manifest.takedowns_sha256
        await self.decide(
            lambda desk: settling.record_published(
                desk,
                number,
                manifest_sha256=sha256,
                weights_sha256=Digest(weights.sha256),
                takedowns_sha256=takedowns,
            )
        )
        logger.info("checkpoint %d published", number, extra={"action": "published"})
        if number >= self._desk.config.rounds.planned:
            logger.info("the run is finished; volunteers are told so, and the public files stay for everybody to fetch")
        await self._tell()
        await asyncio.to_thread(self._prune, number, await self.decide(bans.appealed_blobs))
        self._start(self._measure(number))

    def _prune(self, newest: int, appealed: frozenset[Digest]) -> None:
        """Keep the deltas of the newest `retain_rounds` rounds (0: of all), and of old checkpoints only snapshots.

        Args:
            appealed: deltas that are kept in any case, though no longer shown.
        """
        retain = self._desk.retain_rounds
        old = newest - retain
        if retain and old > 0:
            for entry in self._publisher.prune(old):
                if entry.blob_sha256 not in appealed:
                    self._blobs.remove(Digest(entry.blob_sha256))
        # Units of the last rounds may still be trained from their checkpoints; who asks later patches a snapshot.
        thinned = newest - self._desk.config.rounds.staleness_bound - 2
        for checkpoint in range(max(0, thinned - _THINNED_AT_ONCE), thinned + 1):
            self._publisher.thin(checkpoint)

    async def _merge_and_publish(self, merging: Round) -> PublishedManifest:
        number = merging.round
        publisher = self._publisher
        place = await asyncio.to_thread(publisher.workplace, number)
        blobs = [(entry, self._blobs.path(Digest(entry.blob_sha256))) for entry in merging.merge]
        answer = await self._settler.call(
            "merge",
            checkpoint=number,
            base=str(publisher.directory(number - 1)),
            out=str(place),
            base_files=await asyncio.to_thread(self._publisher.state_files, number - 1),
            entries=[{**asdict(entry), "path": str(path)} for entry, path in blobs],
            unmerge=[
                {
                    **asdict(entry),
                    "path": str(self._blobs.path(Digest(entry.blob_sha256))),
                    "rounds_ago": number - 1 - entry.checkpoint,
                }
                for entry in merging.unmerge
            ],
        )
        merged_files = [FileEntry(**entry) for entry in answer["files"]]
        lines = await self.decide(lambda desk: settling.log_lines(desk, number))
        files = await asyncio.to_thread(publisher.complete, place, number - 1, merged_files)
        await asyncio.to_thread(publisher.add_deltas, blobs)
        await asyncio.to_thread(publisher.add_log, number, lines)
        previous = await asyncio.to_thread(publisher.published, number - 1)
        assert previous is not None  # a round starts from a published checkpoint
        previous_sha256, snapshot = previous.sha256, previous.manifest.snapshot
        state = publisher.state_of(files)
        takedowns = await asyncio.to_thread(self._takedowns.list_for, number, previous.manifest)
        manifest = await self.decide(
            lambda desk: settling.manifest_of(
                desk,
                merging,
                previous_sha256=previous_sha256,
                snapshot=snapshot,
                files=files,
                state=state,
                takedowns_sha256=takedowns,
            )
        )
        return await asyncio.to_thread(publisher.publish, place, manifest)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _measure(self, checkpoint: int) -> None:
        """Measure a checkpoint's validation loss; a failure here costs a number, not the run."""
        try:
            directory = self._publisher.directory(checkpoint)
            weights = {"validation_loss": directory / layout.WEIGHTS, "validation_loss_ema": directory / layout.EMA}
            answer = await self._settler.call(
                "evaluate",
                weights={name: str(path) for name, path in weights.items() if path.exists()},
                heldout=str(self._heldout),
                heldout_without=await asyncio.to_thread(self._takedowns.heldout_left_out, checkpoint),
            )
            metrics = {name: float(loss) for name, loss in answer.items()}
            await asyncio.to_thread(self._publisher.add_metrics, checkpoint, metrics)
        except Exception:
            logger.exception("measuring checkpoint %d failed", checkpoint, extra={"action": "measure_failed"})

    async def start(self, genesis_sha256: Digest) -> None:
        """Open round 1 if there is none yet, and measure the starting point."""

        def begin(desk: Desk) -> bool:
            if desk.store.latest_round() is not None:
                return False
            leasing.open_round(desk, 1, genesis_sha256)
            return True

        if await self.decide(begin):
            self._start(self._measure(0))

    def facts(self, desk: Desk) -> dict[str, Any]:
        """Return where the run stands, for `GetStatus`."""
        current = desk.store.latest_round()
        assert current is not None
        counts = desk.store.unit_counts(current.round)
        published = current.round if current.manifest_sha256 is not None else current.round - 1
        return {
            "round": current.round,
            "round_state": current.state.value,
            "planned_rounds": desk.config.rounds.planned,
            "checkpoint": published,
            "units_open": counts.get(UnitState.OPEN, 0),
            "units_assigned": counts.get(UnitState.ASSIGNED, 0),
            "units_accepted": desk.store.received_count(current.round),
        }


def _read_piece(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(UPLOAD_CHUNK_BYTES)
    except FileNotFoundError:
        raise AuditUnknown("The claim's bytes are not kept any more.") from None
