"""Random histories of leases, late claims, doubts, crashes and merges against the real store; what must hold is
checked after every step."""

import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordinator.audits import AuditReason, Scrutiny
from coordinator.clock import ManualClock
from coordinator.owners import Device
from coordinator.sqlite_store import SqliteStore
from coordinator.units import (
    Attempt,
    AttemptEvent,
    AttemptState,
    Expired,
    HandedBack,
    Judged,
    OfferToUnit,
    Outcome,
    Received,
    ReleaseUnit,
    Sketched,
    UnitAccepted,
    UnitAssigned,
    UnitReleased,
    UnitState,
    advance,
    needs_release,
)
from tests.coordinator import examples
from tests.coordinator.stored import fill

UNITS = 3
DEVICES = [examples.device("ada-1", "ada"), examples.device("ada-2", "ada"), examples.device("bob-1", "bob")]
LEASE_MS = 100


class Leases(RuleBasedStateMachine):
    """A coordinator that only leases, receives and merges, driven at random."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="commonweight-leases-"))
        self.store = SqliteStore.open(self.directory / "state.sqlite")
        self.clock = ManualClock(1_000)
        self.leases = 0
        self.chosen: dict[str, str] = {}

    @initialize()
    def open_the_round(self) -> None:
        fill(self.store, units=UNITS)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    # --- what a coordinator does -----------------------------------------------------------------------------

    def _apply(self, attempt: Attempt, event: AttemptEvent) -> None:
        """Move an attempt and do what its table instructs, in one transaction."""
        moved, instructions = advance(attempt, event)
        with self.store.transaction():
            self.store.save_attempt(attempt, moved)
            for instruction in instructions:
                match instruction:
                    case ReleaseUnit(unit=name):
                        unit = self.store.unit(name)
                        assert unit is not None
                        if needs_release(unit, self.store.attempts_of_unit(name), self.clock.now_ms()):
                            self.store.save_unit(unit, advance(unit, UnitReleased())[0])
                    case OfferToUnit(unit=name):
                        unit = self.store.unit(name)
                        assert unit is not None
                        if unit.state is UnitState.OPEN:
                            self.store.save_unit(unit, advance(unit, UnitAssigned())[0])

    def _some(self, pick: int, *states: AttemptState) -> Attempt | None:
        found = [attempt for attempt in self._attempts() if attempt.state in states]
        return found[pick % len(found)] if found else None

    def _attempts(self) -> list[Attempt]:
        units = self.store.units(1)
        return [attempt for unit in units for attempt in self.store.attempts_of_unit(unit.unit)]

    # --- what can happen -------------------------------------------------------------------------------------

    @rule(device=st.sampled_from(DEVICES), crash=st.booleans())
    def a_device_asks_for_a_unit(self, device: Device, crash: bool) -> None:
        unit = self.store.next_open_unit(1)
        if unit is None or self.store.leased_attempt(device.device) is not None:
            return
        self.leases += 1
        deadline_ms = self.clock.now_ms() + LEASE_MS
        attempt = examples.leased(str(self.leases), unit, device, deadline_ms=deadline_ms)
        try:
            with self.store.transaction():
                self.store.save_unit(unit, advance(unit, UnitAssigned())[0])
                self.store.add_attempt(attempt)
                if crash:
                    raise InterruptedError
        except InterruptedError:
            assert self.store.unit(unit.unit) == unit
            assert self.store.attempt(attempt.lease) is None

    @rule(ms=st.integers(1, 2 * LEASE_MS))
    def time_passes_and_leases_end(self, ms: int) -> None:
        now = self.clock.advance(ms)
        for attempt in self.store.due_attempts(now):
            event = Expired() if attempt.state is AttemptState.LEASED else Judged(verdict_envelope=b"too late")
            self._apply(attempt, event)
        assert self.store.due_attempts(now) == ()

    @rule(pick=st.integers(0, 20))
    def a_device_hands_back(self, pick: int) -> None:
        attempt = self._some(pick, AttemptState.LEASED)
        if attempt:
            self._apply(attempt, HandedBack())

    @rule(pick=st.integers(0, 20), reason=st.sampled_from([None, AuditReason.DRAWN]))
    def a_device_claims_in_time_or_late(self, pick: int, reason: AuditReason | None) -> None:
        attempt = self._some(pick, AttemptState.LEASED, AttemptState.EXPIRED)
        if attempt:
            deadline_ms = self.clock.now_ms() + LEASE_MS
            self._apply(attempt, examples.claim_event(attempt.lease, deadline_ms=deadline_ms, reason=reason))

    @rule(pick=st.integers(0, 20))
    def a_device_goes_on_with_its_claim(self, pick: int) -> None:
        attempt = self._some(pick, AttemptState.CLAIMED, AttemptState.SKETCHED)
        if attempt:
            sketch, bytes_ = Sketched(sketch=examples.SKETCH), Received(receipt=b"receipt of bytes", late=0)
            self._apply(attempt, sketch if attempt.state is AttemptState.CLAIMED else bytes_)

    @rule(pick=st.integers(0, 20), passes=st.booleans())
    def an_audit_ends(self, pick: int, passes: bool) -> None:
        waiting = [attempt for attempt in self._attempts() if attempt.scrutiny is Scrutiny.PENDING]
        waiting = [attempt for attempt in waiting if attempt.state is AttemptState.RECEIVED]
        if waiting and passes:
            before = waiting[pick % len(waiting)]
            with self.store.transaction():
                self.store.save_attempt(before, replace(before, scrutiny=Scrutiny.CONFIRMED))
        elif waiting:
            self._apply(waiting[pick % len(waiting)], Judged(verdict_envelope=b"refuted"))

    @rule()
    def the_round_merges_what_there_is(self) -> None:
        with self.store.transaction():
            for unit, attempt in self.store.mergeable():
                assert attempt.scrutiny is not Scrutiny.PENDING
                accepted, _ = advance(unit, UnitAccepted(lease=attempt.lease))
                self.store.save_unit(unit, replace(accepted, merged_in=1))
                self.store.save_attempt(attempt, advance(attempt, Judged(verdict_envelope=b"merged"))[0])
                self.chosen[unit.unit] = attempt.lease
        assert self.store.mergeable() == ()

    @rule()
    def the_coordinator_is_started_again(self) -> None:
        before = (self.store.units(1), self._attempts())
        self.store.close()
        self.store = SqliteStore.open(self.directory / "state.sqlite")
        assert (self.store.units(1), self._attempts()) == before

    # --- what must hold --------------------------------------------------------------------------------------

    @invariant()
    def no_unit_and_no_device_is_leased_twice(self) -> None:
        leased = [attempt for attempt in self._attempts() if attempt.state is AttemptState.LEASED]
        assert max(Counter(attempt.unit for attempt in leased).values(), default=0) <= 1
        assert max(Counter(attempt.device for attempt in leased).values(), default=0) <= 1

    @invariant()
    def an_open_unit_has_nobody_training_it_and_an_assigned_one_has_somebody_at_it(self) -> None:
        for unit in self.store.units(1):
            attempts = self.store.attempts_of_unit(unit.unit)
            if unit.state is UnitState.OPEN:
                assert AttemptState.LEASED not in {attempt.state for attempt in attempts}
            assert not needs_release(unit, attempts, self.clock.now_ms())

    @invariant()
    def a_unit_is_settled_once_by_an_attempt_whose_bytes_are_here(self) -> None:
        for unit in self.store.units(1):
            assert unit.chosen == self.chosen.get(unit.unit)
            if unit.chosen is not None:
                chosen = self.store.attempt(unit.chosen)
                assert chosen is not None
                assert chosen.unit == unit.unit
                assert chosen.bytes_receipt is not None
                assert (chosen.state is AttemptState.JUDGED) == (unit.merged_in is not None)

    @invariant()
    def the_counts_are_those_of_the_rows(self) -> None:
        units, attempts = self.store.units(1), self._attempts()
        assert sum(self.store.unit_counts(1).values()) == len(units)
        assert self.store.outcome_counts()[Outcome.ACCEPTED] == sum(self.store.units_by_member().values())
        received = [attempt for attempt in attempts if attempt.state is AttemptState.RECEIVED]
        assert self.store.received_count(1) == len({attempt.unit for attempt in received})
        settled = {unit.unit for unit in units if unit.state is UnitState.SETTLED}
        ready = {attempt.unit for attempt in received if attempt.scrutiny is not Scrutiny.PENDING} - settled
        assert self.store.ready_count(1) == len(ready) == len(self.store.mergeable())
        doubted = {AttemptState.CLAIMED, AttemptState.SKETCHED, AttemptState.RECEIVED}
        in_doubt = [
            attempt for attempt in attempts if attempt.scrutiny is Scrutiny.PENDING and attempt.state in doubted
        ]
        assert self.store.in_doubt_count(1) == len(in_doubt)


Leases.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestLeases = Leases.TestCase
