"""Claims, replicas and referees: what is audited, by whom, and what each finding leads to."""

from dataclasses import replace

import pytest

from coordinator import claims, replicas
from coordinator.audits import AuditState, Scrutiny
from coordinator.leasing import Leased
from coordinator.owners import OwnerState
from protocol.calls import Instruction
from protocol.documents import Lease, digest_of, verify
from protocol.errors import BytesRefused
from tests.coordinator.desk_harness import Opening, replicated
from tests.coordinator.desk_people import DRAWN, ESTABLISHED, LEASE_MS, ONE, TRAINING_MS, config
from tests.protocol.examples import COORDINATOR

# --- newcomers -----------------------------------------------------------------------------------------------


def test_a_newcomers_claim_waits_for_a_referee_and_is_merged_after_it(opening: Opening) -> None:
    office = opening()
    ada = office.volunteer("ada")
    work = office.deliver(ada)
    assert office.attempt(work).scrutiny is Scrutiny.PENDING
    assert not office.publish()

    assert office.judge(office.auditor()) == ("confirmed",)
    assert office.publish()
    assert office.code(work) == "MERGED"
    assert office.owner(ada) == (OwnerState.PROBATION, 1)
    assert office.reasons() == {"probation": 1}


def test_probation_ends_after_so_many_audits_in_a_row_and_the_log_says_so(opening: Opening) -> None:
    office = opening(probation=3)
    ada, referee = office.volunteer("ada"), office.auditor()
    for passed in range(1, 4):
        assert office.owner(ada)[0] is OwnerState.PROBATION if passed > 1 else True
        office.deliver(ada)
        office.judge(referee)
        assert office.owner(ada)[1] == passed
    assert office.owner(ada) == (OwnerState.ESTABLISHED, 3)
    events = [(body["event"], body["state"], body["valid_in_row"]) for body in office.log("owner")]
    assert events == [
        ("audit-passed", "probation", 1),
        ("audit-passed", "probation", 2),
        ("audit-passed", "probation", 3),
        ("promoted", "established", 3),
    ]


def test_agreement_among_newcomers_neither_promotes_nor_merges(opening: Opening) -> None:
    office = opening(probation=1)
    ada, bob = office.volunteer("ada"), office.volunteer("bob")
    late = office.lease(bob)
    office.wait(LEASE_MS)
    work = office.deliver(ada)
    assert work.lease.unit == late.lease.unit
    office.claim(late)
    assert office.sketch(late) is Instruction.UPLOAD  # nothing is compared: neither's word counts
    office.receive(late)
    assert office.compare() == 0

    assert office.code(late) is None
    assert office.owner(ada) == office.owner(bob) == (OwnerState.PROBATION, 0)
    assert not office.publish()
    assert office.states(work) == office.states(late) == [AuditState.WANTS_REFEREE]


def test_a_run_without_verification_audits_nothing_and_merges_everything(opening: Opening) -> None:
    plain = config()
    office = opening(replace(plain, verification=replace(plain.verification, mode="none")))
    work = office.deliver(office.volunteer("ada"))
    assert office.receipt(work).audit_share == 0
    plan = office.plan()
    assert plan is not None
    assert plan.seed is None
    assert office.publish()
    assert (office.code(work), office.reasons()) == ("MERGED", {})


# --- established owners --------------------------------------------------------------------------------------


def test_an_established_owners_undrawn_claim_is_merged_as_it_is(opening: Opening) -> None:
    office = opening(floor=0)
    work = office.deliver(office.volunteer("ada", record=ESTABLISHED))
    assert office.attempt(work).scrutiny is Scrutiny.NONE
    assert office.publish()
    assert (office.code(work), office.audits(work)) == ("MERGED", ())


