"""What every implementation of `coordinator.store.Store` must do; an implementation's test class inherits this one.

What audits need of a store is in `tests.coordinator.store_audit_conformance`.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.audits import (
    OPEN_AUDITS,
    AuditReason,
    AuditState,
    Scrutiny,
)
from coordinator.owners import AuditPassed, Banned, OwnerState
from coordinator.owners import advance as advance_owner
from coordinator.rounds import Closed, MergeStarted, Published, Round
from coordinator.rounds import advance as advance_round
from coordinator.store import Store
from coordinator.units import (
    Excused,
    Expired,
    Judged,
    Outcome,
    UnitAbandoned,
    UnitAssigned,
    UnitReleased,
    UnitState,
    advance,
)
from protocol.documents import Digest, LeaseId, UnitId
from protocol.errors import DirectoryNotEmpty, StaleRow
from protocol.limits import MAX_EVIDENCE_PER_LEASE
from protocol.log import EMPTY_LOG_HEAD, LogEntry, next_head
from tests.coordinator import examples
from tests.coordinator.stored import AUDITOR, NOBODY, OpensStore, add_audit, choose, deliver, fill, lease, save


class StoreConformance(OpensStore):
    """The suite. Each test names one MUST of the `Store` docstrings."""

    # --- transactions ----------------------------------------------------------------------------------------

    def test_what_a_transaction_wrote_is_there_after_opening_again(self, tmp_path: Path) -> None:
        store = self.open_store(tmp_path)
        fill(store)
        unit, attempt = choose(store, "a", 0)
        with store.transaction():
            entry = store.append_log("claim", b'{"claim":1}')
            store.add_evidence(attempt.lease, b"another claim")
            audit = store.add_audit(examples.audit(attempt))
            store.add_opinion(audit.audit, audit.claim, AUDITOR, "confirmed", b"opinion")
        store.close()

        again = self.open_store(tmp_path)
        assert again.unit(unit.unit) == unit
        assert again.attempt(attempt.lease) == attempt
        assert again.log_entries(1, 9) == (entry,)
        assert again.evidence(attempt.lease) == (b"another claim",)
        assert again.audit(audit.audit) == audit
        assert again.opinions(audit.audit) == (b"opinion",)
        again.close()

    def test_a_transaction_that_raises_leaves_no_trace(self, filled: Store) -> None:
        def write_and_fail() -> None:
            with filled.transaction():
                filled.append_log("claim", b"{}")
                filled.put_meta("seen", "yes")
                assert filled.meta("seen") == "yes"
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            write_and_fail()
        assert filled.meta("seen") is None
        assert filled.log_head() == (0, EMPTY_LOG_HEAD)
        with filled.transaction():
            filled.put_meta("seen", "later")
        assert filled.meta("seen") == "later"

    def test_a_transaction_inside_another_is_refused_and_spoils_both(self, filled: Store) -> None:
        def nest() -> None:
            with filled.transaction():
                filled.put_meta("outer", "yes")
                with filled.transaction():
                    filled.put_meta("inner", "yes")

        with pytest.raises(RuntimeError, match="inside another"):
            nest()
        assert filled.meta("outer") is None

    def test_a_write_outside_a_transaction_is_refused(self, filled: Store) -> None:
        unit = examples.unit()
        with pytest.raises(RuntimeError, match="belongs in a transaction"):
            filled.put_meta("key", "value")
        with pytest.raises(RuntimeError, match="belongs in a transaction"):
            filled.save_unit(unit, advance(unit, UnitAssigned())[0])
        with pytest.raises(RuntimeError, match="belongs in a transaction"):
            filled.append_log("claim", b"{}")
        assert filled.unit(unit.unit) == unit

    def test_closing_twice_is_harmless(self, tmp_path: Path) -> None:
        store = self.open_store(tmp_path)
        store.close()
        store.close()

    def test_what_is_not_there_is_none_or_empty(self, store: Store) -> None:
        lease_id, unit_id = LeaseId("0" * 32), UnitId("0" * 64)
        singles = (
            store.owner(NOBODY), store.device(NOBODY), store.unit(unit_id), store.next_open_unit(1), store.round(1),
            store.attempt(lease_id), store.attempt_of_claim(Digest("0" * 64)), store.leased_attempt(NOBODY),
            store.latest_round(), store.meta("nothing"), store.audit(1),
        )  # fmt: skip
        many = (
            store.units(1), store.uploading_attempts(NOBODY), store.due_attempts(10**15), store.mergeable(),
            store.attempts_of_unit(unit_id), store.unjudged(10), store.evidence(lease_id), store.log_entries(1, 9),
            store.owners(), store.unsettled_units(9), store.units_to_unmerge(), store.unsent_in_doubt(9),
            store.unmerged_of_owner(NOBODY), store.merged_unaudited_of_owner(NOBODY), store.merged_on_word_of(NOBODY),
            store.audits_of_subject(lease_id),
            store.audits_of_replica(lease_id), store.unmerged_blobs(), store.opinions(1),
            *(store.audits(state) for state in OPEN_AUDITS),
        )  # fmt: skip
        counts = {
            store.device_count(), store.received_count(1), store.ready_count(1), store.wasted_count(NOBODY, 1),
            store.unsent_count(NOBODY),
            store.established_others(NOBODY), store.failed_count(NOBODY), store.in_doubt_count(1),
            store.awaited_count(1, 0),
        }  # fmt: skip
        assert set(singles) == {None}
        assert set(many) == {()}
        assert counts == {0}
        assert store.units_by_member() == {}
        assert store.unit_counts(1) == dict.fromkeys(UnitState, 0)
        assert store.outcome_counts() == dict.fromkeys(Outcome, 0)
        assert store.audit_counts() == dict.fromkeys(AuditState, 0)

    # --- owners and devices ----------------------------------------------------------------------------------

    def test_owners_and_devices_come_back_as_they_were_put_last(self, filled: Store) -> None:
        owner, device = examples.owner("ada"), examples.device("ada-1", "ada")
        assert filled.owner(owner.owner) == owner
        assert filled.device(device.device) == device
        assert filled.device_count() == 3

        passed = advance_owner(owner, AuditPassed(trained_ms=70))[0]
        newer = replace(device, trainer_version="0.2.0")
        with filled.transaction():
            filled.put_owner(passed)
            filled.put_device(newer)
        assert filled.owner(owner.owner) == passed
        assert filled.device(device.device) == newer
        assert filled.device_count() == 3
        assert set(filled.owners()) == {passed, examples.owner("bob")}

    def test_established_others_are_those_of_other_owners(self, filled: Store) -> None:
        ada, bob = examples.owner("ada"), examples.owner("bob")
        assert filled.established_others(ada.owner) == 0
        with filled.transaction():
            filled.put_owner(replace(ada, state=OwnerState.ESTABLISHED))
        assert filled.established_others(ada.owner) == 0
        assert filled.established_others(bob.owner) == filled.established_others(NOBODY) == 1
        with filled.transaction():
            filled.put_owner(advance_owner(replace(ada, state=OwnerState.ESTABLISHED), Banned())[0])
        assert filled.established_others(bob.owner) == 0

    # --- units -----------------------------------------------------------------------------------------------

    def test_the_open_unit_with_the_lowest_index_comes_first(self, store: Store) -> None:
        with store.transaction():
            store.add_round(examples.first_round())
            store.add_units([examples.unit(index) for index in (2, 0, 1)])
        for index in range(3):
            unit = store.next_open_unit(1)
            assert unit == examples.unit(index)
            save(store, unit, advance(unit, UnitAssigned())[0])
        assert store.next_open_unit(1) is None
        assert [unit.index for unit in store.units(1)] == [0, 1, 2]
        assert store.next_open_unit(2) is None

    def test_units_that_newcomers_hold_are_counted_until_they_are_confirmed_or_given_up(self, filled: Store) -> None:
        assert filled.held_by_newcomers(1) == 0
        first, second = lease(filled, "a", 0), lease(filled, "b", 1, "bob-1")
        assert (filled.held_by_newcomers(1), filled.held_by_newcomers(2)) == (2, 0)
        received = save(filled, first, examples.received(first, AuditReason.PROBATION))
        assert filled.held_by_newcomers(1) == 2
        save(filled, received, replace(received, scrutiny=Scrutiny.CONFIRMED))
        assert filled.held_by_newcomers(1) == 1
        save(filled, second, advance(second, Expired())[0])
        assert filled.held_by_newcomers(1) == 0

    def test_short_units_come_first_for_who_wants_one_and_last_for_others(self, filled: Store) -> None:
        by_id = sorted((examples.unit(index) for index in range(3)), key=lambda unit: unit.unit)
        bound = by_id[1].unit  # so that one unit is short
        shortest, longer = by_id[0], min(by_id[1:], key=lambda unit: unit.index)
        assert filled.next_open_unit(1, short_below=bound, short=True) == shortest
        assert filled.next_open_unit(1, short_below=bound, short=False) == longer
        assert filled.next_open_unit(1, short_below="g", short=False) == examples.unit(0), "there are only short ones"
        assert filled.next_open_unit(1, short_below="", short=True) == examples.unit(0), "there are only long ones"

    def test_a_devices_newest_claim_is_found(self, filled: Store) -> None:
        device = examples.device("ada-1").device
        assert filled.latest_claimed(device) is None
        first = lease(filled, "a", 0)
        assert filled.latest_claimed(device) is None
        save(filled, first, examples.claimed(first))
        second = lease(filled, "b", 1)
        found = filled.latest_claimed(device)
        assert found is not None
        assert found.lease == first.lease
        save(filled, second, examples.claimed(second))
        found = filled.latest_claimed(device)
        assert found is not None
        assert found.lease == second.lease

    def test_a_released_unit_can_be_leased_again(self, filled: Store) -> None:
        attempt = lease(filled, "a", 0)
        assert filled.next_open_unit(1) == examples.unit(1)
        save(filled, attempt, advance(attempt, Expired())[0])
        unit = filled.unit(attempt.unit)
        assert unit is not None
        save(filled, unit, advance(unit, UnitReleased())[0])
        assert filled.next_open_unit(1) == examples.unit(0)
        again = lease(filled, "b", 0, "bob-1")
        assert [found.lease for found in filled.attempts_of_unit(unit.unit)] == [attempt.lease, again.lease]

    def test_a_unit_that_has_changed_since_it_was_read_is_stale(self, filled: Store) -> None:
        read = examples.unit()
        assigned = save(filled, read, advance(read, UnitAssigned())[0])
        with pytest.raises(StaleRow):
            save(filled, read, advance(read, UnitAssigned())[0])
        unit, _ = choose(filled, "a", 1)
        merged = save(filled, unit, replace(unit, merged_in=1))
        with pytest.raises(StaleRow):
            save(filled, unit, replace(unit, merged_in=2))
        retracted = save(filled, merged, replace(merged, retracted=True))
        with pytest.raises(StaleRow):
            save(filled, merged, replace(merged, retracted=True))
        unmerged = save(filled, retracted, replace(retracted, unmerged_in=2))
        with pytest.raises(StaleRow):
            save(filled, retracted, replace(retracted, retracted=False))
        assert filled.unit(read.unit) == assigned
        assert filled.unit(unit.unit) == unmerged

    def test_a_thing_is_not_saved_as_another_thing(self, filled: Store) -> None:
        attempt = lease(filled, "a", 0)
        with pytest.raises(ValueError, match="two things"):
            save(filled, examples.unit(0), examples.unit(1))
        with pytest.raises(ValueError, match="two things"):
            save(filled, attempt, replace(attempt, device=examples.device("bob-1", "bob").device))
        with pytest.raises(ValueError, match="two things"):
            save(filled, examples.first_round(), replace(examples.first_round(), opened_ms=0))
        audit = add_audit(filled, examples.audit(examples.claimed(attempt)))
        with pytest.raises(ValueError, match="two things"):
            save(filled, audit, replace(audit, reason=AuditReason.OUTLIER))

    def test_units_are_counted_by_state_outcome_and_member(self, filled: Store) -> None:
        choose(filled, "a", 0)
        choose(filled, "b", 1, "bob-1")
        choose(filled, "c", 2, "ada-2")
        last = examples.unit(3)
        save(filled, last, advance(last, UnitAbandoned())[0])

        assert filled.unit_counts(1) == {UnitState.OPEN: 0, UnitState.ASSIGNED: 0, UnitState.SETTLED: 4}
        assert filled.outcome_counts(1) == {Outcome.ACCEPTED: 3, Outcome.REJECTED: 0, Outcome.ABANDONED: 1}
        assert filled.outcome_counts() == filled.outcome_counts(1)
        ada, bob = examples.owner("ada").member, examples.owner("bob").member
        assert filled.units_by_member() == filled.units_by_member(1) == {ada: 2, bob: 1}
        assert filled.units_by_member(2) == {}

    # --- attempts --------------------------------------------------------------------------------------------

    def test_an_attempt_keeps_everything_through_its_whole_life(self, filled: Store) -> None:
        start = lease(filled, "a", 0)
        assert filled.attempt(start.lease) == filled.leased_attempt(start.device) == start
        claimed = save(filled, start, examples.claimed(start))
        assert filled.leased_attempt(start.device) is None
        sketched = save(filled, claimed, examples.sketched(start))
        assert filled.uploading_attempts(start.device) == (sketched,)
        received = save(filled, sketched, examples.received(start))
        assert filled.uploading_attempts(start.device) == ()
        judged = save(filled, received, advance(received, Judged(verdict_envelope=b"verdict"))[0])
        assert claimed.claim_sha256 is not None
        assert filled.attempt(start.lease) == filled.attempt_of_claim(claimed.claim_sha256) == judged

    def test_an_attempt_that_has_changed_since_it_was_read_is_stale(self, filled: Store) -> None:
        start = lease(filled, "a", 0)
        expired = save(filled, start, advance(start, Expired())[0])
        with pytest.raises(StaleRow):
            save(filled, start, examples.claimed(start))
        longer = save(filled, expired, replace(expired, deadline_ms=expired.deadline_ms + 1))
        with pytest.raises(StaleRow):
            save(filled, expired, examples.claimed(expired))
        assert filled.attempt(start.lease) == longer

    def test_deadlines_are_due_when_they_have_come_and_only_while_something_is_awaited(self, filled: Store) -> None:
        later = lease(filled, "a", 0, "ada-1", deadline_ms=200)
        sooner = lease(filled, "b", 1, "ada-2", deadline_ms=100)
        gone = lease(filled, "c", 2, "bob-1", deadline_ms=50)
        save(filled, gone, advance(gone, Expired())[0])

        assert filled.due_attempts(99) == ()
        assert filled.due_attempts(100) == (sooner,)
        assert filled.due_attempts(1_000) == (sooner, later)
        claimed = save(filled, sooner, advance(sooner, examples.claim_event("b", deadline_ms=900))[0])
        assert filled.due_attempts(899) == (later,)
        assert filled.due_attempts(900) == (later, claimed)

    def test_received_work_of_earlier_rounds_waits_for_its_verdict(self, filled: Store) -> None:
        _, chosen = choose(filled, "a", 0)
        start = lease(filled, "b", 1, "bob-1")
        excused = save(filled, start, advance(examples.sketched(start), Excused())[0])
        other = lease(filled, "c", 2, "ada-2")

        assert filled.unjudged(1) == ()
        assert filled.unjudged(2) == (chosen, excused)
        assert filled.received_count(1) == 1
        save(filled, other, examples.received(other))
        assert filled.received_count(1) == 2
        assert filled.received_count(2) == 0

    def test_evidence_is_kept_once_in_order_and_not_without_end(self, filled: Store) -> None:
        attempt = lease(filled, "a", 0)
        sent = [b"claim %d" % number for number in range(MAX_EVIDENCE_PER_LEASE + 3)]
        for claim in [sent[0], *sent]:
            with filled.transaction():
                filled.add_evidence(attempt.lease, claim)
        assert filled.evidence(attempt.lease) == tuple(sent[:MAX_EVIDENCE_PER_LEASE])

    # --- rounds ----------------------------------------------------------------------------------------------

    def test_a_round_keeps_everything_through_its_whole_life(self, filled: Store) -> None:
        start = filled.round(1)
        assert start == filled.latest_round() == examples.first_round()
        assert start is not None
        entry = examples.merge_entry(examples.received(examples.leased()))
        out = examples.unmerge_entry(entry)
        event = Closed(now_ms=9_000, merge=(entry,), unmerge=(out,), weigh_seed=examples.digest("weigh"))
        closed = save(filled, start, advance_round(start, event)[0])
        assert (closed.merge, closed.unmerge) == ((entry,), (out,))
        merging = save(filled, closed, advance_round(closed, MergeStarted())[0])
        with pytest.raises(StaleRow):
            save(filled, closed, merging)
        manifest = examples.digest("manifest")
        published = save(filled, merging, advance_round(merging, Published(manifest_sha256=manifest))[0])
        assert filled.round(1) == published
        with filled.transaction():
            filled.add_round(Round(round=2, opened_ms=10_000))
        assert filled.latest_round() == Round(round=2, opened_ms=10_000)

    # --- log and meta ----------------------------------------------------------------------------------------

    def test_the_log_is_a_chain_that_anybody_can_follow(self, store: Store) -> None:
        with store.transaction():
            entries = [store.append_log("claim", b'{"n":%d}' % number) for number in range(3)]
        head = EMPTY_LOG_HEAD
        for number, entry in enumerate(entries):
            head = next_head(head, "claim", b'{"n":%d}' % number)
            assert entry == LogEntry(position=number + 1, kind="claim", body=b'{"n":%d}' % number, head=head)
        assert store.log_head() == (3, head)
        assert store.log_entries(2, 3) == tuple(entries[1:])
        assert store.log_entries(4, 9) == ()

    def test_a_fact_about_the_run_is_what_was_put_last(self, store: Store) -> None:
        for value in ("1", "2"):
            with store.transaction():
                store.put_meta("clock_ms", value)
        assert store.meta("clock_ms") == "2"

    # --- backup ----------------------------------------------------------------------------------------------

    def test_a_backup_holds_what_was_committed_and_opens_as_a_store(self, filled: Store, tmp_path: Path) -> None:
        unit, attempt = deliver(filled, "a", 0)
        audit = add_audit(filled, examples.audit(attempt))
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        target = elsewhere / "state.sqlite"
        filled.backup_to(target)
        lease(filled, "later", 1)

        copy = self.open_store(elsewhere)
        assert copy.mergeable() == ((unit, attempt),)
        assert copy.audit(audit.audit) == audit
        assert copy.next_open_unit(1) == examples.unit(1)
        copy.close()
        with pytest.raises(DirectoryNotEmpty):
            filled.backup_to(target)
