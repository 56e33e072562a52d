"""The runs that the benchmark of attacks plays: who takes part, under which rules, and what is measured of it."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from benchmarks.procedural import SmallRun, small_run
from benchmarks.simulation.behaviours import (
    Absent,
    Colluder,
    Copier,
    LazyReplica,
    Liar,
    Shaper,
    Shopper,
    Sleeper,
    Stuffer,
    Sybil,
    TwoClaims,
    Withholder,
)
from benchmarks.simulation.measured import MeasuredPhysics, Odds
from benchmarks.simulation.office import Times
from benchmarks.simulation.people import Behaviour, Player, volunteers
from benchmarks.simulation.real import RealPhysics, Weighting
from benchmarks.simulation.run import Simulation
from benchmarks.simulation.tally import Outcome
from coordinator import settler
from coordinator.settings import Settings
from coordinator.signed import run_config
from protocol.documents import Digest, RunConfig, ShardRef, Verification
from protocol.limits import MINUTE_MS

RECORD: Final = 50
"""Audits passed by those who are established from the start: more than the ramp asks for."""
NEVER_DRAWN: Final = 10**9
"""A record so long that, with a floor of 0, nothing is ever drawn."""
POISON: Final = "sign-flip"
"""What those send who play the protocol."""

# Training lasts a minute and uploading 10 seconds. Everybody takes one unit of a round, so its index tells whose it is.
TRAINING_WINDOW_MS: Final = 3 * MINUTE_MS
TRAINING_LEASE_MS: Final = 8 * MINUTE_MS
LR_FINAL_SHARE: Final = 0.05
PROTOCOL_WINDOW_MS: Final = 2 * MINUTE_MS
PROTOCOL_LEASE_MS: Final = 3 * MINUTE_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Sizes of a run with training: so many volunteers, each of whom takes one unit of every round."""

    honest: int
    hostile: int
    rounds: int

    @property
    def volunteers(self) -> int:
        """How many there are."""
        return self.honest + self.hostile


def default_verification() -> Verification:
    """Return the rules of a run whose operator changed nothing."""
    shard = ShardRef(sha256="00" * 32, size=1, samples=1, height=8, width=8)
    unused = Digest("00" * 32)
    return run_config(Settings(), shards=(shard,), heldout=shard, seed=bytes(32), genesis_sha256=unused).verification


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Return an empty folder, in memory if the machine has such a place."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as name:
        yield Path(name)


# --- with training -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run with training in numbers: held-out loss by checkpoint, and what became of everybody."""

    losses: Mapping[int, float]
    outcome: Outcome

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON would hold it."""
        return {"losses": [self.losses[number] for number in sorted(self.losses)], "outcome": self.outcome.to_json()}


def train(
    attack: str | None,
    seed: int,
    cohort: Cohort,
    *,
    memo: Path,
    verification: Verification | None = None,
    weighting: Weighting | None = None,
    chance: int = 0,
) -> Trained:
    """Play a run with real training.

    The honest take their unit of a round first, so that they train the same units whatever the others do; an attacker
    who was banned, and every attacker if there is no attack, is replaced by somebody who takes a unit and does nothing.

    Args:
        attack: a name in `verify.attacks.ATTACKS`; None for the honest alone.
        seed: another seed is another model and other pictures.
        memo: folder of honest deltas that runs may share.
        weighting: the rule to weigh by, with no audit, no ban and no look for outliers; None for the whole policy.
        chance: another one is the same run with other draws of audits and other delays.
    """
    blind = weighting is not None
    rules = verification or default_verification()
    if blind:
        rules = replace(rules, floor=0)
    small = _small(seed, cohort, rules)
    record = NEVER_DRAWN if blind else RECORD
    with memory_folder() as folder:
        physics = RealPhysics(small, folder / "physics", memo=memo, weighting=weighting)
        simulation = Simulation(
            config=small.config,
            physics=physics,
            players=[*volunteers(cohort.honest, record=record), *_attackers(attack, cohort, record)],
            folder=folder,
            seed=_seed(f"train/{chance}", seed),
            delta_bytes=settler.describe(small.config)["delta_bytes"],
        )
        simulation.play()
        outcome = simulation.outcome()
        simulation.office.close()
    return Trained(losses=physics.losses, outcome=outcome)


@cache
def _small(seed: int, cohort: Cohort, rules: Verification) -> SmallRun:
    small = small_run(
        seed=_seed("data", seed),
        units=cohort.volunteers,
        rounds=cohort.rounds,
        shards=6 * cohort.volunteers,
        verification=rules,
    )
    rounds = replace(
        small.config.rounds,
        min_window_ms=TRAINING_WINDOW_MS,
        min_units=cohort.honest,
        lease_ms=TRAINING_LEASE_MS,
    )
    # Nearly to zero: what chance leaves in a model at the end of its training shrinks fivefold by that.
    training = replace(small.config.training, lr_final_share=LR_FINAL_SHARE)
    return replace(small, config=replace(small.config, rounds=rounds, training=training))


def _attackers(attack: str | None, cohort: Cohort, record: int) -> list[Player]:
    return [
        Player(
            name=f"hostile-{number}",
            owner=f"hostile-{number}",
            behaviour=Absent() if attack is None else Shaper(attack, successor=Absent()),
            record=0 if attack is None else record,
            team="hostile",
            first_asks=1,
        )
        for number in range(cohort.hostile)
    ]


# --- with measured odds --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Sizes of a run without training."""

    honest: int = 12
    units: int = 48
    rounds: int = 20
    auditors: int = 2
    record: int = RECORD


