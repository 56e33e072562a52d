"""Short units go to slow machines, count by their samples, and are audited by their samples."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from coordinator.audits import AuditReason
from coordinator.leasing import Leased
from protocol.assignment import is_short
from protocol.documents import Lease, UnitId, sign, verify
from protocol.errors import ClaimMismatch
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import ONE, TRAINING_MS, Volunteer, config
from tests.protocol.examples import COORDINATOR

STEPS, SHORT = 30, 10
WINDOW_MS = 3 * TRAINING_MS


@pytest.fixture
def mixed(opening: Opening) -> Callable[..., Office]:
    """Opens a run in which half of the units are short, and each round lasts three long units' time."""

    def do(*, floor: int = 0) -> Office:
        plain = config(floor=floor, units=12, min_window_ms=WINDOW_MS)
        training = replace(plain.training, steps=STEPS, short_steps=SHORT, short_share=ONE // 2)
        return opening(replace(plain, training=training))

    return do


def is_given_a_short_one(office: Office, by: Volunteer) -> bool:
    answer = office.ask(by)
    assert isinstance(answer, Leased)
    lease = verify(Lease, answer.envelope, COORDINATOR.public)
    return is_short(office.desk.config, UnitId(lease.unit))


def test_a_run_has_units_of_both_sizes(mixed: Callable[..., Office]) -> None:
    office = mixed()
    sizes = {is_short(office.desk.config, unit.unit) for unit in office.store.units(1)}
    assert sizes == {True, False}


def test_a_machine_that_nobody_knows_gets_a_short_unit(mixed: Callable[..., Office]) -> None:
    office = mixed()
    assert is_given_a_short_one(office, office.volunteer("ada"))


@pytest.mark.parametrize(("ms", "short"), [(TRAINING_MS // 4, False), (WINDOW_MS // 4, True)])
def test_a_fast_machine_gets_a_long_unit_next_and_a_slow_one_a_short_one(
    mixed: Callable[..., Office], ms: int, short: bool
) -> None:
    office = mixed()
    ada = office.volunteer("ada", record=50)
    office.deliver(ada, ms=ms)
    assert is_given_a_short_one(office, ada) is short


def test_when_there_are_no_units_of_its_size_a_machine_gets_one_of_the_other(mixed: Callable[..., Office]) -> None:
    office = mixed()
    short = sum(is_short(office.desk.config, unit.unit) for unit in office.store.units(1))
    given = [is_given_a_short_one(office, office.volunteer(f"new {number}")) for number in range(12)]
    assert given == [True] * short + [False] * (12 - short)


def test_a_claim_says_the_samples_of_its_own_unit(mixed: Callable[..., Office]) -> None:
    office = mixed()
    work = office.lease(office.volunteer("ada"))
    assert work.claim.samples == SHORT * office.desk.config.training.batch
    long = replace(work.claim, samples=STEPS * office.desk.config.training.batch)
    with pytest.raises(ClaimMismatch, match=f"This unit has {work.claim.samples} samples"):
        office.claim(replace(work, claim=long, envelope=sign(long, work.by.key)))


def test_audits_of_established_owners_are_as_probable_as_their_units_are_large(mixed: Callable[..., Office]) -> None:
    office = mixed(floor=ONE // 10)
    ada = office.volunteer("ada", record=50)
    first, second = office.train(ada, ms=TRAINING_MS // 4), office.train(ada, ms=TRAINING_MS // 4)
    shares = [office.receipt(work).audit_share for work in (first, second)]
    assert shares == [ONE // 10 * SHORT // STEPS, ONE // 10]
    newcomer = office.train(office.volunteer("newcomer"))
    assert office.receipt(newcomer).audit_share == ONE


def test_a_short_unit_is_not_taken_for_one_that_was_done_too_fast(mixed: Callable[..., Office]) -> None:
    office = mixed()
    ada = office.volunteer("ada", record=50)  # long units take it 20 seconds
    in_time = office.deliver(ada, ms=TRAINING_MS * SHORT // STEPS)
    assert office.attempt(in_time).reason is None
    hasty = office.deliver(ada, ms=TRAINING_MS // 3)  # a long one
    assert office.attempt(hasty).reason is AuditReason.TOO_FAST


def test_short_deltas_weigh_by_their_samples(mixed: Callable[..., Office]) -> None:
    office = mixed()
    done = [office.deliver(office.volunteer(name, record=ONE), ms=WINDOW_MS // 4) for name in ("ada", "bob")]
    fast = office.volunteer("cyd", record=ONE)
    done += [office.deliver(fast, ms=TRAINING_MS // 2), office.deliver(fast, ms=TRAINING_MS // 2)]
    office.wait(WINDOW_MS)
    plan = office.plan()
    assert plan is not None
    assert len(plan.entries) == len(done)
    by_claim = {entry.claim: entry.samples for entry in plan.entries}
    batch = office.desk.config.training.batch
    assert sorted(by_claim.values()) == [SHORT * batch] * 3 + [STEPS * batch]
