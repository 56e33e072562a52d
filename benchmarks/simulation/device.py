"""One volunteer's machine in virtual time: it does what `worker` does, when `worker` would do it.

Lease, fetch, train and keep come one after another, as in `worker.producer`; uploads go on beside that, and so does
the look for the next checkpoint (`worker.fetching`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from benchmarks.simulation.ledger import Doing, Stretch
from benchmarks.simulation.machines import SNAPSHOT_BYTES, Leaving, Member
from benchmarks.simulation.people import Identity
from benchmarks.simulation.post import Post, World
from coordinator import leasing
from protocol.assignment import unit_steps
from protocol.documents import Lease, LeaseId, UnitId, parse_payload
from protocol.envelope import parse_envelope
from protocol.errors import Refusal
from protocol.limits import MINUTE_MS
from worker.fetching import AHEAD_SECONDS
from worker.stepwatch import JUST_BEGUN

BASES_KEPT: Final = 2
"""Checkpoints that fit into the worker's cache beside the shards, at its default of 20 GiB."""
WAITS: Final = (
    ("earlier units must be uploaded first", Doing.UPLOAD),
    ("all its units are given out", Doing.NO_UNIT),
    ("it is being merged", Doing.MERGING),
)
"""The coordinator's words when it has no unit, and what a machine waits for then."""


@dataclass(slots=True, kw_only=True)
class _Unit:
    """The unit in work. `replica`: it was leased for an audit. Trained from `begun_ms` on, for `train_ms`."""

    lease: Lease
    replica: bool
    begun_ms: int = 0
    train_ms: int = 0