def _partners(count: int) -> frozenset[str]:
    return frozenset(f"hostile-{number}" for number in range(count))


def _each(count: int, make: Callable[[int], Behaviour], *, record: int = RECORD, **changes: Any) -> list[Player]:
    return [
        Player(
            name=f"hostile-{number}",
            owner=f"hostile-{number}",
            behaviour=make(number),
            record=record,
            team="hostile",
            **changes,
        )
        for number in range(count)
    ]


PROTOCOL: Final[Mapping[str, Callable[[], list[Player]]]] = {
    "nobody hostile": list,
    "shaping, honest in replicas": lambda: _each(3, lambda _: Shaper(POISON, spares_replicas=True)),
    "copy": lambda: _each(3, lambda _: Copier()),
    "sleeper": lambda: _each(3, lambda _: Sleeper(POISON, after=30), record=0),
    "colluding-pair": lambda: _each(2, lambda _: Colluder(POISON, _partners(2))),
    "colluding, five of them": lambda: _each(5, lambda _: Colluder(POISON, _partners(5))),
    "sybil": lambda: _each(3, lambda _: Sybil(POISON), record=0),
    "lazy-replica": lambda: _each(3, lambda _: LazyReplica(_partners(3))),
    "liar": lambda: _each(3, lambda _: Liar()),
    "class-lie": lambda: _each(3, lambda _: Shaper("class-lie", spares_replicas=True), device_class="bf16"),
    "stuffing": lambda: [
        Player(name=f"hostile-0-{number}", owner="hostile-0", behaviour=Stuffer(), record=RECORD, team="hostile")
        for number in range(4)
    ],
    "lease-shopping": lambda: _each(3, lambda _: Shopper(POISON, _partners(3))),
    "two-claims": lambda: _each(3, lambda _: TwoClaims(POISON)),
    "commit-and-withhold": lambda: _each(3, lambda number: Withholder(POISON, number)),
    "nan": lambda: _each(3, lambda _: Shaper("nan")),
    "huge": lambda: _each(3, lambda _: Shaper("huge")),
}
"""Who takes part beside the honest, by the name of what they try."""


def protocol_config(crowd: Crowd, verification: Verification | None = None) -> RunConfig:
    """Return the config of a run without training."""
    small = _tiny()
    rounds = replace(
        small.rounds,
        planned=crowd.rounds,
        units=crowd.units,
        min_units=crowd.units * 3 // 4,
        min_window_ms=PROTOCOL_WINDOW_MS,
        lease_ms=PROTOCOL_LEASE_MS,
    )
    return replace(small, rounds=rounds, verification=verification or default_verification())


@cache
def _tiny() -> RunConfig:
    return small_run(seed=bytes(32), units=1, rounds=1, shards=1).config


def play(
    players: list[Player],
    seed: int,
    crowd: Crowd,
    odds: Mapping[str, Odds],
    *,
    verification: Verification | None = None,
    until: Callable[[Simulation], bool] | None = None,
) -> Outcome:
    """Play a run without training; the honest of the crowd take part beside these players."""
    config = protocol_config(crowd, verification)
    delta_bytes = settler.describe(config)["delta_bytes"]
    with memory_folder() as folder:
        simulation = Simulation(
            config=config,
            physics=MeasuredPhysics(config, odds, delta_bytes=delta_bytes, seed=_seed("odds", seed)),
            players=[*volunteers(crowd.honest, record=crowd.record), *players],
            folder=folder,
            seed=_seed("play", seed),
            delta_bytes=delta_bytes,
            auditors=crowd.auditors,
            times=Times(),
        )
        simulation.play(until)
        outcome = simulation.outcome()
        simulation.office.close()
    return outcome


def poisoners(count: int, *, record: int) -> list[Player]:
    """Return attackers who poison every unit of their own from a record on, and work honestly as replicas."""
    return _each(count, lambda _: Shaper(POISON, spares_replicas=True), record=record)


def all_caught(simulation: Simulation) -> bool:
    """Return whether every attacker is banned."""
    hostile = {player.owner for player in simulation.players if player.behaviour.hostile}
    return simulation.banned() >= hostile


def fingerprint(*parts: Any) -> str:
    """Return what a kept cell must agree on: sizes and rules, by value."""
    text = repr([asdict(part) if hasattr(part, "__dataclass_fields__") else part for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()


def _seed(purpose: str, number: int) -> bytes:
    return hashlib.sha256(f"benchmarks/attacks/{purpose}/{number}".encode()).digest()
