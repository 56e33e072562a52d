"""The coordinator in virtual time: a desk on a real database, the control process's clockwork, and its referees."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from benchmarks.simulation.people import TRAINER, Identity, referee
from benchmarks.simulation.physics import Physics, Task
from benchmarks.simulation.tally import Meter
from coordinator import deadlines, epochs, leasing, referees, replicas, settling
from coordinator.clock import ManualClock
from coordinator.desk import Desk
from coordinator.owners import Owner, OwnerState
from coordinator.rounds import Round
from coordinator.sessions import Session
from coordinator.settling import MergePlan
from coordinator.sqlite_store import SqliteStore
from protocol.canonical import sha256_hex
from protocol.documents import Claim, Digest, Opinion, RunConfig, RunId, UnitId, digest_of, parse_payload, sign
from protocol.envelope import parse_envelope
from protocol.errors import Refusal
from protocol.keys import PrivateKey
from protocol.limits import MINUTE_MS, SECOND_MS
from verify.compare import judge

T = TypeVar("T")
Later = Callable[[int, Callable[[], None]], None]
"""Do something after so many milliseconds."""

START_MS: Final = 1_700_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long things take, in milliseconds; training varies by a tenth from unit to unit."""

    train_ms: int = MINUTE_MS
    upload_ms: int = 10 * SECOND_MS
    replay_ms: int = 30 * SECOND_MS
    tick_ms: int = 5 * SECOND_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long the settler takes, in milliseconds: to weigh and to merge each delta, and for each checkpoint besides.

    While it weighs the round still collects; from the close on it does not, until its checkpoint is published.
    """

    weigh_ms: int = 0
    merge_ms: int = 0
    publish_ms: int = 0


class Office:
    """The coordinator: everything that the control and the settler process do, in one thread.

    Args:
        pace: of the settler; by default it takes no time.
        later: needed if it takes some.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        physics: Physics,
        folder: Path,
        seed: bytes,
        delta_bytes: int,
        pace: Pace | None = None,
        later: Later | None = None,
    ) -> None:
        self._pace = pace or Pace()
        self._later = later
        self._settling = False
        self.config = config
        self.physics = physics
        self.clock = ManualClock(START_MS)
        self.store = SqliteStore.open(folder / "state.sqlite")
        self.finished = False
        self.desk = Desk(
            run=RunId(sha256_hex(b"run" + seed)),
            config=config,
            config_sha256=digest_of(config),
            key=PrivateKey.from_seed(hashlib.sha256(b"coordinator" + seed).digest()),
            run_secret=hashlib.sha256(b"secret" + seed).digest(),
            delta_bytes=delta_bytes,
            retain_rounds=0,
            snapshot_every=1,
            store=self.store,
            clock=self.clock,
        )

    def close(self) -> None:
        """Close the database."""
        self.store.close()

    def decide(self, work: Callable[[Desk], T]) -> T:
        """One transaction, as the control process makes it."""
        with self.store.transaction():
            return work(self.desk)

    def open(self) -> None:
        """Publish checkpoint 0 and open round 1."""
        first = self.physics.first_weights()
        self.decide(lambda desk: leasing.open_round(desk, 1, first))

    def establish(self, session: Session, *, record: int, audited_ms: int) -> None:
        """Store an owner as established, with so many audits passed."""
        owner = Owner(
            owner=session.owner,
            public_key=session.owner_key.hex,
            member=self.desk.member(session.owner),
            terms_sha256=self.config.terms_sha256,
            state=OwnerState.ESTABLISHED,
            valid_in_row=record,
            audited_ms=audited_ms,
        )
        self.decide(lambda desk: desk.store.put_owner(owner))

    def turn(self) -> None:
        """End what is due, compare what is to be compared, and close rounds."""
        self.decide(deadlines.end_what_is_due)
        for due in self.decide(replicas.comparisons_due):
            difference = self.physics.difference(due)
            self.decide(partial(replicas.record_comparison, number=due.audit, difference=difference))
        while not self._settling and (plan := self.decide(settling.plan_if_due)) is not None:
            self._settling = True
            self._after(self._pace.weigh_ms * len(plan.entries), partial(self._close, plan))

    def _after(self, ms: int, act: Callable[[], None]) -> None:
        if ms:
            assert self._later is not None, "a settler that takes time needs somebody to tell the time"
            self._later(ms, act)
        else:
            act()

    def reveal(self) -> None:
        """Reveal the secrets of epochs that are settled."""
        self.decide(lambda desk: epochs.reveal_epochs(desk, self.published()))

    def published(self) -> int:
        """Return the number of the newest checkpoint."""
        current = self.store.latest_round()
        return 0 if current is None else current.round - (current.manifest_sha256 is None)

    def _close(self, plan: MergePlan) -> None:
        closed = self.decide(partial(settling.close, plan=plan, weighed=self.physics.weigh(plan)))
        if closed is None:
            self._settling = False
            return  # something is audited first; the round is planned again when it is due again
        merging = self.decide(partial(settling.begin_merge, round_number=closed.round))
        merge_ms = self._pace.merge_ms * len(merging.merge) + self._pace.publish_ms
        self._after(merge_ms, partial(self._publish, merging))

    def _publish(self, merging: Round) -> None:
        number = merging.round
        weights = self.physics.merge(merging)
        manifest = Digest(sha256_hex(f"manifest/{number}/{weights}".encode()))
        self.decide(
            partial(settling.record_published, round_number=number, manifest_sha256=manifest, weights_sha256=weights)
        )
        self._settling = False
        self.finished = number >= self.config.rounds.planned


