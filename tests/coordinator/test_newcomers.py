"""Newcomers, whose keys cost nothing, can not take a whole round away from those who have passed their audits."""

import pytest

from coordinator.leasing import Leased, NoWork
from protocol.limits import KEPT_PER_ESTABLISHED, KEPT_SHARE
from tests.coordinator.desk_harness import Opening

UNITS = 32


@pytest.mark.parametrize("established", [1, 2, 20])
def test_newcomers_leave_a_few_units_to_each_established_owner(opening: Opening, established: int) -> None:
    office = opening(units=UNITS)
    trusted = [office.volunteer(f"trusted {number}", record=50) for number in range(established)]
    kept = min(UNITS // KEPT_SHARE, KEPT_PER_ESTABLISHED * established)
    for number in range(UNITS - kept):
        office.deliver(office.volunteer(f"new {number}"), "zeros")
    answer = office.ask(office.volunteer("one more"))
    assert isinstance(answer, NoWork)
    assert "newcomers have their share of round 1" in answer.reason
    assert isinstance(office.ask(trusted[0]), Leased)


def test_one_newcomer_that_delivers_rubbish_without_end_does_not_hold_them_either(opening: Opening) -> None:
    office = opening(units=UNITS)
    trusted, eve = office.volunteer("trusted", record=50), office.volunteer("eve")
    for _ in range(UNITS - KEPT_PER_ESTABLISHED):
        office.deliver(eve, "zeros", ms=10)
    assert isinstance(office.ask(eve), NoWork)
    assert isinstance(office.ask(trusted), Leased)


def test_where_nobody_is_established_newcomers_may_have_every_unit(opening: Opening) -> None:
    office = opening(units=4)
    given = [office.ask(office.volunteer(f"new {number}")) for number in range(4)]
    assert all(isinstance(answer, Leased) for answer in given)


def test_what_an_audit_has_confirmed_makes_room_for_more(opening: Opening) -> None:
    office = opening(units=8, probation=9)
    office.volunteer("trusted", record=50)
    for number in range(4):
        office.deliver(office.volunteer(f"new {number}"))
    more = office.volunteer("more")
    assert isinstance(office.ask(more), NoWork)
    office.offer_replicas_widely()
    office.wait(1)
    while office.judge(office.auditor()):
        pass
    assert isinstance(office.ask(more), Leased)
