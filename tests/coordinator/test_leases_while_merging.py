"""While a round is merged its open units are still given out, if a later merge may take what comes of them."""

from coordinator.leasing import Leased, NoWork
from protocol.documents import Lease, parse_payload
from protocol.envelope import parse_envelope
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import ESTABLISHED, TRAINING_MS


def closing(opening: Opening, **rules: int) -> Office:
    """A round whose merge set is fixed, with three of its four units still open."""
    office = opening(**rules)
    office.deliver(office.volunteer("ada", record=ESTABLISHED))
    assert office.close()
    return office


def test_a_unit_that_was_leased_while_its_round_was_merged_is_merged_by_the_next_one_a_round_late(
    opening: Opening,
) -> None:
    office = closing(opening)
    bob = office.volunteer("bob", record=ESTABLISHED)
    work = office.lease(bob)
    assert work.lease.round == 1
    office.finish()
    office.wait(TRAINING_MS)
    office.claim(work)
    office.sketch(work)
    office.receive(work)
    office.deliver(office.volunteer("ada", record=ESTABLISHED))
    assert office.publish()
    merged = office.store.round(2)
    assert merged is not None
    assert {entry.round: entry.late for entry in merged.merge} == {1: 1, 2: 0}
    assert office.code(work) == "MERGED"


def test_when_the_checkpoint_is_published_the_next_rounds_units_are_given_out(opening: Opening) -> None:
    office = closing(opening)
    assert office.lease(office.volunteer("bob")).lease.round == 1
    office.finish()
    assert office.lease(office.volunteer("cleo")).lease.round == 2


def test_a_lease_names_the_pictures_taken_down_that_hold_for_its_round_and_no_later_ones(opening: Opening) -> None:
    office = closing(opening)
    office.finish(takedowns_sha256="7d" * 32)
    work = office.lease(office.volunteer("bob"))
    assert (work.lease.round, work.lease.takedowns_sha256) == (2, "7d" * 32)
    first = [attempt for unit in office.store.units(1) for attempt in office.store.attempts_of_unit(unit.unit)]
    leases = [parse_payload(Lease, parse_envelope(attempt.lease_envelope).payload) for attempt in first]
    assert {lease.takedowns_sha256 for lease in leases} == {None}


def test_nothing_is_given_out_that_no_later_merge_may_take(opening: Opening) -> None:
    office = closing(opening, staleness_bound=0)
    answer = office.ask(office.volunteer("bob"))
    assert isinstance(answer, NoWork)
    assert answer.reason == "round 1: it is being merged"


def test_nothing_is_given_out_while_the_last_round_is_merged(opening: Opening) -> None:
    office = closing(opening, planned=1)
    assert isinstance(office.ask(office.volunteer("bob")), NoWork)


def test_a_round_without_open_units_says_so_while_it_is_merged(opening: Opening) -> None:
    office = opening(units=2)
    office.deliver(office.volunteer("ada", record=ESTABLISHED))
    assert isinstance(office.ask(office.volunteer("bob")), Leased)
    assert office.close()
    answer = office.ask(office.volunteer("cleo"))
    assert isinstance(answer, NoWork)
    assert answer.reason == "round 1: all its units are given out"
