"""Random histories of runs with liars, late claims, a broken auditor, appeals and merges, through the real decisions
and the real store. No call may fail but by a refusal; what must hold is checked again and again.
"""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from coordinator.audits import OPEN_AUDITS, AuditReason, AuditState, Scrutiny
from coordinator.leasing import Leased
from coordinator.owners import OwnerState
from coordinator.units import AttemptState, UnitState
from protocol.documents import Lease, digest_of, verify
from protocol.errors import DeltaNotFinite, Refusal
from tests.coordinator.desk_harness import Office
from tests.coordinator.desk_people import HONEST, LEASE_MS, ONE, Work, config
from tests.protocol.examples import COORDINATOR

HONEST_NAMES: Final = ("ada", "bob", "cyd")
LIARS: Final = ("eve", "mallory")
STEPS: Final = 220
SEEDS: Final = (0, 2, 6, 7, 8, 20, 22, 28, 30)


class History:
    """One run, driven at random: three honest owners, two who lie now and then, three auditors, one of them broken."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        floor, sampled = self.random.choice([0, ONE // 4, ONE]), self.random.choice([0, ONE // 2, ONE])
        rules = config(floor=floor, referee_share=sampled, probation=2, units=4, planned=4)
        self.office = Office(directory, rules, retain_rounds=self.random.choice([0, 2]))
        trusted = self.random.random() < 0.7
        self.devices = [
            self.office.volunteer(name, device=device, record=60 if trusted else None)
            for name in HONEST_NAMES + LIARS
            for device in ("1", "2")
        ]
        self.auditors = [self.office.auditor(name) for name in ("sound", "also sound")]
        self.broken = self.office.auditor("broken")
        self.works: list[Work] = []
        self.seen: Counter[str] = Counter()

    def step(self) -> None:
        """Do something that can happen."""
        actions: list[tuple[int, Callable[[], object]]] = [
            (10, self.a_device_asks_for_a_unit),
            (24, self.a_device_goes_on),
            (1, self.a_device_hands_back),
            (1, self.a_liar_signs_a_second_claim),
            (1, self.a_liars_bytes_are_no_delta),
            (6, self.time_passes),
            (4, self.office.compare),
            (8, self.an_auditor_judges),
            (1, self.the_broken_auditor_judges),
            (1, self.a_volunteer_appeals),
            (5, self.the_round_closes),
            (5, self.the_round_is_published),
            (1, self.office.reveal),
        ]
        (do,) = self.random.choices([action for _, action in actions], [weight for weight, _ in actions])
        with suppress(Refusal):
            do()

    def _some(self, *states: AttemptState) -> Work | None:
        found = [work for work in self.works if self.office.attempt(work).state in states]
        return self.random.choice(found) if found else None

    # --- what can happen -------------------------------------------------------------------------------------

    def a_device_asks_for_a_unit(self) -> None:
        by = self.random.choice(self.devices)
        answer = self.office.ask(by)
        if isinstance(answer, Leased):
            lease = verify(Lease, answer.envelope, COORDINATOR.public)
            result = "lie" if by.name in LIARS and self.random.random() < 0.4 else HONEST
            if lease.lease not in {work.lease.lease for work in self.works}:
                self.works.append(self.office.result(by, lease, result))

    def a_device_goes_on(self) -> None:
        states = (AttemptState.LEASED, AttemptState.CLAIMED, AttemptState.SKETCHED)
        late = (AttemptState.EXPIRED,) if self.random.random() < 0.3 else ()
        work = self._some(*states, *late)
        if work is None:
            return
        self.office.clock.advance(self.random.choice([0, 1_000, 20_000]))
        steps: list[Callable[[Work], object]] = [self.office.claim, self.office.sketch, self.office.receive]
        begin = max(0, states.index(state) if (state := self.office.attempt(work).state) in states else 0)
        for do in steps[begin : begin + self.random.choice([1, 3])]:
            do(work)

    def a_device_hands_back(self) -> None:
        if work := self._some(AttemptState.LEASED):
            self.office.hand_back(work)

    def a_liar_signs_a_second_claim(self) -> None:
        work = self._some(AttemptState.CLAIMED, AttemptState.SKETCHED, AttemptState.RECEIVED)
        if work and work.by.name in LIARS:
            self.office.claim_another(work, "another")

    def a_liars_bytes_are_no_delta(self) -> None:
        work = self._some(AttemptState.SKETCHED)
        if work and work.by.name in LIARS:
            self.office.refuse(work, DeltaNotFinite())

    def time_passes(self) -> None:
        self.office.wait(self.random.choice([1, LEASE_MS // 4, LEASE_MS]))

    def an_auditor_judges(self) -> None:
        self.office.judge(self.random.choice(self.auditors))

    def the_broken_auditor_judges(self) -> None:
        # Alone with one claim it would ban the honest, which an appeal takes back; that has tests of its own.
        order = self.office.take(self.broken)
        if order is not None and len(order.claims) > 1:
            self.office.judge(self.broken, believes="nonsense")

    def a_volunteer_appeals(self) -> None:
        if work := self._some(AttemptState.JUDGED):
            self.office.appeal(work)

    def the_round_closes(self) -> None:
        plan = self.office.plan()
        if plan is None:
            return
        unaudited = [entry.claim for entry in plan.entries if not entry.audited]
        doubted = set(unaudited[:1] if self.random.random() < 0.2 else [])
        self.office.close([work for work in self.works if digest_of(work.claim) in doubted])

    def the_round_is_published(self) -> None:
        if self.office.is_closed:
            self.office.finish()

    # --- what must hold --------------------------------------------------------------------------------------

    def check(self) -> None:
        self._only_liars_are_banned_and_only_lies_are_refuted()
        self._nothing_in_doubt_can_be_merged()
        for work in self.works:
            self._whatever_waits_has_something_to_wait_for(work)
            self._a_merged_claim_is_told_where_it_is(work)
        for state in OPEN_AUDITS:
            for audit in self.office.store.audits(state):
                if audit.replica is not None:
                    replica = self.office.attempt_of(audit.replica).state
                    assert replica not in (AttemptState.JUDGED, AttemptState.HANDED_BACK), audit
        self._no_secret_is_out_before_the_draws_of_its_epoch_are_settled()

    def _no_secret_is_out_before_the_draws_of_its_epoch_are_settled(self) -> None:
        revealed = {body["epoch"] for body in self.office.log("epoch-revealed")}
        fixed_by_the_claim = (AuditReason.PROBATION, AuditReason.DRAWN, AuditReason.TOO_FAST)
        for work in self.works:
            attempt = self.office.attempt(work)
            unsent = attempt.state in (AttemptState.CLAIMED, AttemptState.SKETCHED)
            if unsent and attempt.reason in fixed_by_the_claim and not self.office.is_over:
                assert attempt.epoch not in revealed or self.office.store.audits_of_replica(attempt.lease)

    def _only_liars_are_banned_and_only_lies_are_refuted(self) -> None:
        honest = {device.session.owner for device in self.devices if device.name in HONEST_NAMES}
        for owner in self.office.store.owners():
            assert not (owner.owner in honest and owner.state is OwnerState.BANNED)
        for work in self.works:
            code = self.office.code(work)
            refuted = code in ("REPLAY_DIFFERS", "RETRACTED")
            assert not (refuted and work.result == HONEST)
            assert not (code == "RESTORED" and work.result != HONEST)
            judged = [audit for audit in self.office.audits(work) if self.office.store.opinions(audit.audit)]
            if work.result != HONEST:
                assert AuditState.PASSED not in {audit.state for audit in judged}

    def _nothing_in_doubt_can_be_merged(self) -> None:
        for unit, attempt in self.office.store.mergeable():
            assert unit.state is not UnitState.SETTLED
            assert attempt.scrutiny is not Scrutiny.PENDING
            assert attempt.late <= self.office.desk.config.rounds.staleness_bound
            owner = self.office.store.owner(attempt.owner)
            assert owner is not None
            assert owner.state is not OwnerState.BANNED

    def _whatever_waits_has_something_to_wait_for(self, work: Work) -> None:
        attempt = self.office.attempt(work)
        of_subject, of_replica = self.office.audits(work), self.office.store.audits_of_replica(attempt.lease)
        doubted = attempt.scrutiny is Scrutiny.PENDING or self.office.is_over
        if attempt.state is AttemptState.EXCUSED:
            assert any(audit.state in OPEN_AUDITS for audit in of_replica)
        if attempt.state is AttemptState.RECEIVED and doubted:
            assert any(audit.state in OPEN_AUDITS for audit in (*of_subject, *of_replica))

    def _a_merged_claim_is_told_where_it_is(self, work: Work) -> None:
        unit, code = self.office.unit(work), self.office.code(work)
        if unit.chosen == work.lease.lease and unit.merged_in is not None:
            assert code in ("MERGED", "RETRACTED", "RESTORED")
            assert unit.retracted == (code == "RETRACTED" or (code == "RESTORED" and unit.unmerged_in is not None))

    def count(self) -> Counter[str]:
        """What has happened in this history."""
        seen: Counter[str] = Counter()
        for work in self.works:
            seen.update([self.office.code(work) or "no verdict"])
            seen.update(state.value for state in self.office.states(work))
        for kind in ("agreed", "disagreed", "appeal", "unmerged", "epoch-revealed", "published"):
            seen[kind] += len(self.office.log(kind))
        seen.update(self.office.reasons())
        seen.update(body["event"] for body in self.office.log("owner"))
        seen.update(["over"] if self.office.is_over else [])
        return seen


@pytest.fixture(scope="module")
def seen() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_no_call_breaks_and_what_must_hold_holds(
    seed: int, tmp_path: Path, seen: Counter[str]
) -> None:
    history = History(tmp_path, seed)
    for step in range(STEPS):
        history.step()
        if step % 10 == 9:
            history.check()
    seen.update(history.count())
    history.office.store.close()


def test_the_histories_reach_most_parts_of_the_rules(seen: Counter[str]) -> None:
    if not seen:
        pytest.skip("the histories were not run")
    wanted = {"MERGED", "REPLICA", "TOO_LATE", "REPLAY_DIFFERS", "OWNER_BANNED", "agreed", "disagreed", "appeal"}
    wanted |= {reason.value for reason in AuditReason} - {"conflict", "distrusted", "few", "overdue"}
    wanted |= {"passed", "failed", "dropped", "promoted", "banned", "epoch-revealed", "published", "over"}
    assert not {name for name in wanted if not seen[name]}
