from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from coordinator.rounds import (
    TRANSITIONS,
    Closed,
    MergeInterrupted,
    MergeRound,
    MergeStarted,
    OpenRound,
    Published,
    Round,
    RoundFacts,
    RoundState,
    advance,
    gives_units,
    is_due,
    suits_short,
)
from protocol.documents import Rounds
from protocol.errors import IllegalTransition
from tests.coordinator import examples
from tests.coordinator.lifecycles import assert_every_state_is_reached_and_reaches_an_end, ends

ENTRY = examples.merge_entry(examples.received(examples.leased()))
OUT = examples.unmerge_entry(examples.merge_entry(examples.received(examples.leased("b", examples.unit(1)))))
SEED = examples.digest("weigh")
EVENTS: dict[type[Any], Any] = {
    Closed: Closed(now_ms=5_000, merge=(ENTRY,), unmerge=(OUT,), weigh_seed=SEED),
    MergeStarted: MergeStarted(),
    MergeInterrupted: MergeInterrupted(),
    Published: Published(manifest_sha256=examples.digest("manifest")),
}
RULES = Rounds(
    planned=3,
    units=4,
    shards_per_unit=1,
    max_bytes_per_unit=2**30,
    min_window_ms=10_000,
    min_units=2,
    staleness_bound=2,
    staleness_discount=2**23,
    lease_ms=60_000,
    upload_ms=60_000,
    stages=(),
)


def a_round(state: RoundState) -> Round:
    moved = examples.first_round()
    for event in (Closed, MergeStarted, Published):
        if moved.state is state:
            break
        moved, _ = advance(moved, EVENTS[event])
    return moved


@pytest.mark.parametrize(("state", "event"), list(product(RoundState, EVENTS)))
def test_a_round_moves_as_its_table_says_or_not_at_all(state: RoundState, event: type[Any]) -> None:
    before = a_round(state)

    if (state, event) in TRANSITIONS:
        assert advance(before, EVENTS[event])[0].state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"Round 1 is {state.value}; {event.__name__}"):
            advance(before, EVENTS[event])


def test_a_round_ends_published_and_always_can() -> None:
    assert ends(TRANSITIONS) == {RoundState.PUBLISHED}
    assert_every_state_is_reached_and_reaches_an_end(TRANSITIONS)


def test_the_merge_set_is_fixed_at_the_close_and_survives_an_interrupted_merge() -> None:
    closed, instructions = advance(examples.first_round(), EVENTS[Closed])
    merging, _ = advance(closed, MergeStarted())
    again, once_more = advance(merging, MergeInterrupted())

    assert (closed.merge, closed.unmerge, closed.weigh_seed) == ((ENTRY,), (OUT,), SEED)
    assert closed.closed_ms == 5_000
    assert again == closed
    assert instructions == once_more == (MergeRound(round=1),)


def test_a_published_round_names_its_manifest_and_asks_for_the_next_round() -> None:
    published, instructions = advance(a_round(RoundState.MERGING), EVENTS[Published])
    assert published.manifest_sha256 == examples.digest("manifest")
    assert instructions == (OpenRound(round=2),)


@pytest.mark.parametrize(
    ("after_ms", "ready", "ended", "due"),
    [
        (0, 4, 0, True),  # everything can be merged
        (0, 3, 1, True),  # one unit ended without a merge, the others can be merged
        (0, 2, 1, False),  # enough, but the window is open, and the fourth may still come or pass its audit
        (9_999, 2, 0, False),
        (10_000, 2, 0, True),
        (10_000, 1, 0, False),  # the window has passed, too little is ready: newcomers' work waits for its audits
        (10**9, 0, 3, False),  # nothing to merge
        (10**9, 0, 4, False),
    ],
)
def test_a_round_closes_when_all_is_ready_or_ended_or_the_window_has_passed_with_enough(
    after_ms: int, ready: int, ended: int, due: bool
) -> None:
    collecting = examples.first_round()
    facts = RoundFacts(now_ms=collecting.opened_ms + after_ms, ready=ready, ended=ended, total=4)
    assert is_due(collecting, RULES, facts) is due


@pytest.mark.parametrize("state", [RoundState.CLOSED, RoundState.MERGING, RoundState.PUBLISHED])
def test_a_round_closes_once(state: RoundState) -> None:
    assert not is_due(a_round(state), RULES, RoundFacts(now_ms=10**9, ready=4, ended=0, total=4))


@pytest.mark.parametrize(
    ("state", "bound", "planned", "gives"),
    [
        (RoundState.COLLECTING, 0, 1, True),
        (RoundState.CLOSED, 1, 2, True),
        (RoundState.MERGING, 1, 2, True),
        (RoundState.MERGING, 0, 2, False),
        (RoundState.MERGING, 1, 1, False),
        (RoundState.PUBLISHED, 1, 2, False),
    ],
)
def test_a_round_gives_out_units_as_long_as_a_merge_to_come_may_take_them(
    state: RoundState, bound: int, planned: int, gives: bool
) -> None:
    rules = replace(RULES, staleness_bound=bound, planned=planned)

    assert gives_units(a_round(state), rules) is gives


@pytest.mark.parametrize(("long_ms", "short"), [(None, True), (25_001, True), (25_000, False), (1, False)])
def test_short_units_suit_machines_that_are_new_or_need_more_than_half_a_window(
    long_ms: int | None, short: bool
) -> None:
    assert suits_short(replace(RULES, min_window_ms=50_000), long_ms) is short