class Referees:
    """The operator's auditors: each takes one audit at a time, replays its unit, and signs what it found."""

    def __init__(
        self, office: Office, *, count: int, replay_ms: int, seed: bytes, shard_bytes: int, meter: Meter, later: Later
    ) -> None:
        self._office = office
        self._replay_ms = replay_ms
        self._shard_bytes = shard_bytes
        self._meter = meter
        self._later = later
        self._idle = [
            referee(f"auditor-{number}", seed=seed, config=office.config, run=office.desk.run)
            for number in range(count)
        ]
        self.refusals: Counter[str] = Counter()

    def send(self) -> None:
        """Let every idle auditor take an audit."""
        for auditor in list(self._idle):
            order = self._office.decide(partial(referees.take_audit, session=auditor.session))
            if order is None:
                continue
            self._idle.remove(auditor)
            self._meter.units["referee"] += 1
            self._meter.bytes["referee"] += self._shard_bytes + len(order.claims) * self._office.desk.delta_bytes
            self._later(self._replay_ms, partial(self._judge, auditor, order))

    def _judge(self, auditor: Identity, order: referees.AuditOrder) -> None:
        self._idle.append(auditor)
        opinions = tuple(self._opinion(auditor, order, envelope) for envelope in order.claims)
        try:
            self._office.decide(partial(referees.submit_opinions, session=auditor.session, envelopes=opinions))
        except Refusal as refusal:  # the audit was settled otherwise meanwhile
            self.refusals[refusal.code] += 1

    def _opinion(self, auditor: Identity, order: referees.AuditOrder, envelope: bytes) -> bytes:
        claim = parse_payload(Claim, parse_envelope(envelope).payload)
        task = Task(unit=UnitId(claim.unit), round=order.round, index=order.index)
        numbers = self._office.physics.replay(task, claim.artifacts[0])
        opinion = Opinion(
            run=self._office.desk.run,
            claim=digest_of(claim),
            unit=claim.unit,
            auditor=auditor.session.device,
            finding=judge(numbers, self._office.config.verification),
            raw_difference=numbers.raw_difference,
            code_difference=numbers.code_difference,
            trail_agrees=True,
            content_sha256=claim.artifacts[0].content_sha256,
            seconds=self._replay_ms / 1000,
            trainer_version=TRAINER,
            device_class=auditor.session.proof.device_class,
        )
        return sign(opinion, auditor.key)
