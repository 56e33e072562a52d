"""What is gained by letting an audit go by, by doubt that nobody settles, and by being first to ask: nothing."""

from dataclasses import replace

from coordinator.audits import AuditState
from coordinator.leasing import Leased
from coordinator.owners import OwnerState
from protocol.documents import Lease, digest_of, verify
from protocol.limits import AUDIT_PATIENCE_MS
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import DRAWN, ESTABLISHED, LEASE_MS, ONE, Volunteer, Work
from tests.protocol.examples import COORDINATOR
from verify.policy import replica_turn


def forfeited(office: Office, by: Volunteer, helper: Volunteer) -> Work:
    """A claim that is to be audited (it came too fast), and whose bytes never come; the rounds go on without it."""
    work = office.lease(by, "poison")
    office.claim(work)
    office.sketch(work)
    office.wait(office.desk.config.rounds.upload_ms)
    while office.code(work) is None:
        office.deliver(helper)
        assert office.publish()
    assert office.code(work) == "FORFEIT"
    return work


def judge_all(office: Office) -> list[tuple[str, ...]]:
    """Have every audit that waits for an auditor judged."""
    office.wait(LEASE_MS)
    findings = []
    while (found := office.judge(office.auditor())) is not None:
        findings.append(found)
    return findings


# --- forfeits ------------------------------------------------------------------------------------------------


def test_who_lets_an_audit_go_by_is_looked_back_at_and_banned_for_what_is_found(opening: Opening) -> None:
    office = opening(floor=0, planned=9)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    poison = office.deliver(eve, "poison")
    office.deliver(ada)
    assert office.publish()
    assert office.code(poison) == "MERGED"
    forfeited(office, eve, ada)
    assert office.owner(eve) == (OwnerState.PROBATION, 0)
    assert office.reasons()["recheck"] == 1
    assert ("refuted",) in judge_all(office)
    assert office.code(poison) == "RETRACTED"
    assert office.owner(eve)[0] is OwnerState.BANNED
    office.deliver(ada)
    assert office.publish()
    assert digest_of(poison.claim) in office.unmerged(office.round - 1)


def test_an_honest_owner_whose_bytes_got_lost_loses_its_record_and_nothing_else(opening: Opening) -> None:
    office = opening(floor=0, planned=9)
    ada, bob = office.volunteer("ada", record=ESTABLISHED), office.volunteer("bob", record=ESTABLISHED)
    works = [office.deliver(bob) for _ in range(2)]
    assert office.publish()
    forfeited(office, bob, ada)
    assert set(judge_all(office)) == {("confirmed",)}
    assert [office.code(work) for work in works] == ["MERGED", "MERGED"]
    assert office.owner(bob) == (OwnerState.PROBATION, 0)


def test_only_the_newest_units_are_looked_back_at_and_each_once(opening: Opening) -> None:
    office = opening(floor=0, planned=12, units=8, probation=3)
    bob, ada = office.volunteer("bob", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    works = [office.deliver(bob) for _ in range(5)]
    office.deliver(ada)
    assert office.publish()
    forfeited(office, bob, ada)
    assert [bool(office.audits(work)) for work in works] == [False, False, True, True, True]
    judge_all(office)
    office.volunteer("bob", record=ESTABLISHED)
    forfeited(office, bob, ada)
    assert [len(office.audits(work)) for work in works] == [1, 1, 1, 1, 1]  # further back, and nothing twice


# --- a doubt that nobody settles -----------------------------------------------------------------------------


def both_refuted(office: Office) -> tuple[Work, Work]:
    """A drawn claim and its replica, other than it; one auditor refutes both."""
    work = office.deliver(office.volunteer("ada", record=50), "lie")
    other = office.train(office.volunteer("bob", record=50), "another lie")
    assert other.lease.unit == work.lease.unit
    office.compare()
    office.receive(other)
    assert office.judge(office.auditor()) == ("refuted", "refuted")
    assert office.states(work) == [AuditState.WANTS_SECOND]
    return work, other


def test_where_there_is_no_second_auditor_a_doubt_ends_without_a_ban_and_holds_nothing_up(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    office.volunteer("bob", record=50)
    work, other = both_refuted(office)
    patience_ms = max(AUDIT_PATIENCE_MS, 2 * LEASE_MS)
    office.wait(patience_ms - 1)
    assert office.code(work) is None
    office.wait(1)
    assert (office.code(work), office.code(other)) == ("UNDECIDED", "UNDECIDED")
    assert office.open_audits() == 0
    for by in (work.by, other.by):
        assert office.owner(by) == (OwnerState.PROBATION, 0)
    again = office.lease(office.volunteer("cyd"))
    assert again.lease.unit == work.lease.unit  # somebody else may train it now


def test_a_second_auditor_who_comes_in_time_settles_the_doubt(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    office.volunteer("bob", record=50)
    work, other = both_refuted(office)
    assert office.judge(office.auditor("second")) == ("refuted", "refuted")
    assert (office.code(work), office.code(other)) == ("REPLAY_DIFFERS", "REPLAY_DIFFERS")
    office.wait(AUDIT_PATIENCE_MS)
    assert office.owner(work.by)[0] is office.owner(other.by)[0] is OwnerState.BANNED


# --- appeals against several findings ------------------------------------------------------------------------


def test_one_appeal_answers_for_every_finding_on_the_same_claim(opening: Opening) -> None:
    office = opening()
    ada = office.volunteer("ada")
    work = office.deliver(ada)
    office.judge(office.auditor(), believes="nonsense")
    (failed,) = office.audits(work)
    office._decide(lambda desk: desk.store.add_audit(replace(failed, audit=0)))  # the same, found in another audit
    assert office.states(work) == [AuditState.FAILED, AuditState.FAILED]
    office.appeal(work)
    assert office.judge(office.auditor("second")) == ("confirmed",)
    assert office.states(work) == [AuditState.PASSED, AuditState.PASSED]
    assert office.code(work) == "RESTORED"
    assert office.owner(ada) == (OwnerState.PROBATION, 0)


# --- whose turn it is ----------------------------------------------------------------------------------------


def test_a_replica_goes_to_whose_turn_it_is_and_not_to_who_asks_first(opening: Opening) -> None:
    office = opening(floor=DRAWN, units=8)
    ada = office.volunteer("ada", record=50)
    office.volunteer("bob", record=50)  # so that a replica is wanted at all
    work = office.deliver(ada)
    audit = office.audit(work)
    secret = office.desk.epoch_secret(audit.epoch)

    def turn(by: Volunteer) -> int:
        return replica_turn(secret, audit.claim, by.session.owner)

    foremost = next(by for number in range(99) if turn(by := office.volunteer(f"first {number}")) < ONE // 4)
    behind = [by for number in range(99) if turn(by := office.volunteer(f"last {number}")) > ONE // 2][:2]
    others = [office.volunteer(by.name, record=50) for by in (*behind, foremost)]
    given = []
    for share in range(5):  # they ask again and again, those whose turn is last before the others
        for by in others:
            answer = office.ask(by)
            assert isinstance(answer, Leased)
            lease = verify(Lease, answer.envelope, COORDINATOR.public)
            if lease.unit == work.lease.unit:
                given.append((share, by.name))
            else:
                office.hand_back(office.result(by, lease, "honest"))
        office.clock.advance(LEASE_MS // 4 // 5)
        if given:
            break
    assert [name for _, name in given] == [others[-1].name]
