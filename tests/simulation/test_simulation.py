"""Small runs in virtual time: the coordinator's own lifecycle code meets honest and hostile volunteers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.procedural import small_run
from benchmarks.simulation.behaviours import Liar, Shaper, Sleeper
from benchmarks.simulation.measured import REFUSED
from benchmarks.simulation.people import Behaviour, Player, Taken, volunteers
from benchmarks.simulation.physics import HONEST
from benchmarks.simulation.real import RealPhysics
from benchmarks.simulation.run import Simulation
from benchmarks.simulation.scenes import Crowd, all_caught, default_verification, memory_folder, play, poisoners
from benchmarks.simulation.tally import Outcome, interval
from coordinator import settler
from coordinator.audits import OPEN_AUDITS
from diloco.checkpoint import TensorFile
from diloco.merge import MergeFiles, MergeInput, OuterState, merge_round
from protocol.documents import Digest
from protocol.layout import RESIDUAL, WEIGHTS, checkpoint_directory
from protocol.limits import MINUTE_MS
from verify.attacks import Delta
from verify.policy import ONE, assess
from verify.replay import merge_rules

STRICT = replace(default_verification(), probation=3, ramp=3, floor=ONE // 4)
"""A quarter of all claims is audited, so that a short run shows what a long one would."""
SMALL = Crowd(honest=4, units=12, rounds=6, auditors=2)


def play_small(*players: Player, crowd: Crowd = SMALL, until: Callable[[Simulation], bool] | None = None) -> Outcome:
    return play(list(players), 1, crowd, {}, verification=STRICT, until=until)


def caught_and_taken_out(simulation: Simulation) -> bool:
    store = simulation.office.store
    settled = not any(store.audits(state) for state in OPEN_AUDITS) and not store.units_to_unmerge()
    return all_caught(simulation) and settled


def hostile(behaviour: Behaviour, *, record: int = 50) -> Player:
    return Player(name="eve", owner="eve", behaviour=behaviour, record=record)


def test_honest_volunteers_have_all_their_work_merged_and_nobody_is_banned() -> None:
    outcome = play_small()
    assert outcome.rounds == SMALL.rounds
    # A unit whose audit is on its way when the last round closes is in no checkpoint; every other one is.
    assert outcome.units > 0.85 * SMALL.rounds * SMALL.units
    assert outcome.audits["passed"] > 0
    assert outcome.audits["failed"] == 0
    assert outcome.honest_rejected == {}
    assert outcome.honest_banned == 0


def test_newcomers_pass_probation_by_honest_work() -> None:
    outcome = play_small(crowd=replace(SMALL, record=0))
    assert all(owner.valid_in_row >= STRICT.probation for owner in outcome.owners)
    assert outcome.honest_rejected == {}


def test_a_sign_flipper_on_probation_is_banned_before_it_weighs_anything() -> None:
    (eve,) = play_small(hostile(Shaper("sign-flip"), record=0)).hostile
    assert eve.poisons_until_ban is not None
    assert eve.merged == 0


def test_a_sleeper_is_caught_within_the_99_percent_bound_of_the_policy() -> None:
    sleeper = hostile(Sleeper("sign-flip", after=6), record=0)
    outcome = play_small(sleeper, crowd=replace(SMALL, rounds=30), until=caught_and_taken_out)
    (eve,) = outcome.hostile
    assert eve.poisons_until_ban is not None
    assert eve.poisons > 0
    assert eve.before_drawn <= assess(STRICT).sleeper.merged_99
    assert eve.unmerged == eve.merged
    assert outcome.honest_banned == 0


def test_a_liar_is_banned_and_those_whom_it_accused_are_not() -> None:
    outcome = play_small(hostile(Liar()), crowd=replace(SMALL, rounds=30), until=all_caught)
    (eve,) = outcome.hostile
    assert eve.poisons_until_ban == 0
    assert eve.rejected["REPLAY_DIFFERS"] == 1
    assert outcome.honest_banned == 0
    assert outcome.honest_rejected == {}


def test_a_sender_of_broken_bytes_has_nothing_merged() -> None:
    players = [hostile(Shaper("nan"))]
    outcome = play(players, 1, SMALL, {"nan": REFUSED}, verification=STRICT)
    (eve,) = outcome.hostile
    assert eve.credited == 0
    assert eve.rejected["DELTA_NOT_FINITE"] > 0


def test_what_poisoners_get_in_is_what_the_policy_predicts() -> None:
    predicted = assess(STRICT).sleeper
    count = 16
    outcome = play(
        poisoners(count, record=predicted.starts_at),
        3,
        Crowd(honest=6, units=40, rounds=40, auditors=4),
        {},
        verification=STRICT,
        until=all_caught,
    )
    merged = interval([owner.before_drawn for owner in outcome.hostile])
    assert all(owner.poisons_until_ban is not None for owner in outcome.hostile)
    # Such waiting times spread about as wide as they are long; a sample that came out short makes too little of it.
    error = max(merged.error, predicted.merged / math.sqrt(count))
    assert merged.mean == pytest.approx(predicted.merged, abs=3 * error)
    # One of a hundred may have more: of sixteen, hardly two.
    assert sum(owner.before_drawn > predicted.merged_99 for owner in outcome.hostile) <= 1


# --- with training -------------------------------------------------------------------------------------------


class SendsTwoClaimsInTheEnd(Shaper):
    """Poisons every unit, and is found out in round 3, where it signs two claims for one lease."""

    def claims_again(self, taken: Taken) -> str | None:
        return HONEST if taken.task.round == 3 and taken.replica_of is None else None


def test_merged_poison_of_a_banned_owner_is_audited_back_and_leaves_the_weights() -> None:
    rules = replace(default_verification(), floor=0, weighting="mean", screen_triples=0, unmerge_from=0.0)
    small = small_run(seed=bytes(32), units=3, rounds=8, shards=3, steps=2, batch=4, verification=rules)
    window = replace(small.config.rounds, min_window_ms=2 * MINUTE_MS)
    small = replace(small, config=replace(small.config, rounds=window))
    # With such a record nobody is ever drawn.
    players = [*volunteers(2, record=10**9), hostile(SendsTwoClaimsInTheEnd("wrong-shard"), record=10**9)]
    with memory_folder() as folder:
        physics = RealPhysics(small, folder / "physics", memo=folder / "memo")
        simulation = Simulation(
            config=small.config,
            physics=physics,
            players=players,
            folder=folder,
            seed=bytes(32),
            delta_bytes=settler.describe(small.config)["delta_bytes"],
        )
        simulation.play(until=taken_out)
        (eve,) = simulation.outcome().hostile
        last = simulation.office.published()
        place = folder / "physics" / checkpoint_directory(last)
        with_poison_taken_out = due(place / WEIGHTS, place / RESIDUAL)
        without_it = merged_without("eve", simulation, physics, folder)
        simulation.office.close()
    assert eve.merged == eve.unmerged == 2
    moved = distance(with_poison_taken_out, small.genesis)
    assert distance(with_poison_taken_out, without_it) < 1e-5 * moved


def taken_out(simulation: Simulation) -> bool:
    rounds = (simulation.office.store.round(number) for number in range(1, simulation.office.published() + 1))
    return sum(len(found.unmerge) for found in rounds if found is not None) == 2


def merged_without(owner: str, simulation: Simulation, physics: RealPhysics, folder: Path) -> Delta:
    """Merge every round again, with the same weights, but nothing of one owner's; what patches still owe included."""
    genesis = folder / "physics" / checkpoint_directory(0) / WEIGHTS
    state = OuterState(weights=genesis, weights_sha256=bytes(32), momentum=None, residual=None)
    for number in range(1, simulation.office.published() + 1):
        found = simulation.office.store.round(number)
        assert found is not None
        out = MergeFiles(**{name: folder / f"without-{number}.{name}" for name in MergeFiles.__slots__})
        merge_round(
            state,
            [
                MergeInput(
                    claim_digest=bytes.fromhex(entry.claim),
                    container=physics.container(entry.unit, entry.blob_sha256),
                    weight=entry.weight,
                )
                for entry in found.merge
                if simulation.truths[Digest(entry.claim)].owner != owner
            ],
            merge_rules(simulation.office.config),
            out,
        )
        state = OuterState(weights=out.weights, weights_sha256=bytes(32), momentum=out.momentum, residual=out.residual)
    assert state.residual is not None
    return due(state.weights, state.residual)


def due(weights: Path, residual: Path) -> Delta:
    """Return where a run stands once all that waits has been delivered."""
    waiting = TensorFile.open(residual).load()
    return {name: values - waiting.get(name, np.float32(0)) for name, values in TensorFile.open(weights).load().items()}


def distance(a: Delta, b: Delta) -> float:
    return float(np.sqrt(sum(float(np.sum((a[name] - b[name]) ** 2, dtype=np.float64)) for name in a)))