@dataclass(slots=True, kw_only=True)
class Device:
    """A machine. Make it, and let it `begin`; from then on it goes and comes by its owner's habit."""

    member: Member
    me: Identity
    world: World
    _post: Post = field(init=False)
    _doing: Doing = Doing.AWAY
    _since_ms: int = 0
    _stay: int = 0
    _asking: int = 0
    _stopping: bool = False
    _unit: _Unit | None = None
    _bases: list[int] = field(default_factory=list)
    _shards: str = ""
    _ahead: int | None = None
    _ahead_ms: int = 0

    def __post_init__(self) -> None:
        self._post = Post(world=self.world, me=self.me, machine=self.member.machine, sent=self._sent)

    def _then(self, ms: int, act: Callable[[], None]) -> None:
        """Do something later, if the machine is there without a break until then."""
        stay = self._stay

        def do() -> None:
            if stay == self._stay:
                act()

        self.world.later(ms, do)

    def _enter(self, doing: Doing) -> None:
        now = self.world.now_ms()
        self.world.ledger.spend(self.member.name, self.member.machine.card, self._doing, now - self._since_ms)
        self._doing, self._since_ms = doing, now

    def close_books(self) -> None:
        """Bring the ledger up to the present."""
        self._enter(self._doing)

    # --- coming and going ------------------------------------------------------------------------------------

    def has(self, checkpoint: int) -> None:
        """Let it have a checkpoint from before the simulation began."""
        self._bases = [checkpoint]

    def begin(self) -> None:
        """Come for the first time, when it is due."""
        self._since_ms = self.world.now_ms()
        self._then(self.member.joins_ms, self._come)

    def _come(self) -> None:
        """Start the worker, and draw when and how it will be stopped."""
        chance = self.world.chance
        self._stopping = False
        self._enter(Doing.STARTING)
        self._then(self.world.load.start_ms, self._ask)
        self._post.open()
        (how,) = chance.choices((Leaving.OFF, Leaving.NOW, Leaving.SOON), (2, 1, 1))
        self._then(self.member.habit.there(chance), partial(self._leave, how))

    def _leave(self, how: Leaving) -> None:
        if how is Leaving.OFF:
            self._break_off(hands_back=False)
            self._go()
        elif how is Leaving.NOW:
            self._break_off(hands_back=True)
            self._go()
        elif self._is_well_on():
            self._stopping = True
        else:
            self._break_off(hands_back=True)
            self._deliver_and_go()

    def _is_well_on(self) -> bool:
        """Say whether the unit in work is finished before the machine goes; see `worker.stepwatch`."""
        unit = self._unit
        if unit is None or not unit.begun_ms:
            return False
        return (self.world.now_ms() - unit.begun_ms) * JUST_BEGUN >= unit.train_ms

    def _break_off(self, *, hands_back: bool) -> None:
        unit, self._unit = self._unit, None
        if unit is None:
            return
        if self._doing is Doing.TRAINING:
            self._note(unit, finished=False)
        if hands_back:
            self._hand_back(unit)

    def _hand_back(self, unit: _Unit) -> None:
        self.world.decide(partial(leasing.hand_back, session=self.me.session, lease=unit.lease.lease))

    def _deliver_and_go(self) -> None:
        """Send what is finished; meanwhile the machine lends no computing any more."""
        self._stopping = True
        self._enter(Doing.AWAY)
        self._stay += 1
        self._ahead = None
        self._sent()

    def _go(self) -> None:
        self._post.close()
        self._enter(Doing.AWAY)
        self._stay += 1
        self._ahead = None
        self._then(self.member.habit.away(self.world.chance), self._come)

    def _sent(self) -> None:
        """An upload has ended, or there is none."""
        if self._stopping and self._doing is Doing.AWAY and self._post.is_empty:
            self._stopping = False
            self._go()
        elif self._doing is Doing.UPLOAD:
            self._ask()

    # --- a unit ----------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        if self._stopping:
            self._deliver_and_go()
            return
        self._asking += 1
        answer = self.world.decide(
            partial(leasing.lease_unit, session=self.me.session, random_bytes=self.world.chance.randbytes)
        )
        if isinstance(answer, leasing.NoWork):
            self._enter(next((doing for words, doing in WAITS if words in answer.reason), Doing.LIMITED))
            # An open unit ends the wait (see `Fleet`); what is offered as time goes by, like replicas, does not.
            self._then(MINUTE_MS, partial(self._ask_again, self._asking))
            return
        lease = parse_payload(Lease, parse_envelope(answer.envelope).payload)
        audits = self.world.office.store.audits_of_replica(LeaseId(lease.lease))
        self._unit = _Unit(lease=lease, replica=bool(audits))
        self._fetch_base(lease.round - 1)

    def _ask_again(self, asking: int) -> None:
        if asking == self._asking and self._unit is None:
            self._ask()

    @property
    def waits(self) -> bool:
        """Whether it waits for a unit."""
        return self._doing in (Doing.NO_UNIT, Doing.MERGING)

    def wake(self) -> None:
        """Ask again if it waits for a unit, since there may be one now."""
        if self.waits:
            self._ask()

    def _fetch_base(self, base: int) -> None:
        self._enter(Doing.BASE)
        # One fetch at a time: what is being fetched ahead comes first, and is most likely this very checkpoint.
        wait_ms = 0 if self._ahead is None else max(0, self._ahead_ms - self.world.now_ms())
        cost_ms = 0 if base == self._ahead else self._fetch_ms(self._base_bytes(base))
        self._then(wait_ms + cost_ms, partial(self._has_base, base))

    def _base_bytes(self, base: int) -> int:
        if base in self._bases:
            return 0
        patches = min((base - held for held in self._bases if held < base), default=None)
        return SNAPSHOT_BYTES if patches is None else min(patches * self.world.load.patch_bytes, SNAPSHOT_BYTES)

    def _fetch_ms(self, count: int) -> int:
        self.world.ledger.down_bytes += count
        return self.member.machine.down_ms(count)

    def _keep_base(self, base: int) -> None:
        self._bases = [*(held for held in self._bases if held != base), base][-BASES_KEPT:]

    def _has_base(self, base: int) -> None:
        self._keep_base(base)
        self._enter(Doing.SHARDS)
        unit = self._unit
        assert unit is not None
        missing = 0 if self._shards == unit.lease.unit else self.world.load.shard_bytes
        self._shards = unit.lease.unit
        self._then(self._fetch_ms(missing), self._load)

    def _load(self) -> None:
        self._enter(Doing.CHANGING)
        self._then(self.world.load.before_ms, self._train)

    def _train(self) -> None:
        unit, chance = self._unit, self.world.chance
        assert unit is not None
        self._enter(Doing.TRAINING)
        unit.begun_ms = self.world.now_ms()
        unit.train_ms = round(
            self.member.machine.train_ms(self.world.load) * self._part(unit) * chance.uniform(0.95, 1.05)
        )
        self._then(unit.train_ms, self._trained)
        self.look_ahead()

    def _trained(self) -> None:
        assert self._unit is not None
        self._note(self._unit, finished=True)
        self._enter(Doing.CHANGING)
        self._then(self.world.load.after_ms, self._claim)

    def _part(self, unit: _Unit) -> float:
        """Return a unit's size as a share of a long one's."""
        config = self.world.office.config
        return unit_steps(config, UnitId(unit.lease.unit)) / config.training.steps

    def _note(self, unit: _Unit, *, finished: bool) -> None:
        self.world.ledger.stretches.append(
            Stretch(
                lease=LeaseId(unit.lease.lease),
                card=self.member.machine.card,
                ms=self.world.now_ms() - unit.begun_ms,
                finished=finished,
                replica=unit.replica,
                size=round(1000 * self._part(unit)),
            )
        )

    def _claim(self) -> None:
        unit, self._unit = self._unit, None
        assert unit is not None
        try:
            self._post.hand_in(unit.lease)
        except Refusal as refusal:
            self.world.ledger.refused[LeaseId(unit.lease.lease)] = refusal.code
            # Else the coordinator would lease the same unit again, until its lease ends.
            self._hand_back(unit)
        self._ask()

    def tick(self) -> None:
        """Do what a worker does now and then: ask about the replicas that it keeps."""
        self._post.ask_about_kept()

    # --- the next checkpoint ---------------------------------------------------------------------------------

    def look_ahead(self) -> None:
        """While a unit trains, see within a while whether there is a newer checkpoint than its own, and fetch it."""
        if self.world.ahead and self._doing is Doing.TRAINING:
            self._then(round(1000 * AHEAD_SECONDS * self.world.chance.random()), self._fetch_ahead)

    def _fetch_ahead(self) -> None:
        newest = self.world.office.published()
        if self._doing is Doing.TRAINING and self._ahead is None and newest not in self._bases:
            cost_ms = self._fetch_ms(self._base_bytes(newest))
            self._ahead, self._ahead_ms = newest, self.world.now_ms() + cost_ms
            self._then(cost_ms, partial(self._has_ahead, newest))

    def _has_ahead(self, checkpoint: int) -> None:
        self._keep_base(checkpoint)
        self._ahead = None
