"""What every implementation of `coordinator.store.Store` must do for audits, for bans and for what is taken out again;
an implementation's test class inherits this one.
"""

import sqlite3
from dataclasses import replace

import pytest

from coordinator.audits import (
    Appealed,
    AuditReason,
    AuditState,
    Confirmed,
    Refuted,
    ReplicaSketched,
    Scrutiny,
    SubjectGone,
)
from coordinator.audits import advance as advance_audit
from coordinator.rounds import Round
from coordinator.store import Store
from coordinator.units import (
    NEVER_MS,
    Excused,
    Expired,
    HandedBack,
    Rejudged,
    UnitAccepted,
    advance,
)
from protocol.documents import Digest
from protocol.errors import StaleRow
from tests.coordinator import examples
from tests.coordinator.stored import (
    AUDITOR,
    OTHER_AUDITOR,
    OpensStore,
    add_audit,
    choose,
    deliver,
    judge,
    lease,
    publish,
    save,
)


class AuditConformance(OpensStore):
    """The suite. Each test names one MUST of the `Store` docstrings."""

    # --- units -----------------------------------------------------------------------------------------------

    def test_a_unit_that_was_retracted_is_nobodys_credit_any_more(self, filled: Store) -> None:
        unit, _ = choose(filled, "a", 0)
        choose(filled, "b", 1)
        merged = save(filled, unit, replace(unit, merged_in=1))
        save(filled, merged, replace(merged, retracted=True))
        assert filled.units_by_member() == {examples.owner("ada").member: 1}

    def test_units_that_are_not_settled_are_found_up_to_a_round(self, filled: Store) -> None:
        choose(filled, "a", 0)
        lease(filled, "b", 1, "bob-1")
        publish(filled)
        with filled.transaction():
            filled.add_round(Round(round=2, opened_ms=9_000))
            filled.add_units([examples.unit(0, 2)])
        waiting = [(unit.round, unit.index) for unit in filled.unsettled_units(1)]
        assert waiting == [(1, 1), (1, 2), (1, 3)]
        assert [(unit.round, unit.index) for unit in filled.unsettled_units(2)] == [*waiting, (2, 0)]
        assert filled.unsettled_units(0) == ()

    def test_what_is_retracted_is_taken_out_once_it_was_merged_and_only_once(self, filled: Store) -> None:
        chosen, _ = choose(filled, "a", 0)
        retracted = save(filled, chosen, replace(chosen, retracted=True))
        assert filled.units_to_unmerge() == ()  # its merge is fixed and not published yet
        merged = save(filled, retracted, replace(retracted, merged_in=1))
        assert filled.units_to_unmerge() == (merged,)
        save(filled, merged, replace(merged, unmerged_in=2))
        assert filled.units_to_unmerge() == ()

    # --- attempts --------------------------------------------------------------------------------------------

    def test_what_can_be_merged_is_received_not_held_back_and_of_a_unit_that_is_not_settled(
        self, filled: Store
    ) -> None:
        second = deliver(filled, "b", 1, "bob-1")
        first = deliver(filled, "a", 0)
        held_back = deliver(filled, "c", 2, "ada-2", reason=AuditReason.DRAWN)
        choose(filled, "d", 3)
        assert filled.mergeable() == (first, second)
        assert filled.ready_count(1) == 2

        confirmed = save(filled, held_back[1], replace(held_back[1], scrutiny=Scrutiny.CONFIRMED))
        assert filled.mergeable() == (first, second, (held_back[0], confirmed))
        assert (filled.ready_count(1), filled.ready_count(2)) == (3, 0)
        doubted = save(filled, first[1], replace(first[1], scrutiny=Scrutiny.PENDING, reason=AuditReason.OUTLIER))
        judge(filled, second[1])
        assert filled.mergeable() == ((held_back[0], confirmed),)
        assert filled.attempt(doubted.lease) == doubted

    def test_the_first_result_of_a_unit_that_nothing_holds_back_stands_for_it(self, filled: Store) -> None:
        unit, held_back = deliver(filled, "a", 0, reason=AuditReason.PROBATION)
        _, second = deliver(filled, "b", 0, "bob-1")
        deliver(filled, "c", 0, "ada-2")
        assert filled.mergeable() == ((unit, second),)
        assert filled.ready_count(1) == filled.received_count(1) == 1
        confirmed = save(filled, held_back, replace(held_back, scrutiny=Scrutiny.CONFIRMED))
        assert filled.mergeable() == ((unit, confirmed),)

    def test_leases_that_came_to_nothing_are_counted_for_their_owner_and_round(self, filled: Store) -> None:
        back = lease(filled, "a", 0, "ada-1")
        save(filled, back, advance(back, HandedBack())[0])
        expired = lease(filled, "b", 1, "ada-2")
        save(filled, expired, advance(expired, Expired())[0])
        lease(filled, "c", 2, "ada-2")
        _, delivered = deliver(filled, "d", 3, "ada-1")
        ada = examples.owner("ada").owner
        assert filled.wasted_count(ada, 1) == 2
        refused = save(filled, delivered, replace(delivered, refused=True))
        assert filled.wasted_count(ada, 1) == 3
        save(filled, refused, replace(refused, refused=False))
        assert filled.wasted_count(ada, 2) == filled.wasted_count(examples.owner("bob").owner, 1) == 0
        late = save(filled, filled.attempt(expired.lease), examples.claimed(expired))
        assert late.state.value == "claimed"
        assert filled.wasted_count(ada, 1) == 1

    def test_claims_to_be_audited_whose_bytes_did_not_come_are_found_up_to_a_round(self, filled: Store) -> None:
        starts = [lease(filled, name, index, by) for index, (name, by) in enumerate(
            [("a", "ada-1"), ("b", "ada-2"), ("c", "bob-1")])]  # fmt: skip
        claimed = save(filled, starts[0], examples.claimed(starts[0], AuditReason.DRAWN))
        sketched = save(filled, starts[1], examples.sketched(starts[1], AuditReason.PROBATION))
        save(filled, starts[2], examples.sketched(starts[2]))  # not drawn
        deliver(filled, "d", 3, "bob-1", reason=AuditReason.DRAWN)
        assert filled.unsent_in_doubt(1) == filled.unsent_in_doubt(7) == (claimed, sketched)
        assert filled.unsent_in_doubt(0) == ()

    def test_what_an_owner_has_under_way_is_found_and_what_has_ended_is_not(self, filled: Store) -> None:
        _, received = deliver(filled, "a", 0, "ada-1")
        _, judged = deliver(filled, "b", 1, "ada-2")
        judge(filled, judged)
        sketched = lease(filled, "c", 2, "ada-2")
        excused = save(filled, sketched, advance(examples.sketched(sketched), Excused())[0])
        leased = lease(filled, "d", 3, "ada-1")
        expired = lease(filled, "e", 1, "ada-2")
        save(filled, expired, advance(expired, Expired())[0])
        deliver(filled, "f", 1, "bob-1")
        assert filled.unmerged_of_owner(examples.owner("ada").owner) == (received, excused, leased)

    def test_what_was_merged_from_an_owner_unaudited_is_found_until_it_is_retracted(self, filled: Store) -> None:
        ada = examples.owner("ada").owner
        unit, merged = choose(filled, "a", 0)
        audited_unit, drawn = deliver(filled, "b", 1, reason=AuditReason.DRAWN)
        audited = save(filled, drawn, replace(drawn, scrutiny=Scrutiny.CONFIRMED))
        save(filled, audited_unit, advance(audited_unit, UnitAccepted(lease=audited.lease))[0])
        seen = add_audit(filled, replace(examples.audit(audited), state=AuditState.PASSED))
        with filled.transaction():
            filled.add_opinion(seen.audit, seen.claim, AUDITOR, "confirmed", b"opinion")
        deliver(filled, "c", 2)  # not chosen
        choose(filled, "d", 3, "bob-1")
        assert filled.merged_unaudited_of_owner(ada) == (merged,)
        judged = judge(filled, merged)
        assert filled.merged_unaudited_of_owner(ada) == (judged,)
        save(filled, unit, replace(unit, retracted=True))
        assert filled.merged_unaudited_of_owner(ada) == ()

    def test_what_passed_on_an_owners_word_alone_is_found_as_its_makers_and_as_the_words(self, filled: Store) -> None:
        ada, bob = examples.owner("ada").owner, examples.owner("bob").owner
        unit, drawn = deliver(filled, "a", 0, reason=AuditReason.DRAWN)
        replica = lease(filled, "replica", 0, "bob-1")
        confirmed = save(filled, drawn, replace(drawn, scrutiny=Scrutiny.CONFIRMED))
        save(filled, unit, advance(unit, UnitAccepted(lease=confirmed.lease))[0])
        assert filled.merged_on_word_of(bob) == ()
        passed = replace(examples.audit(confirmed), state=AuditState.PASSED, replica=replica.lease)
        audit = add_audit(filled, passed)
        assert filled.merged_on_word_of(bob) == filled.merged_unaudited_of_owner(ada) == (confirmed,)
        assert filled.merged_on_word_of(ada) == ()
        with filled.transaction():
            filled.add_opinion(audit.audit, audit.claim, AUDITOR, "confirmed", b"opinion")
        assert filled.merged_on_word_of(bob) == filled.merged_unaudited_of_owner(ada) == ()

    def test_a_verdict_can_change_and_nothing_else_of_a_judged_attempt(self, filled: Store) -> None:
        judged = judge(filled, deliver(filled, "a", 0)[1])
        again = save(filled, judged, advance(judged, Rejudged(verdict_envelope=b"restored"))[0])
        assert filled.attempt(judged.lease) == again

    def test_blobs_of_judged_claims_that_no_merge_chose_are_found(self, filled: Store) -> None:
        judge(filled, choose(filled, "a", 0)[1])
        _, rejected = deliver(filled, "b", 1, "bob-1")
        deliver(filled, "c", 2)
        unsent = lease(filled, "d", 3)
        judge(filled, save(filled, unsent, examples.claimed(unsent)))
        assert filled.unmerged_blobs() == ()
        judge(filled, rejected)
        assert filled.unmerged_blobs() == (rejected.artifacts[0].blob_sha256,)

    def test_a_blob_that_is_the_chosen_attempts_as_well_is_kept(self, filled: Store) -> None:
        start = lease(filled, "a", 0)
        twin = save(filled, start, replace(examples.received(start), artifacts=(examples.artifact("same"),)))
        judge(filled, twin)
        start = lease(filled, "b", 0, "bob-1")
        chosen = save(filled, start, replace(examples.received(start), artifacts=(examples.artifact("same"),)))
        assert filled.unmerged_blobs() == (twin.artifacts[0].blob_sha256,)
        unit = filled.unit(start.unit)
        assert unit is not None
        save(filled, unit, advance(unit, UnitAccepted(lease=chosen.lease))[0])
        assert filled.unmerged_blobs() == ()

    # --- audits ----------------------------------------------------------------------------------------------

    def test_audits_are_numbered_in_their_order_and_keep_everything(self, filled: Store) -> None:
        _, subject = deliver(filled, "a", 0, reason=AuditReason.DRAWN)
        replica = lease(filled, "r", 0, "bob-1")
        first = add_audit(filled, examples.audit(subject, AuditState.WANTS_REPLICA))
        second = add_audit(filled, examples.audit(subject, AuditState.WANTS_REFEREE))
        assert (first.audit, second.audit) == (1, 2)
        assert replace(first, audit=0) == examples.audit(subject, AuditState.WANTS_REPLICA)
        given = save(filled, first, replace(first, replica=replica.lease, deadline_ms=70))
        sketched = save(filled, given, advance_audit(given, ReplicaSketched())[0])
        taken = save(filled, second, replace(second, auditor=AUDITOR, deadline_ms=80))
        failed = save(filled, taken, advance_audit(taken, Refuted(auditor=AUDITOR))[0])
        appealed = save(filled, failed, advance_audit(failed, Appealed())[0])
        assert (filled.audit(1), filled.audit(2), filled.audit(3)) == (sketched, appealed, None)

    def test_open_audits_are_found_by_state_the_oldest_first(self, filled: Store) -> None:
        _, subject = deliver(filled, "a", 0, reason=AuditReason.DRAWN)
        _, other = deliver(filled, "b", 1, "bob-1", reason=AuditReason.DRAWN)
        audits = [add_audit(filled, examples.audit(of)) for of in (other, subject, other)]
        assert filled.audits(AuditState.WANTS_REFEREE) == tuple(audits)
        passed = save(filled, audits[1], advance_audit(audits[1], Confirmed())[0])
        assert filled.audits(AuditState.WANTS_REFEREE) == (audits[0], audits[2])
        assert filled.audits(AuditState.WANTS_SECOND) == ()
        assert filled.audits_of_subject(subject.lease) == (passed,)
        assert filled.audits_of_subject(other.lease) == (audits[0], audits[2])
        counts = {AuditState.WANTS_REFEREE: 2, AuditState.PASSED: 1}
        assert filled.audit_counts() == dict.fromkeys(AuditState, 0) | counts

    def test_audits_are_found_by_the_replica_that_serves_them(self, filled: Store) -> None:
        _, subject = deliver(filled, "a", 0, reason=AuditReason.DRAWN)
        replica = lease(filled, "r", 0, "bob-1")
        audit = add_audit(filled, examples.audit(subject, AuditState.WANTS_REPLICA))
        assert filled.audits_of_replica(replica.lease) == ()
        given = save(filled, audit, replace(audit, replica=replica.lease))
        assert filled.audits_of_replica(replica.lease) == (given,)
        assert filled.audits_of_replica(subject.lease) == ()

    def test_an_audit_that_has_changed_since_it_was_read_is_stale(self, filled: Store) -> None:
        _, subject = deliver(filled, "a", 0, reason=AuditReason.DRAWN)
        replica = lease(filled, "r", 0, "bob-1")
        read = add_audit(filled, examples.audit(subject, AuditState.WANTS_REFEREE, replica="r"))
        assert read.replica == replica.lease
        taken = save(filled, read, replace(read, auditor=AUDITOR))
        for stale in (read, replace(taken, state=AuditState.WANTS_SECOND), replace(taken, replica=None)):
            with pytest.raises(StaleRow):
                save(filled, stale, advance_audit(replace(taken, refuted_by=AUDITOR), SubjectGone())[0])
        assert filled.audit(read.audit) == taken

    def test_refutations_that_hold_are_counted_for_their_owner(self, filled: Store) -> None:
        ada, bob = examples.owner("ada").owner, examples.owner("bob").owner
        _, subject = deliver(filled, "a", 0, reason=AuditReason.DRAWN)
        audit = add_audit(filled, examples.audit(subject))
        assert filled.failed_count(ada) == 0
        failed = save(filled, audit, advance_audit(audit, Refuted(auditor=AUDITOR))[0])
        assert (filled.failed_count(ada), filled.failed_count(bob)) == (1, 0)
        save(filled, failed, advance_audit(failed, Appealed())[0])
        assert filled.failed_count(ada) == 0

    def test_claims_of_an_epoch_are_in_doubt_until_they_are_judged_or_confirmed(self, filled: Store) -> None:
        start = lease(filled, "a", 0)
        assert filled.in_doubt_count(1) == 0
        claimed = save(filled, start, examples.claimed(start, AuditReason.DRAWN))
        deliver(filled, "b", 1, "bob-1")  # not drawn
        assert (filled.in_doubt_count(1), filled.in_doubt_count(2)) == (1, 0)
        received = save(filled, claimed, examples.received(start, AuditReason.DRAWN))
        assert filled.in_doubt_count(1) == 1
        confirmed = save(filled, received, replace(received, scrutiny=Scrutiny.CONFIRMED))
        assert filled.in_doubt_count(1) == 0
        judge(filled, confirmed)
        assert filled.in_doubt_count(1) == 0

    def test_an_open_audit_keeps_its_epoch_in_doubt_unless_it_looks_back(self, filled: Store) -> None:
        _, subject = deliver(filled, "a", 0)
        late = replace(examples.audit(subject, epoch=3), reason=AuditReason.LATE)
        audit = add_audit(filled, late)
        add_audit(filled, replace(late, reason=AuditReason.RECHECK))
        assert filled.in_doubt_count(3) == 1
        failed = save(filled, audit, advance_audit(audit, Refuted(auditor=AUDITOR))[0])
        assert filled.in_doubt_count(3) == 0
        save(filled, failed, advance_audit(failed, Appealed())[0])
        assert filled.in_doubt_count(3) == 0

    def test_bytes_are_awaited_from_the_claim_until_they_come_or_their_time_is_over(self, filled: Store) -> None:
        start = lease(filled, "a", 0)
        assert filled.awaited_count(1, 0) == 0
        claimed = save(filled, start, examples.claimed(start))
        deadline = claimed.deadline_ms
        assert [filled.awaited_count(epoch, deadline - 1) for epoch in (1, 2)] == [1, 0]
        assert filled.awaited_count(1, deadline) == 0
        given_up = save(filled, claimed, replace(claimed, deadline_ms=NEVER_MS))
        assert filled.awaited_count(1, deadline - 1) == 0
        again = save(filled, given_up, claimed)
        save(filled, again, examples.received(start))
        assert filled.awaited_count(1, deadline - 1) == 0

    def test_opinions_stand_in_the_order_of_their_arrival_one_of_each_auditor_on_a_claim(self, filled: Store) -> None:
        _, subject = deliver(filled, "a", 0)
        audit = add_audit(filled, examples.audit(subject))
        other = Digest(examples.digest("claim/replica"))
        with filled.transaction():
            filled.add_opinion(audit.audit, audit.claim, OTHER_AUDITOR, "refuted", b"1")
            filled.add_opinion(audit.audit, other, OTHER_AUDITOR, "refuted", b"2")
            filled.add_opinion(audit.audit, audit.claim, AUDITOR, "confirmed", b"3")
        assert filled.opinions(audit.audit) == (b"1", b"2", b"3")
        assert filled.opinions(audit.audit + 1) == ()

        def change_its_mind() -> None:
            with filled.transaction():
                filled.add_opinion(audit.audit, audit.claim, AUDITOR, "refuted", b"4")

        with pytest.raises(sqlite3.IntegrityError):
            change_its_mind()
        assert filled.opinions(audit.audit) == (b"1", b"2", b"3")
