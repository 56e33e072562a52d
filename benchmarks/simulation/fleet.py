"""A fleet of unlike machines in virtual time, on the coordinator's own lifecycle code.

fleet = Fleet(settings, members=64, folder=..., seed=b"...")
fleet.play(rounds=20)
print(fleet.account())
fleet.close()
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.simulation.device import Device
from benchmarks.simulation.ledger import Account, Ledger, account
from benchmarks.simulation.machines import DELTA_BYTES, SNAPSHOT_BYTES, Machine, Member, fleet_of, load_of
from benchmarks.simulation.measured import HONEST_ODDS, MeasuredPhysics
from benchmarks.simulation.office import START_MS, Office, Pace, Referees
from benchmarks.simulation.people import identity
from benchmarks.simulation.post import World
from benchmarks.simulation.scenes import Crowd, protocol_config
from benchmarks.simulation.tally import Meter
from coordinator.rounds import gives_units
from protocol.documents import RunConfig
from protocol.limits import HOUR_MS, MINUTE_MS, SECOND_MS

NEWCOMERS: Final = 0.15
RECORD: Final = 50
"""Audits passed by those who were there before the simulation began."""
HONEST_FLAGGED: Final = 1 / 2000
"""Share of honest deltas that stand out when they are weighed; at most that was measured."""
TICK_MS: Final = 10 * MINUTE_MS
SETTLER: Final = Pace(weigh_ms=SECOND_MS, merge_ms=10 * SECOND_MS, publish_ms=2 * MINUTE_MS)
"""Of two cores: a delta is 8 GB of fp32 to be added up, at 0.84 GB/s (`benchmarks.merge`)."""
AUDITOR: Final = "RTX 4090"
FOREVER: Final = 100_000
STEPS: Final = 8
"""Of a long unit; nothing is trained here, so it is only their ratio that counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an operator chooses; see `[rounds]` in run.toml. `minutes`: a unit's training on a middling card.

    `short_share`: of the units, those with half of the steps.
    """

    minutes: float = 45.0
    short_share: float = 0.0
    units: int = 256
    min_units: int = 32
    window_hours: float = 2.0
    staleness_bound: int = 12
    staleness_discount: float = 0.5
    lease_hours: float = 6.0
    upload_hours: float = 24.0

    def config(self) -> RunConfig:
        """Return a run's config with these rules."""
        small = protocol_config(Crowd(units=self.units, rounds=FOREVER))
        return replace(
            small,
            training=replace(
                small.training,
                steps=STEPS,
                short_steps=STEPS // 2,
                short_share=round(self.short_share * 2**24),
            ),
            rounds=replace(
                small.rounds,
                min_units=self.min_units,
                min_window_ms=round(self.window_hours * HOUR_MS),
                staleness_bound=self.staleness_bound,
                staleness_discount=round(self.staleness_discount * 2**24),
                lease_ms=round(self.lease_hours * HOUR_MS),
                upload_ms=round(self.upload_hours * HOUR_MS),
            ),
        )


class Fleet:
    """A run of a fleet. Everything follows from the seed.

    Args:
        members: how many volunteers, each with one machine.
        pace: of the settler.
        ahead: whether workers fetch the next checkpoint while they train.
        patches: whether a checkpoint comes as a patch of the one before.
        auditors: how many referees the operator runs, on a fast card each.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        members: int,
        folder: Path,
        seed: bytes,
        pace: Pace = SETTLER,
        ahead: bool = True,
        patches: bool = True,
        auditors: int = 1,
    ) -> None:
        chance = random.Random(b"fleet" + seed)
        config, load = settings.config(), load_of(settings.minutes)
        odds = {"honest": replace(HONEST_ODDS, stands_out=HONEST_FLAGGED)}
        if not patches:
            load = replace(load, patch_bytes=SNAPSHOT_BYTES)
        physics = MeasuredPhysics(config, odds, delta_bytes=DELTA_BYTES, seed=seed)
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.office = Office(
            config=config,
            physics=physics,
            folder=folder,
            seed=seed,
            delta_bytes=DELTA_BYTES,
            pace=pace,
            later=self._later,
        )
        self.ledger = Ledger()
        self.world = World(
            office=self.office,
            physics=physics,
            load=load,
            ledger=self.ledger,
            chance=chance,
            later=self._later,
            ahead=ahead,
        )
        replay_ms = Machine(card=AUDITOR, up=1000.0, down=1000.0).train_ms(load) + MINUTE_MS
        self._referees = Referees(
            self.office,
            count=auditors,
            replay_ms=replay_ms,
            seed=seed,
            shard_bytes=load.shard_bytes,
            meter=Meter(),
            later=self._later,
        )
        self._seed = seed
        self._devices = [self._device(member) for member in fleet_of(members, newcomers=NEWCOMERS, chance=chance)]

    def _device(self, member: Member) -> Device:
        office = self.office
        me = identity(
            member.name,
            member.name,
            seed=self._seed,
            config=office.config,
            run=office.desk.run,
            device_class=member.machine.card,
        )
        device = Device(member=member, me=me, world=self.world)
        if not member.newcomer:
            audited_ms = member.machine.train_ms(self.world.load)
            office.establish(me.session, record=RECORD, audited_ms=audited_ms)
            device.has(0)
        return device

    def _later(self, ms: int, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.office.clock.now_ms() + ms, next(self._order), act))

    def play(self, rounds: int) -> None:
        """Run until so many rounds are published."""
        self.office.open()
        for device in self._devices:
            device.begin()
        self._later(TICK_MS, self._tick)
        published = 0
        while published < rounds:
            at, _, act = heapq.heappop(self._events)
            self.office.clock.advance(at - self.office.clock.now_ms())
            act()
            self.office.turn()
            self._referees.send()
            self._wake()
            if self.office.published() > published:
                published = self.office.published()
                for device in self._devices:
                    device.look_ahead()
        for device in self._devices:
            device.close_books()

    def _wake(self) -> None:
        """Let those who wait for a unit ask, if there is one; the coordinator answers a waiting call then."""
        waiting = [device for device in self._devices if device.waits]
        current = self.office.store.latest_round() if waiting else None
        if current is None or not gives_units(current, self.office.config.rounds):
            return
        if self.office.store.next_open_unit(current.round) is not None:
            for device in waiting:
                device.wake()

    def _tick(self) -> None:
        for device in self._devices:
            device.tick()
        self.office.reveal()
        self._later(TICK_MS, self._tick)

    def account(self, card: str | None = None) -> Account:
        """Return where the time went, of one kind of card or of all."""
        return account(self.ledger, self.office.store, card)

    @property
    def hours(self) -> float:
        """Return how long the run has lasted."""
        return (self.office.clock.now_ms() - START_MS) / HOUR_MS

    def close(self) -> None:
        """Close the database."""
        self.office.store.close()
