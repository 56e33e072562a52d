"""The machines of a simulated fleet: their cards, their lines, their owners' habits, and what a unit asks of them.

Nothing here was measured on these machines. Speeds are the vendor's published dense bf16 tensor rates with fp32
accumulation, of which 40 % is taken to be sustained; lines and habits are made up, to be on the hard side.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, unique
from typing import Final

from protocol.limits import HOUR_MS, MINUTE_MS, SECOND_MS

TFLOPS: Final[Mapping[str, float]] = {
    "RTX 3060": 25.0,
    "RTX 3070": 40.0,
    "RTX 4070": 58.0,
    "RTX 3080": 59.0,
    "RTX 3090": 71.0,
    "RTX 4080": 97.0,
    "RTX 4090": 165.0,
}
"""The slowest first; a fleet has equally many of each."""
MIDDLING: Final = "RTX 3080"
SUSTAINED: Final = 0.4
UP_MBIT: Final = (10.0, 40.0)
DOWN_MBIT: Final = (50.0, 200.0)

PARAMETERS: Final = 2_000_000_000
"""Of the preset d24, about."""
DELTA_BYTES: Final = int(0.15 * PARAMETERS)
PATCH_BYTES: Final = int(0.17 * PARAMETERS)
SNAPSHOT_BYTES: Final = 4 * PARAMETERS
SAMPLE_BYTES: Final = 33_000
"""A picture of 256 x 256 as latents, 16 x 32 x 32 in bf16, and its caption."""
SAMPLE_FLOPS: Final = 6.0 * PARAMETERS * (256 + 154)
"""Forward and backward pass over 256 tokens of picture and 154 of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a unit asks of a machine: floating-point operations, bytes, and milliseconds around the training.

    `patch_bytes`: from one checkpoint to the next; where a run has no patches, that is a whole checkpoint.
    `before_ms`: the base is read from the disk and put on the card. `after_ms`: the delta is coded and written, at half
    a gigabyte of fp32 a second (`benchmarks.merge` measures it). `start_ms`: a worker starts, and checks its files.
    """

    flops: float
    shard_bytes: int
    patch_bytes: int = PATCH_BYTES
    before_ms: int = 5 * SECOND_MS
    after_ms: int = 16 * SECOND_MS
    start_ms: int = 30 * SECOND_MS


def load_of(minutes: float) -> Load:
    """Return the load of units that a middling card trains in so many minutes."""
    flops = minutes * 60 * TFLOPS[MIDDLING] * 1e12 * SUSTAINED
    return Load(flops=flops, shard_bytes=int(flops / SAMPLE_FLOPS * SAMPLE_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A card on a line; `up` and `down` in Mbit/s."""

    card: str
    up: float
    down: float

    def train_ms(self, load: Load) -> int:
        """Return how long a unit's training takes."""
        return round(1000 * load.flops / (TFLOPS[self.card] * 1e12 * SUSTAINED))

    def down_ms(self, count: int) -> int:
        """Return how long so many bytes take to come."""
        return round(count * 8 / (self.down * 1000))

    def up_ms(self, count: int) -> int:
        """Return how long so many bytes take to go."""
        return round(count * 8 / (self.up * 1000))


@unique
class Leaving(Enum):
    """How a machine goes."""

    OFF = "switched off"  # in the middle of whatever it does
    NOW = "stopped at once"  # SIGTERM: the unit is handed back
    SOON = "stopped soon"  # Ctrl-C: what has just begun is handed back, the rest finished and delivered


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """How long an owner's machine is there, and away, on the average; each time from half to one and a half of that."""

    name: str
    there_ms: int
    away_ms: int

    def there(self, chance: random.Random) -> int:
        """Draw how long it stays."""
        return round(self.there_ms * chance.uniform(0.5, 1.5))

    def away(self, chance: random.Random) -> int:
        """Draw how long it is gone."""
        return round(self.away_ms * chance.uniform(0.5, 1.5))


HABITS: Final = (
    Habit(name="nearly always", there_ms=60 * HOUR_MS, away_ms=30 * MINUTE_MS),
    Habit(name="nights", there_ms=9 * HOUR_MS, away_ms=15 * HOUR_MS),
    Habit(name="nights", there_ms=9 * HOUR_MS, away_ms=15 * HOUR_MS),
    Habit(name="now and then", there_ms=4 * HOUR_MS, away_ms=8 * HOUR_MS),
)
"""Equally many machines of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A volunteer of the fleet. `joins_ms`: when it comes for the first time; newcomers have nothing and no record."""

    name: str
    machine: Machine
    habit: Habit
    newcomer: bool
    joins_ms: int


def fleet_of(count: int, *, newcomers: float, chance: random.Random) -> list[Member]:
    """Draw a fleet: cards and habits in equal parts, lines at random, so many newcomers in the first two days."""
    cards = list(TFLOPS)
    members = []
    for number in range(count):
        machine = Machine(card=cards[number % len(cards)], up=chance.uniform(*UP_MBIT), down=chance.uniform(*DOWN_MBIT))
        newcomer = chance.random() < newcomers
        habit = HABITS[(number // len(cards)) % len(HABITS)]
        first = 48 * HOUR_MS if newcomer else habit.away_ms
        # Of the others as many are there from the start as usually are.
        begins = not newcomer and chance.random() < habit.there_ms / (habit.there_ms + habit.away_ms)
        members.append(
            Member(
                name=f"volunteer-{number}",
                machine=machine,
                habit=habit,
                newcomer=newcomer,
                joins_ms=0 if begins else round(chance.uniform(0, first)),
            )
        )
    return members
