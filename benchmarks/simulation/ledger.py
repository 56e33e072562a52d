"""Where the time of a simulated fleet goes: what each machine does while it is there, and what became of its work."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import Enum, unique

from benchmarks.simulation.machines import TFLOPS
from coordinator.store import Store
from coordinator.units import Attempt
from protocol.documents import LeaseId, Verdict, parse_payload
from protocol.envelope import parse_envelope
from protocol.limits import HOUR_MS
from protocol.verdicts import VerdictCode


@unique
class Doing(Enum):
    """What a machine does; all but AWAY is time in which it is there and willing."""

    AWAY = "away"
    TRAINING = "training"
    STARTING = "starting"  # the worker starts and checks its files
    BASE = "base"  # waits for the checkpoint that its unit starts from
    SHARDS = "shards"  # waits for its unit's shards
    CHANGING = "changing"  # the base is put on the card, or the delta coded and written
    NO_UNIT = "no unit"  # all units are given out
    MERGING = "merging"  # nothing is given out while the round is merged
    UPLOAD = "upload"  # earlier units must be uploaded first
    LIMITED = "limited"  # another of the coordinator's limits


@unique
class Fate(Enum):
    """What became of a stretch of training."""

    MERGED = "merged"
    REPLICA = "replica"  # it was leased to check another's work, and did
    REPEATED = "repeated"  # somebody else's result was there first; credited
    LEFT = "left"  # its machine left before the unit was finished
    UNDER_WAY = "under way"  # not yet judged when the simulation ended
    THROWN_AWAY = "thrown away"  # finished, and refused, rejected, or too late for every merge


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A unit's training on one machine.

    `replica`: it was leased for an audit. `size`: in thousandths of a long unit.
    """

    lease: LeaseId
    card: str
    ms: int
    finished: bool
    replica: bool
    size: int


@dataclass(slots=True)
class Ledger:
    """Time by machine and by doing, in milliseconds; stretches of training; codes of refusals; bytes fetched."""

    spent: dict[str, Counter[Doing]] = field(default_factory=lambda: defaultdict(Counter))
    cards: dict[str, str] = field(default_factory=dict)
    stretches: list[Stretch] = field(default_factory=list)
    refused: dict[LeaseId, str] = field(default_factory=dict)
    down_bytes: int = 0

    def spend(self, name: str, card: str, doing: Doing, ms: int) -> None:
        """Note how long a machine did something."""
        self.cards[name] = card
        if doing is not Doing.AWAY:
            self.spent[name][doing] += ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Machines' time, in milliseconds, and what came of it. Accounts of several seeds can be added up.

    `powered`: time by doing, each machine's counted as often as its card is faster than 1 TFLOPS. `late`: merged
    work by the rounds that it was late, in thousandths of a long unit. `codes`: of what was thrown away.
    """

    spent: Counter[Doing]
    powered: Counter[Doing]
    fates: Counter[Fate]
    late: Counter[int]
    codes: Counter[str]
    units: int
    thrown_away: int

    def __add__(self, other: "Account") -> "Account":
        return Account(
            spent=self.spent + other.spent,
            powered=self.powered + other.powered,
            fates=self.fates + other.fates,
            late=self.late + other.late,
            codes=self.codes + other.codes,
            units=self.units + other.units,
            thrown_away=self.thrown_away + other.thrown_away,
        )

    @property
    def hours(self) -> float:
        """Return for how long machines were there and willing."""
        return self.spent.total() / HOUR_MS

    @property
    def power(self) -> float:
        """Return the share of the machines' computing power that trained."""
        return self.powered[Doing.TRAINING] / self.powered.total()

    def share(self, *doings: Doing) -> float:
        """Return the share of that time in which they did one of these."""
        return sum(self.spent[doing] for doing in doings) / self.spent.total()

    def training(self, *fates: Fate) -> float:
        """Return the share of the training time that had one of these fates."""
        return sum(self.fates[fate] for fate in fates) / self.fates.total()

    def late_share(self, least: int, most: int | None = None) -> float:
        """Return the share of merged work that was from `least` to `most` rounds late."""
        found = sum(count for late, count in self.late.items() if late >= least and (most is None or late <= most))
        return found / self.late.total()


def account(ledger: Ledger, store: Store, card: str | None = None) -> Account:
    """Return what a ledger comes to, with what the store says of each stretch; of one kind of card, or of all."""
    spent, powered = Counter[Doing](), Counter[Doing]()
    for name, of_machine in ledger.spent.items():
        if card in (None, ledger.cards[name]):
            spent.update(of_machine)
            speed = round(TFLOPS[ledger.cards[name]])
            powered.update({doing: speed * ms for doing, ms in of_machine.items()})
    fates, late, codes = Counter[Fate](), Counter[int](), Counter[str]()
    stretches = [stretch for stretch in ledger.stretches if card in (None, stretch.card)]
    for stretch in stretches:
        attempt = store.attempt(stretch.lease)
        assert attempt is not None
        fate, code = _fate(stretch, attempt, ledger.refused.get(stretch.lease))
        fates[fate] += stretch.ms
        if fate is Fate.MERGED:
            late[attempt.late] += stretch.size
        if fate is Fate.THROWN_AWAY:
            codes[code] += 1
    return Account(
        spent=spent,
        powered=powered,
        fates=fates,
        late=late,
        codes=codes,
        units=sum(stretch.finished for stretch in stretches),
        thrown_away=codes.total(),
    )


def _fate(stretch: Stretch, attempt: Attempt, refused: str | None) -> tuple[Fate, str]:
    if refused is not None:
        return Fate.THROWN_AWAY, refused
    if not stretch.finished or attempt.claim_sha256 is None:
        return Fate.LEFT, ""
    if attempt.verdict_envelope is None:
        return Fate.UNDER_WAY, ""
    verdict = parse_payload(Verdict, parse_envelope(attempt.verdict_envelope).payload)
    if verdict.code == VerdictCode.MERGED:
        return Fate.MERGED, verdict.code
    if verdict.code == VerdictCode.REPLICA:
        return (Fate.REPLICA if stretch.replica else Fate.REPEATED), verdict.code
    return Fate.THROWN_AWAY, verdict.code
