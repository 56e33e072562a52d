"""Draws that everybody can check afterwards, claims whose bytes never come, and the end of a run."""

import pytest

from coordinator.audits import AuditState, Scrutiny
from coordinator.owners import OwnerState
from coordinator.units import Outcome, UnitState
from protocol.calls import Instruction
from protocol.canonical import sha256_hex
from protocol.documents import Digest, digest_of
from protocol.errors import BytesRefused, RoundTooOld, RunFinished
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import ESTABLISHED, LEASE_MS, ONE
from verify.policy import audit_share, is_drawn


def revealed(office: Office) -> dict[int, bytes]:
    return {body["epoch"]: bytes.fromhex(body["secret"]) for body in office.log("epoch-revealed")}


# --- draws ---------------------------------------------------------------------------------------------------


def test_who_is_audited_follows_from_the_receipt_the_log_and_the_revealed_secret(opening: Opening) -> None:
    office = opening(floor=ONE // 2, units=16)
    ada, newcomer = office.volunteer("ada", record=50), office.volunteer("newcomer")
    works = [office.deliver(by) for by in (*[ada] * 8, *[newcomer] * 4)]
    for _ in works:
        office.judge(office.auditor())
        office.wait(LEASE_MS)
    assert office.publish()

    secret = revealed(office)[1]
    (opened,) = (body for body in office.log("epoch-opened") if body["epoch"] == 1)
    assert sha256_hex(secret) == opened["secret_sha256"]
    logged = {body["claim"]: body for body in office.log("claim")}
    drawn = []
    for work in works:
        receipt, claim = office.receipt(work), Digest(digest_of(work.claim))
        assert receipt.secret_sha256 == opened["secret_sha256"]
        assert logged[claim]["audit_share"] == receipt.audit_share
        assert (logged[claim]["epoch"], receipt.epoch) == (1, 1)
        drawn.append(is_drawn(secret, claim, receipt.audit_share))
        assert bool(office.audits(work)) == drawn[-1]
    assert all(drawn[8:])  # all of a newcomer's
    assert 0 < sum(drawn[:8]) < 8


def test_the_probability_is_the_one_of_the_record_before_the_claim(opening: Opening) -> None:
    office = opening(floor=0)
    rules = office.desk.config.verification
    ada, newcomer = office.volunteer("ada", record=ESTABLISHED), office.volunteer("newcomer")
    shares = [office.receipt(office.train(by)).audit_share for by in (ada, newcomer)]
    assert shares == [audit_share(rules, established=True, valid_in_row=ESTABLISHED), ONE]


def test_the_sketchs_seed_cannot_be_known_before_the_claim(opening: Opening) -> None:
    office = opening()
    ada = office.volunteer("ada")
    work = office.lease(ada)
    other = office.result(ada, work.lease, work.result)  # the same result, another salt
    office.claim(work)
    assert office.receipt(work).sketch_seed == office.desk.sketch_seed(1, Digest(digest_of(work.claim)))
    assert office.receipt(work).sketch_seed != office.desk.sketch_seed(1, Digest(digest_of(other.claim)))


# --- revealing -----------------------------------------------------------------------------------------------


def test_an_epochs_secret_is_revealed_only_when_every_claim_in_doubt_is_settled(opening: Opening) -> None:
    office = opening(floor=0)
    ada, newcomer = office.volunteer("ada", record=ESTABLISHED), office.volunteer("newcomer")
    office.deliver(ada)
    office.deliver(newcomer)
    assert office.publish()
    assert revealed(office) == {}
    office.wait(LEASE_MS // 4)
    office.reveal()
    assert revealed(office) == {}
    assert office.judge(office.auditor()) == ("confirmed",)
    office.reveal()
    assert revealed(office) == {1: office.desk.epoch_secret(1)}


def test_no_secret_is_revealed_before_its_round_is_published(opening: Opening) -> None:
    office = opening(floor=0)
    office.reveal()
    office.deliver(office.volunteer("ada", record=ESTABLISHED))
    office.reveal()
    assert revealed(office) == {}
    office.publish()
    assert list(revealed(office)) == [1]


def test_a_secret_waits_for_bytes_that_may_still_come_in_time(opening: Opening) -> None:
    office = opening(floor=0, planned=9, staleness_bound=2)
    ada, slow = office.volunteer("ada", record=ESTABLISHED), office.volunteer("slow", record=ESTABLISHED)
    on_its_way = office.train(slow)
    office.deliver(ada)
    assert office.publish()
    office.reveal()
    assert revealed(office) == {}
    office.receive(on_its_way)
    assert office.attempt(on_its_way).scrutiny is Scrutiny.NONE
    office.reveal()
    assert list(revealed(office)) == [1]
    office.deliver(ada)
    assert office.publish()
    assert office.code(on_its_way) == "MERGED"


def test_a_secret_does_not_wait_for_bytes_that_are_late(opening: Opening) -> None:
    office = opening(floor=0, planned=9, staleness_bound=2)
    ada, never = office.volunteer("ada", record=ESTABLISHED), office.volunteer("never", record=ESTABLISHED)
    office.train(never)
    office.deliver(ada)
    assert office.publish()
    office.wait(LEASE_MS)
    office.reveal()
    assert list(revealed(office)) == [1]


def test_after_the_last_round_no_secret_waits_for_bytes(opening: Opening) -> None:
    office = opening(floor=0, planned=1)
    ada, never = office.volunteer("ada", record=ESTABLISHED), office.volunteer("never", record=ESTABLISHED)
    office.train(never)
    office.deliver(ada)
    office.wait(LEASE_MS // 2)
    assert office.publish()
    assert list(revealed(office)) == [1]


def test_secrets_are_revealed_once_and_in_their_order(opening: Opening) -> None:
    office = opening(floor=0, planned=9, staleness_bound=5)
    ada = office.volunteer("ada", record=ESTABLISHED)
    doubtful = office.deliver(office.volunteer("newcomer"))
    office.wait(LEASE_MS // 4)  # nobody replicates it
    for _ in range(3):
        office.deliver(ada)
        assert office.publish()
    assert revealed(office) == {}
    office.judge(office.auditor())
    office.reveal()
    office.reveal()
    assert [body["epoch"] for body in office.log("epoch-revealed")] == [1, 2, 3]
    office.deliver(ada)
    office.publish()
    assert office.code(doubtful) == "MERGED"
    assert [body["epoch"] for body in office.log("epoch-revealed")] == [1, 2, 3, 4]


def test_an_appeal_and_an_audit_back_keep_no_secret_from_being_revealed(opening: Opening) -> None:
    office = opening(floor=0)
    eve = office.volunteer("eve", record=ESTABLISHED)
    office.deliver(eve)
    lie = office.deliver(eve, "lie", ms=0)
    office.wait(LEASE_MS // 4)
    office.publish()
    office.judge(office.auditor())
    office.appeal(lie)
    assert office.open_audits() == 2
    office.reveal()
    assert list(revealed(office)) == [1]


def test_what_is_claimed_in_an_epoch_is_drawn_by_it_whatever_round_it_is_of(opening: Opening) -> None:
    office = opening(floor=0)
    slow, ada = office.volunteer("slow", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    late = office.lease(slow)
    office.deliver(ada)
    office.publish()
    office.claim(late)
    receipt = office.receipt(late)
    assert (late.lease.round, receipt.epoch) == (1, 2)
    assert receipt.secret_sha256 == sha256_hex(office.desk.epoch_secret(2))


# --- bytes that never come -----------------------------------------------------------------------------------


def test_an_established_owner_who_never_shows_a_drawn_claim_forfeits_it_and_begins_again(opening: Opening) -> None:
    office = opening(floor=ONE, staleness_bound=1, planned=9)
    ada, newcomer = office.volunteer("ada", record=50), office.volunteer("newcomer")
    hidden, unsure = office.train(ada), office.train(newcomer)
    carried_on = []
    for _ in range(2):
        carried_on.append(office.deliver(office.volunteer("bob")))
        office.wait(LEASE_MS // 4)
        assert office.judge(office.auditor()) == ("confirmed",)
        assert office.code(hidden) is None
        assert office.publish()
    assert (office.code(hidden), office.code(unsure)) == ("FORFEIT", "FORFEIT")
    assert office.owner(ada) == (OwnerState.PROBATION, 0)
    assert office.owner(newcomer) == (OwnerState.PROBATION, 0)
    failed = [body["member"] for body in office.log("owner") if body["event"] == "audit-failed"]
    assert failed == [office.desk.member(ada.session.owner)]  # everything of a newcomer's is audited anyway
    assert list(revealed(office)) == [1, 2]
    with pytest.raises(BytesRefused):
        office.receive(hidden)


def test_what_was_not_drawn_and_never_comes_costs_its_owner_nothing(opening: Opening) -> None:
    office = opening(floor=0, staleness_bound=1)
    ada, bob = office.volunteer("ada", record=ESTABLISHED), office.volunteer("bob", record=ESTABLISHED)
    hidden = office.train(ada)
    for _ in range(3):
        office.deliver(bob)
        assert office.publish()
    assert office.owner(ada) == (OwnerState.ESTABLISHED, ESTABLISHED)
    with pytest.raises(RoundTooOld):
        office.receive(hidden)


def test_a_unit_that_nobody_delivers_is_abandoned_at_the_staleness_bound(opening: Opening) -> None:
    office = opening(floor=0, staleness_bound=1)
    ada = office.volunteer("ada", record=ESTABLISHED)
    for _ in range(2):
        office.deliver(ada)
        office.publish()
    outcomes = [unit.outcome for unit in office.store.units(1)]
    assert outcomes == [Outcome.ACCEPTED, *[Outcome.ABANDONED] * 3]
    assert [unit.state for unit in office.store.units(2)].count(UnitState.SETTLED) == 1


def test_what_came_in_time_and_waits_for_its_audit_is_merged_beyond_the_staleness_bound(opening: Opening) -> None:
    office = opening(floor=0, staleness_bound=0)
    ada = office.volunteer("ada", record=ESTABLISHED)
    waiting = office.deliver(office.volunteer("newcomer"))
    office.wait(LEASE_MS // 4)  # nobody replicates it
    for _ in range(3):
        office.deliver(ada)
        assert office.publish()
    assert office.code(waiting) is None
    assert office.unit(waiting).state is UnitState.ASSIGNED
    office.judge(office.auditor())
    office.deliver(ada)
    assert office.publish()
    verdict = office.verdict(waiting)
    assert verdict is not None
    assert (verdict.code, verdict.checkpoint) == ("MERGED", 4)


# --- the end of a run ----------------------------------------------------------------------------------------


def test_the_end_of_a_run_drops_what_is_open_and_reveals_every_secret(opening: Opening) -> None:
    office = opening(floor=0, planned=1)
    ada, newcomer = office.volunteer("ada", record=ESTABLISHED), office.volunteer("newcomer")
    office.deliver(ada)
    waiting, hidden = office.deliver(newcomer), office.train(newcomer)
    assert office.publish()

    assert office.code(waiting) == office.code(hidden) == "TOO_LATE"  # and nobody's fault
    assert office.states(waiting) == [AuditState.DROPPED]
    assert office.open_audits() == 0
    assert list(revealed(office)) == [1]
    assert office.judge(office.auditor()) is None
    assert {unit.state for unit in office.store.units(1)} == {UnitState.SETTLED}
    with pytest.raises(RunFinished):
        office.ask(ada)


@pytest.mark.parametrize("step", ["sketched", "doubted", "received"])
def test_the_end_of_a_run_comes_in_the_middle_of_a_comparison(opening: Opening, step: str) -> None:
    office = opening(floor=0, planned=1)
    bob, cyd = (office.volunteer(name, record=ESTABLISHED) for name in ("bob", "cyd"))
    ada = office.volunteer("ada")
    work = office.deliver(ada)
    office.offer_replicas_widely()
    replica = office.train(bob, "honest" if step == "sketched" else "another")
    assert replica.lease.unit == work.lease.unit
    if step != "sketched":
        office.compare()
    if step == "received":
        office.receive(replica)
    office.deliver(cyd)
    assert office.publish()

    assert office.open_audits() == 0
    assert office.compare() == 0
    assert office.judge(office.auditor()) is None
    assert office.code(work) == "TOO_LATE"
    assert office.code(replica) in ("REPLICA", "TOO_LATE")
    assert {office.owner(by)[0] for by in (bob, cyd)} == {OwnerState.ESTABLISHED}
    assert office.owner(ada) == (OwnerState.PROBATION, 0)


def test_a_late_replica_of_merged_work_is_settled_when_the_run_ends(opening: Opening) -> None:
    office = opening(floor=0, planned=1)
    slow, quick = office.volunteer("slow", record=ESTABLISHED), office.volunteer("quick", record=ESTABLISHED)
    late = office.lease(slow)
    office.wait(LEASE_MS)
    work = office.deliver(quick)
    office.claim(late)
    assert office.sketch(late) is Instruction.KEEP
    assert office.publish()
    assert office.code(work) == "MERGED"
    assert office.code(late) == "REPLICA"
    assert office.open_audits() == 0
    assert office.compare() == 0


def test_what_is_refuted_after_the_last_checkpoint_is_retracted_and_stays_in_it(opening: Opening) -> None:
    office = opening(floor=0, planned=2)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    poison = office.deliver(eve, "poison")
    office.publish()
    lie = office.deliver(eve, "lie", ms=0)
    office.wait(LEASE_MS // 4)
    office.judge(office.auditor())
    assert office.code(lie) == "REPLAY_DIFFERS"
    office.deliver(ada)
    assert office.publish()
    assert office.judge(office.auditor()) == ("refuted",)
    assert office.code(poison) == "RETRACTED"
    assert office.unit(poison).unmerged_in is None
    assert office.store.units_by_member() == {office.desk.member(ada.session.owner): 1}
