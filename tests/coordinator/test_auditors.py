"""What an auditor is given, what it may read, and which opinions are taken from it."""

from dataclasses import replace

import pytest

from coordinator import referees
from coordinator.audits import AuditState, Scrutiny
from protocol.documents import Opinion, digest_of, parse_payload, sign
from protocol.envelope import parse_envelope
from protocol.errors import AuditUnknown, PayloadInvalid, SignatureInvalid
from protocol.limits import AUDIT_PATIENCE_MS
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import Volunteer, Work


def test_an_auditor_gets_the_oldest_audit_and_the_one_that_it_has_again(opening: Opening) -> None:
    office = opening()
    ada, bob = office.volunteer("ada"), office.volunteer("bob")
    works = [office.deliver(ada), office.deliver(bob)]
    first, second = office.auditor("first"), office.auditor("second")
    orders = [office.take(first), office.take(second), office.take(first)]
    assert [order.index for order in orders if order] == [work.lease.index for work in (*works, works[0])]
    assert orders[0] is not None
    assert orders[0].claims == (works[0].envelope,)
    assert orders[0].device_keys == (ada.key.public.raw,)
    assert orders[0].remaining_ms == AUDIT_PATIENCE_MS


def test_an_auditor_that_does_not_answer_loses_its_audit_to_another(opening: Opening) -> None:
    office = opening()
    work = office.deliver(office.volunteer("ada"))
    slow, quick = office.auditor("slow"), office.auditor("quick")
    order = office.take(slow)
    assert order is not None
    assert office.take(quick) is None
    office.wait(AUDIT_PATIENCE_MS)
    assert office.judge(quick) == ("confirmed",)
    with pytest.raises(AuditUnknown):
        office.submit(slow, office.opinion(slow, work.envelope, "refuted"))
    assert office.attempt(work).scrutiny is Scrutiny.CONFIRMED


def test_an_auditor_reads_what_it_judges_and_nothing_else(opening: Opening) -> None:
    office = opening()
    works = [office.deliver(office.volunteer(name)) for name in ("ada", "bob")]
    referee = office.auditor()

    def read(work: Work, role: str = "delta") -> object:
        return referees.artifact_to_judge(office.desk, referee.session, work.digest, role)

    with pytest.raises(AuditUnknown):
        read(works[0])
    office.take(referee)
    assert read(works[0]) == works[0].claim.artifacts[0]
    for work, role in ((works[1], "delta"), (works[0], "moments")):
        with pytest.raises(AuditUnknown):
            read(work, role)


def test_opinions_that_do_not_hold_are_refused_and_change_nothing(opening: Opening) -> None:
    office = opening()
    work, other = (office.deliver(office.volunteer(name)) for name in ("ada", "bob"))
    referee, stranger = office.auditor(), office.auditor("stranger")
    good = office.opinion(referee, work.envelope, "confirmed")
    with pytest.raises(AuditUnknown):
        office.submit(referee, good)  # not taken
    office.take(referee)
    with pytest.raises(PayloadInvalid, match="1 to 2 opinions"):
        office.submit(referee)
    with pytest.raises(PayloadInvalid, match="1 to 2 opinions"):
        office.submit(referee, good, good, good)
    with pytest.raises(AuditUnknown, match="each once"):
        office.submit(referee, good, good)
    with pytest.raises(AuditUnknown):
        office.submit(referee, office.opinion(referee, other.envelope, "confirmed"))
    with pytest.raises(SignatureInvalid):
        office.submit(referee, office.opinion(stranger, work.envelope, "confirmed"))
    assert office.audit(work).state is AuditState.WANTS_REFEREE
    assert office.store.opinions(office.audit(work).audit) == ()
    office.submit(referee, good)
    assert office.store.opinions(office.audit(work).audit) == (good,)


def _changed(office: Office, referee: Volunteer, work: Work, **changes: object) -> bytes:
    good = parse_payload(Opinion, parse_envelope(office.opinion(referee, work.envelope, "confirmed")).payload)
    return sign(replace(good, **changes), referee.key)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"finding": "refuted"},  # its numbers are within the tolerances
        {"raw_difference": 0.5},  # its numbers are not
        {"code_difference": 0.5},
        {"run": "ab" * 32},
        {"auditor": "ab" * 32},
        {"unit": "ab" * 32},
    ],
)
def test_an_opinion_must_follow_from_its_numbers_and_be_about_this_claim(
    opening: Opening, changes: dict[str, object]
) -> None:
    office = opening()
    work = office.deliver(office.volunteer("ada"))
    referee = office.auditor()
    office.take(referee)
    with pytest.raises((PayloadInvalid, AuditUnknown)):
        office.submit(referee, _changed(office, referee, work, **changes))
    assert office.audit(work).state is AuditState.WANTS_REFEREE


def test_the_log_tells_each_opinion_with_its_numbers(opening: Opening) -> None:
    office = opening()
    work = office.deliver(office.volunteer("ada"), "lie")
    referee = office.auditor()
    office.judge(referee)
    (told,) = office.log("opinion")
    assert told["claim"] == digest_of(work.claim)
    assert told["auditor"] == referee.session.device
    assert (told["finding"], told["raw_difference"], told["code_difference"]) == ("refuted", 0.75, 1.5)