def test_what_was_not_audited_counts_by_its_owners_record_and_what_was_counts_in_full(opening: Opening) -> None:
    office = opening(floor=0)
    ada, newcomer = office.volunteer("ada", record=ESTABLISHED), office.volunteer("bob")
    office.deliver(ada)
    confirmed = office.deliver(newcomer)
    office.wait(LEASE_MS // 4)  # nobody replicates it
    office.judge(office.auditor())
    record = office.store.owner(ada.session.owner)
    assert record is not None
    office._decide(lambda desk: desk.store.put_owner(replace(record, valid_in_row=10)))
    plan = office.plan()
    assert plan is not None
    ramp = office.desk.config.verification.ramp
    assert {entry.claim: entry.influence for entry in plan.entries} == {
        entry.claim: ONE if entry.claim == digest_of(confirmed.claim) else 10 * ONE // ramp for entry in plan.entries
    }
    assert {entry.claim for entry in plan.entries if entry.audited} == {digest_of(confirmed.claim)}


def test_a_drawn_claim_is_given_to_an_established_other_owner_and_to_nobody_else(opening: Opening) -> None:
    office = opening(floor=DRAWN, units=6)
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    work = office.deliver(ada)
    assert office.audit(work).state is AuditState.WANTS_REPLICA

    for not_chosen in (ada, office.volunteer("ada", device="2"), office.volunteer("newcomer")):
        assert office.lease(not_chosen).lease.unit != work.lease.unit
    assert office.lease(bob).lease.unit == work.lease.unit
    assert office.lease(office.volunteer("cyd", record=50)).lease.unit != work.lease.unit


def test_a_replicas_lease_looks_like_any_other(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    ada, bob, cyd = (office.volunteer(name, record=50) for name in ("ada", "bob", "cyd"))
    work = office.deliver(ada)
    office.offer_replicas_widely()
    first, second = office.ask(bob), office.ask(cyd)
    assert isinstance(first, Leased)
    assert isinstance(second, Leased)
    replica, plain = (verify(Lease, answer.envelope, COORDINATOR.public) for answer in (first, second))
    assert replica.unit == work.lease.unit
    of_the_unit = {"lease", "device", "unit", "index", "shards", "seed"}
    assert {name: getattr(replica, name) for name in Lease.__dataclass_fields__ if name not in of_the_unit} == {
        name: getattr(plain, name) for name in Lease.__dataclass_fields__ if name not in of_the_unit
    }
    assert (first.remaining_ms, first.base_checkpoint) == (second.remaining_ms, second.base_checkpoint)


def test_a_device_learns_only_after_its_sketch_that_its_bytes_are_not_needed(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    work = office.lease(ada)
    office.clock.advance(TRAINING_MS)
    assert office.claim(work) is Instruction.SKETCH
    assert office.sketch(work) is Instruction.UPLOAD
    office.receive(work)
    replica = office.lease(bob)
    office.clock.advance(TRAINING_MS)
    assert office.claim(replica) is Instruction.SKETCH
    assert office.sketch(replica) is Instruction.KEEP


# --- comparing -----------------------------------------------------------------------------------------------


def test_a_replica_that_agrees_lets_the_claim_pass_without_a_referee(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    work, replica = replicated(office)
    assert office.compare() == 1

    assert office.audit(work).state is AuditState.PASSED
    assert office.judge(office.auditor()) is None
    assert office.code(replica) == "REPLICA"
    assert office.owner(work.by) == (OwnerState.ESTABLISHED, 51)
    assert office.owner(replica.by) == (OwnerState.ESTABLISHED, 50)  # nobody looked at its bytes
    assert office.publish()
    assert office.code(work) == "MERGED"
    assert [body["replica"] for body in office.log("agreed")] == [digest_of(replica.claim)]


def test_the_seed_of_a_comparison_is_the_one_of_the_replicas_receipt(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    work, replica = replicated(office)
    (due,) = replicas.comparisons_due(office.desk)
    assert due.seed == office.receipt(replica).sketch_seed != office.receipt(work).sketch_seed
    assert due.blob_sha256 == work.claim.artifacts[0].blob_sha256
    assert due.sketch == replica.sketch


def test_a_sampled_agreement_is_looked_at_by_a_referee_all_the_same(opening: Opening) -> None:
    office = opening(floor=DRAWN, referee_share=ONE)
    work, replica = replicated(office)
    office.compare()
    assert office.audit(work).state is AuditState.WANTS_BYTES
    assert office.sketch(replica) is Instruction.UPLOAD  # what the device is told when it asks again
    office.receive(replica)

    assert office.judge(office.auditor()) == ("confirmed", "confirmed")
    assert office.code(replica) == "REPLICA"
    assert office.owner(work.by) == office.owner(replica.by) == (OwnerState.ESTABLISHED, 51)
    assert office.publish()
    assert office.code(work) == "MERGED"


def test_two_who_agree_on_a_lie_are_found_when_a_referee_looks(opening: Opening) -> None:
    office = opening(floor=DRAWN, referee_share=ONE)
    work, replica = replicated(office, "lie", "lie")
    office.compare()
    office.receive(replica)
    assert office.judge(office.auditor("first")) == ("refuted", "refuted")
    assert office.judge(office.auditor("second")) == ("refuted", "refuted")
    assert office.owner(work.by)[0] is office.owner(replica.by)[0] is OwnerState.BANNED


@pytest.mark.parametrize("liar", ["subject", "replica"])
def test_of_two_who_disagree_the_liar_is_banned_and_the_honest_one_merged(opening: Opening, liar: str) -> None:
    office = opening(floor=DRAWN)
    subject, replica = replicated(office, **{liar: "lie"})
    office.compare()
    assert office.owner(subject.by)[0] is office.owner(replica.by)[0] is OwnerState.ESTABLISHED
    assert office.judge(office.auditor()) is None  # the replica's bytes are awaited
    assert office.sketch(replica) is Instruction.UPLOAD
    office.receive(replica)
    office.judge(office.auditor())

    false, true = (subject, replica) if liar == "subject" else (replica, subject)
    assert office.owner(false.by)[0] is OwnerState.BANNED
    assert office.code(false) == "REPLAY_DIFFERS"
    assert office.owner(true.by) == (OwnerState.ESTABLISHED, 51)
    assert office.publish()
    assert office.code(true) == "MERGED"
    assert office.merged(1) == {digest_of(true.claim)}


@pytest.mark.parametrize("liar", ["subject", "replica"])
def test_nothing_of_a_disagreement_is_merged_before_a_referee_has_looked(opening: Opening, liar: str) -> None:
    office = opening(floor=0)
    ada = office.volunteer("ada", record=ESTABLISHED)
    replica = office.lease(office.volunteer("bob", record=ESTABLISHED), "lie" if liar == "replica" else "honest")
    office.wait(LEASE_MS)
    subject = office.deliver(ada, "lie" if liar == "subject" else "honest")
    assert subject.lease.unit == replica.lease.unit
    assert office.plan() is not None  # nobody has drawn it
    office.claim(replica)
    office.sketch(replica)
    office.compare()
    assert office.plan() is None
    office.receive(replica)
    assert office.plan() is None
    office.judge(office.auditor())
    assert office.publish()
    assert office.merged(1) == {digest_of((replica if liar == "subject" else subject).claim)}


def test_the_verdict_on_a_refuted_claim_says_how_far_it_was_off_and_what_to_do(opening: Opening) -> None:
    office = opening()
    work = office.deliver(office.volunteer("ada"), "lie")
    office.judge(office.auditor())
    verdict = office.verdict(work)
    assert verdict is not None
    assert (verdict.outcome, verdict.weight, verdict.checkpoint) == ("rejected", 0, None)
    for words in ("0.75", "0.001", "1.5", "commonweight verify replay", "appeal", work.lease.unit[:12]):
        assert words in verdict.sentence


def test_an_auditor_that_refutes_both_is_doubted_and_bans_nobody(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    work, replica = replicated(office, replica="another")
    office.compare()
    office.receive(replica)
    wrong = office.auditor("broken")
    assert office.judge(wrong, believes="nonsense") == ("refuted", "refuted")

    assert office.audit(work).state is AuditState.WANTS_SECOND
    assert office.owner(work.by)[0] is office.owner(replica.by)[0] is OwnerState.ESTABLISHED
    assert office.take(wrong) is None
    assert not office.publish()
    assert office.judge(office.auditor("sound")) == ("confirmed", "refuted")
    assert office.owner(work.by) == (OwnerState.ESTABLISHED, 51)
    assert office.owner(replica.by)[0] is OwnerState.BANNED


# --- when no replica comes -----------------------------------------------------------------------------------


def test_a_referee_goes_on_alone_when_nobody_replicates_in_time(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    work = office.deliver(office.volunteer("ada", record=50))
    assert office.audit(work).state is AuditState.WANTS_REFEREE  # nobody else is established
    office.judge(office.auditor())
    office.volunteer("bob", record=50)
    second = office.deliver(work.by)
    assert office.judge(office.auditor()) is None
    office.wait(LEASE_MS // 4)
    assert office.judge(office.auditor()) == ("confirmed",)
    assert office.attempt(second).scrutiny is Scrutiny.CONFIRMED


@pytest.mark.parametrize("how", ["handed back", "expired", "banned"])
def test_a_referee_goes_on_alone_when_the_replicas_lease_comes_to_nothing(opening: Opening, how: str) -> None:
    office = opening(floor=DRAWN)
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    lie = office.deliver(office.volunteer("bob", device="2"), "lie")
    office.wait(LEASE_MS // 4)  # nobody replicates it
    work = office.deliver(ada)
    replica = office.lease(bob)
    assert replica.lease.unit == work.lease.unit
    if how == "handed back":
        office.hand_back(replica)
    elif how == "banned":
        office.judge(office.auditor())
        assert office.code(lie) == "REPLAY_DIFFERS"
    office.wait({"expired": LEASE_MS, "banned": 0, "handed back": LEASE_MS // 4}[how])
    assert office.audit(work).state is AuditState.WANTS_REFEREE
    assert office.audit(work).replica is None
    while office.judge(office.auditor()):
        pass
    assert office.attempt(work).scrutiny is Scrutiny.CONFIRMED


def test_a_replica_whose_wanted_bytes_never_come_forfeits(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    work, replica = replicated(office, replica="lie")
    office.compare()
    office.wait(LEASE_MS)

    assert office.code(replica) == "FORFEIT"
    assert office.owner(replica.by) == (OwnerState.PROBATION, 0)
    assert office.judge(office.auditor()) == ("confirmed",)
    assert office.owner(work.by) == (OwnerState.ESTABLISHED, 51)
    with pytest.raises(BytesRefused, match="rejected already"):
        office.receive(replica)


def test_a_replicas_bytes_must_be_those_that_it_answered_with(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    _, replica = replicated(office, replica="lie")
    office.compare()
    expected = claims.expected_artifact(office.desk, replica.by.session, replica.digest, "delta")
    assert not isinstance(expected, bytes)
    assert expected.sketch == (office.receipt(replica).sketch_seed, replica.sketch)


def test_a_first_claimants_bytes_are_not_held_against_its_sketch(opening: Opening) -> None:
    office = opening()
    work = office.train(office.volunteer("ada"))
    expected = claims.expected_artifact(office.desk, work.by.session, work.digest, "delta")
    assert not isinstance(expected, bytes)
    assert expected.sketch is None
