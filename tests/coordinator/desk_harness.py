"""A coordinator without its wire, processes and settler: a desk on a real database, with a clock that is moved by hand.

Volunteers and auditors act through the functions that their calls would reach, each in one transaction. A result is a
word: two results of one unit agree if their words do, and a referee confirms the word HONEST only.

    office = Office(tmp_path)
    ada = office.volunteer("ada", record=ESTABLISHED)
    done = office.deliver(ada)
    office.publish()
    assert office.code(done) == "MERGED"
"""

import hashlib
import random
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from coordinator import appeals, claims, deadlines, epochs, leasing, referees, replicas, settling
from coordinator.audits import replica_wait_ms
from coordinator.clock import ManualClock
from coordinator.desk import Desk
from coordinator.leasing import Leased
from coordinator.owners import OwnerState
from coordinator.sessions import Session
from coordinator.sqlite_store import SqliteStore
from diloco import NUMERICS
from protocol.assignment import unit_samples
from protocol.calls import Instruction
from protocol.documents import (
    Artifact,
    BytesReceipt,
    Claim,
    Digest,
    Lease,
    LeaseId,
    Opinion,
    RunConfig,
    RunId,
    SessionProof,
    UnitId,
    digest_of,
    parse_payload,
    sign,
    verify,
)
from protocol.envelope import parse_envelope
from protocol.errors import ClaimConflict, Refusal
from protocol.keys import PrivateKey
from tests.coordinator.desk_people import (
    DELTA_BYTES,
    HONEST,
    ONE,
    START_MS,
    TRAINING_MS,
    Volunteer,
    Work,
    config,
)
from tests.coordinator.desk_records import Records
from tests.protocol.examples import COORDINATOR, ROOT

T = TypeVar("T")

Opening: TypeAlias = Callable[..., "Office"]
"""Opens an office; the fixture `opening` is one."""


