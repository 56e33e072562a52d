"""A fleet of unlike machines in virtual time, which do what workers do."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import pytest

from benchmarks.simulation.fleet import Fleet, Settings
from benchmarks.simulation.ledger import Doing, Fate
from benchmarks.simulation.machines import DELTA_BYTES, HABITS, SNAPSHOT_BYTES, TFLOPS, Machine, fleet_of, load_of
from benchmarks.simulation.office import Pace
from benchmarks.simulation.scenes import memory_folder
from protocol.limits import HOUR_MS, MINUTE_MS

SMALL: Final = Settings(units=64, min_units=4)
NOTHING: Final = (Doing.NO_UNIT, Doing.MERGING, Doing.LIMITED)

Playing = Callable[..., Fleet]


@pytest.fixture
def playing() -> Iterator[Playing]:
    """Plays a small fleet, under settings that differ from `SMALL` as they say."""
    fleets: list[Fleet] = []
    with memory_folder() as folder:

        def do(*, rounds: int = 3, settings: Settings = SMALL, **more: Any) -> Fleet:
            place = folder / str(len(fleets))
            place.mkdir()
            fleets.append(Fleet(settings, members=14, folder=place, seed=b"a test", **more))
            fleets[-1].play(rounds)
            return fleets[-1]

        yield do
        for fleet in fleets:
            fleet.close()


def test_a_middling_card_takes_the_units_time_and_others_by_their_speed() -> None:
    load = load_of(45.0)
    slow, middling, fast = (Machine(card=card, up=10.0, down=50.0) for card in ("RTX 3060", "RTX 3080", "RTX 4090"))
    assert middling.train_ms(load) == 45 * MINUTE_MS
    assert slow.train_ms(load) / fast.train_ms(load) == pytest.approx(TFLOPS["RTX 4090"] / TFLOPS["RTX 3060"])
    assert middling.up_ms(DELTA_BYTES) == 4 * MINUTE_MS
    assert middling.down_ms(SNAPSHOT_BYTES) == pytest.approx(21.3 * MINUTE_MS, rel=0.01)


def test_a_fleet_has_all_cards_alike_and_starts_with_as_many_as_are_usually_there() -> None:
    members = fleet_of(700, newcomers=0.0, chance=random.Random(1))
    assert {sum(member.machine.card == card for member in members) for card in TFLOPS} == {100}
    usually = sum(habit.there_ms / (habit.there_ms + habit.away_ms) for habit in HABITS) / len(HABITS)
    assert sum(member.joins_ms == 0 for member in members) / 700 == pytest.approx(usually, abs=0.05)


def test_machines_train_nearly_all_of_their_time_and_no_finished_unit_is_lost(playing: Playing) -> None:
    account = playing().account()
    assert account.share(Doing.TRAINING) > 0.95
    assert account.share(*Doing) == pytest.approx(1.0)
    assert account.training(*Fate) == pytest.approx(1.0)
    assert account.late.total() > 50
    assert account.thrown_away == 0


def test_cards_accounts_add_up_to_that_of_all(playing: Playing) -> None:
    fleet = playing(rounds=1)
    cards = [fleet.account(card) for card in TFLOPS]
    assert sum(account.hours for account in cards) == pytest.approx(fleet.account().hours)
    assert sum(account.units for account in cards) == fleet.account().units


def test_nobody_waits_for_a_merge_though_merging_takes_half_an_hour(playing: Playing) -> None:
    fleet = playing(pace=Pace(publish_ms=HOUR_MS // 2))
    assert fleet.account().share(*NOTHING) == 0.0
    assert fleet.hours == pytest.approx(3 * 2.5, abs=0.1)


def test_machines_wait_for_the_slowest_where_all_units_are_given_out(playing: Playing) -> None:
    account = playing(settings=replace(SMALL, units=12), rounds=1).account()
    assert account.share(Doing.NO_UNIT) > 0.2


def test_the_next_checkpoint_is_there_when_it_was_fetched_ahead(playing: Playing) -> None:
    ahead, not_ahead = playing(patches=False), playing(patches=False, ahead=False)
    assert ahead.account().share(Doing.BASE) < 0.5 * not_ahead.account().share(Doing.BASE)


def test_what_no_merge_may_take_is_counted_as_thrown_away_with_its_code(playing: Playing) -> None:
    account = playing(settings=replace(SMALL, staleness_bound=0)).account()
    assert account.thrown_away > 0
    assert set(account.codes) <= {"ROUND_TOO_OLD", "TOO_LATE"}


def test_the_same_seed_gives_the_same_run(playing: Playing) -> None:
    assert playing(rounds=2).account() == playing(rounds=2).account()