class Office(Records):
    """A served run, from its first round on."""

    def __init__(self, directory: Path, run: RunConfig | None = None, *, retain_rounds: int = 0) -> None:
        run = run or config()
        self.store = SqliteStore.open(directory / "state.sqlite")
        self.store._connection.execute("PRAGMA synchronous=OFF")  # no machine crashes here, and the disk takes its time
        self.clock = ManualClock(START_MS)
        self.desk = Desk(
            run=RunId(ROOT.public.key_id),
            config=run,
            config_sha256=digest_of(run),
            key=COORDINATOR,
            run_secret=b"\x07" * 32,
            delta_bytes=DELTA_BYTES,
            retain_rounds=retain_rounds,
            snapshot_every=3,
            store=self.store,
            clock=self.clock,
        )
        self._salts = 0
        self._random = random.Random(11)
        self._decide(lambda desk: leasing.open_round(desk, 1, Digest("ba" * 32)))

    # --- who is there ----------------------------------------------------------------------------------------

    def volunteer(self, name: str, *, device: str = "1", record: int | None = None) -> Volunteer:
        """A device of the owner `name`. With a record, the owner is established by so many audits passed."""
        owner, key = _key(f"owner {name}"), _key(f"device {name} {device}")
        session = self._session(key, owner)
        if record is not None:
            self._decide(lambda desk: leasing.remember_device(desk, session))
            known = self.store.owner(session.owner)
            assert known is not None
            trusted = replace(known, state=OwnerState.ESTABLISHED, valid_in_row=record, audited_ms=TRAINING_MS)
            self._decide(lambda desk: desk.store.put_owner(trusted))
        return Volunteer(name=name, key=key, session=session)

    def auditor(self, name: str = "referee") -> Volunteer:
        """An auditor, whom the root key is taken to have delegated."""
        key = _key(f"auditor {name}")
        return Volunteer(name=name, key=key, session=replace(self._session(key, key), auditor=True))

    def _session(self, key: PrivateKey, owner: PrivateKey) -> Session:
        proof = SessionProof(
            run=self.desk.run,
            certificate_sha256="c0" * 32,
            nonce="0e" * 32,
            numerics=NUMERICS,
            trainer_version="0.2.0",
            device_class="cpu-x86_64-avx2-torch2.13-t1",
            terms_sha256=self.desk.config.terms_sha256,
        )
        return Session(
            device=key.public.key_id,
            device_key=key.public,
            owner=owner.public.key_id,
            owner_key=owner.public,
            proof=proof,
            delegation_envelope=b"a delegation",
            expires_ms=2**53,
        )

    # --- a volunteer's calls ---------------------------------------------------------------------------------

    def ask(self, by: Volunteer) -> leasing.Leased | leasing.NoWork:
        """Ask for a unit."""
        return self._decide(lambda desk: leasing.lease_unit(desk, by.session, random_bytes=self._random.randbytes))

    def lease(self, by: Volunteer, result: str = HONEST) -> Work:
        """Lease a unit, which there must be, and decide on what to claim for it."""
        answer = self.ask(by)
        assert isinstance(answer, Leased), answer
        return self.result(by, verify(Lease, answer.envelope, COORDINATOR.public), result)

    def result(self, by: Volunteer, lease: Lease, result: str) -> Work:
        """Make a claim, with a salt of its own, that a lease's result is this word."""
        self._salts += 1
        content = hashlib.sha256(f"{lease.unit} {result}".encode()).hexdigest()
        claim = Claim(
            run=self.desk.run,
            lease=lease.lease,
            lease_sha256=digest_of(lease),
            unit=lease.unit,
            device=by.session.device,
            artifacts=(Artifact(role="delta", content_sha256=content, blob_sha256=content, size=DELTA_BYTES),),
            trail_root="7a" * 32,
            salt=f"{self._salts:064x}",
            samples=unit_samples(self.desk.config, UnitId(lease.unit)),
            loss=0.5,
            trainer_version="0.2.0",
            device_class="cpu-x86_64-avx2-torch2.13-t1",
        )
        return Work(by=by, lease=lease, result=result, claim=claim, envelope=sign(claim, by.key))

    def hand_back(self, work: Work) -> None:
        """Give the unit back."""
        self._decide(lambda desk: leasing.hand_back(desk, work.by.session, work.lease.lease))

    def claim(self, work: Work) -> Instruction:
        """Claim the result; return what must follow."""
        answer = self._decide(lambda desk: claims.submit_claim(desk, work.by.session, work.envelope))
        if answer.conflict is not None:
            raise answer.conflict
        return answer.next

    def sketch(self, work: Work) -> Instruction:
        """Send the sketch of what was claimed; return what must follow."""
        return self._decide(lambda desk: claims.submit_sketch(desk, work.by.session, work.digest, work.sketch))

    def receive(self, work: Work) -> BytesReceipt:
        """Upload what was claimed; return the receipt."""
        expected = self._decide(lambda desk: claims.expected_artifact(desk, work.by.session, work.digest, "delta"))
        if isinstance(expected, bytes):
            return verify(BytesReceipt, expected, COORDINATOR.public)
        receipt = self._decide(lambda desk: claims.record_received(desk, LeaseId(work.lease.lease)))
        return verify(BytesReceipt, receipt, COORDINATOR.public)

    def refuse(self, work: Work, refusal: Refusal) -> None:
        """Have the bytes that were uploaded turn out to be no delta of this run."""
        self._decide(lambda desk: claims.record_refused(desk, LeaseId(work.lease.lease), refusal))

    def train(self, by: Volunteer, result: str = HONEST, *, ms: int = TRAINING_MS) -> Work:
        """Lease a unit, train it, claim it and send its sketch."""
        work = self.lease(by, result)
        self.clock.advance(ms)
        self.claim(work)
        self.sketch(work)
        return work

    def deliver(self, by: Volunteer, result: str = HONEST, *, ms: int = TRAINING_MS) -> Work:
        """All that, and the bytes."""
        work = self.train(by, result, ms=ms)
        self.receive(work)
        return work

    def claim_another(self, work: Work, result: str) -> None:
        """Sign a second, different claim for the same lease; it must be refused as a conflict."""
        try:
            self.claim(self.result(work.by, work.lease, result))
        except ClaimConflict:
            return
        raise AssertionError("a second claim was taken")

    def appeal(self, work: Work, by: Volunteer | None = None) -> None:
        """Ask for a second referee."""
        self._decide(lambda desk: appeals.appeal(desk, (by or work.by).session, work.digest))

    # --- what the control process does -----------------------------------------------------------------------

    def wait(self, ms: int) -> None:
        """Let time pass, and the clockwork turn once."""
        self.clock.advance(ms)
        self._decide(deadlines.end_what_is_due)

    def resume(self, stopped_ms: int) -> None:
        """Start again after a stop at that time."""
        self._decide(lambda desk: deadlines.forgive_absence(desk, stopped_ms))

    def offer_replicas_widely(self) -> None:
        """Let so much time pass that replicas are offered to as many owners as they ever are, of two to both."""
        self.clock.advance(replica_wait_ms(self.desk.config.rounds.lease_ms) - 1)

    def compare(self) -> int:
        """Compare the replicas that wait for it; return how many."""
        due = self._decide(replicas.comparisons_due)
        for comparison in due:
            audit = self.store.audit(comparison.audit)
            assert audit is not None
            assert audit.replica is not None
            subject, other = self.attempt_of(audit.lease), self.attempt_of(audit.replica)
            agree = subject.artifacts == other.artifacts
            difference = 0.0 if agree else 1.0
            number = comparison.audit
            self._decide(lambda desk: replicas.record_comparison(desk, number, difference))  # noqa: B023
        return len(due)

    def plan(self) -> settling.MergePlan | None:
        """Return what the round would merge if it closed now."""
        return self._decide(settling.plan_if_due)

    def close(self, outliers: Collection[Work] = (), plan: settling.MergePlan | None = None) -> bool:
        """Close the round if it is due and stays so when the outliers are put aside; the deltas weigh the same.

        As it was planned before (`plan`), or as it is planned now.
        """
        plan = plan or self.plan()
        if plan is None:
            return False
        standing_out = {str(digest_of(work.claim)): "norm" for work in outliers}
        weights = {entry.claim: ONE // len(plan.entries) for entry in plan.entries if entry.claim not in standing_out}
        weighed = settling.Weighed(outliers=standing_out, weights=weights)
        return self._decide(lambda desk: settling.close(desk, plan, weighed)) is not None

    def publish(self, outliers: Collection[Work] = ()) -> bool:
        """Close the round, merge it and publish its checkpoint; False if it is not due."""
        if not self.close(outliers):
            return False
        self.finish()
        return True

    def finish(self, takedowns_sha256: str | None = None) -> None:
        """Merge and publish the round that is closed."""
        number = self.round

        def settle(desk: Desk) -> None:
            settling.begin_merge(desk, number)
            manifest, weights = Digest(f"{number:064x}"), Digest(f"{number + 1:064x}")
            settling.record_published(
                desk, number, manifest_sha256=manifest, weights_sha256=weights, takedowns_sha256=takedowns_sha256
            )

        self._decide(settle)

    def reveal(self) -> None:
        """Reveal the secrets that may be."""
        current = self.store.latest_round()
        assert current is not None
        published = current.round - (current.manifest_sha256 is None)
        self._decide(lambda desk: epochs.reveal_epochs(desk, published))

    # --- an auditor's calls ----------------------------------------------------------------------------------

    def take(self, auditor: Volunteer) -> referees.AuditOrder | None:
        """Ask for claims to judge."""
        return self._decide(lambda desk: referees.take_audit(desk, auditor.session))

    def opinion(self, auditor: Volunteer, envelope: bytes, finding: str, raw_difference: float = 0.75) -> bytes:
        """Return the auditor's signed opinion on a claim."""
        claim = parse_payload(Claim, parse_envelope(envelope).payload)
        assert finding in ("confirmed", "refuted")
        opinion = Opinion(
            run=self.desk.run,
            claim=digest_of(claim),
            unit=claim.unit,
            auditor=auditor.session.device,
            finding="confirmed" if finding == "confirmed" else "refuted",
            raw_difference=0.0 if finding == "confirmed" else raw_difference,
            code_difference=0.0 if finding == "confirmed" else 1.5,
            trail_agrees=finding == "confirmed",
            content_sha256="ca" * 32,
            seconds=12.5,
            trainer_version="0.2.0",
            device_class="cpu-x86_64-avx2-torch2.13-t1",
        )
        return sign(opinion, auditor.key)

    def submit(self, auditor: Volunteer, *envelopes: bytes) -> None:
        """Hand opinions in."""
        self._decide(lambda desk: referees.submit_opinions(desk, auditor.session, envelopes))

    def judge(
        self, auditor: Volunteer, *, believes: str = HONEST, raw_difference: float = 0.75
    ) -> tuple[str, ...] | None:
        """Take an audit and judge it by running the unit, which gives this auditor the word `believes`.

        Return the findings, or None if there is nothing to judge.
        """
        order = self.take(auditor)
        if order is None:
            return None
        findings = []
        for envelope in order.claims:
            claim = parse_payload(Claim, parse_envelope(envelope).payload)
            own = hashlib.sha256(f"{claim.unit} {believes}".encode()).hexdigest()
            findings.append("confirmed" if claim.artifacts[0].content_sha256 == own else "refuted")
        opinions = zip(order.claims, findings, strict=True)
        self.submit(
            auditor, *(self.opinion(auditor, envelope, finding, raw_difference) for envelope, finding in opinions)
        )
        return tuple(findings)


def replicated(office: Office, subject: str = "honest", replica: str = "honest") -> tuple[Work, Work]:
    """Ada's drawn work, and the sketched replica of it by Bob; both owners are established."""
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    work = office.deliver(ada, subject)
    other = office.train(bob, replica)
    assert other.lease.unit == work.lease.unit
    return work, other


def _key(name: str) -> PrivateKey:
    return PrivateKey.from_seed(hashlib.sha256(name.encode()).digest())
