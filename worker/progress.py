"""What a worker tells: events as frozen values. `worker.reporters` shows them.

`--json` writes one object a line to standard output: `{"event": NAME, ...}` with the fields below. Digests and ids are
hex; times are seconds; every text is for a person. Other fields may be added; what is here stays.

    connected    run, name, host, device, device_class, trainer_version, public_url, waiting_units
                 the coordinator proved to speak for the run and opened a session; waiting_units: finished units on disk
    ready        device, threads, repeatable, reason, seconds
                 torch is loaded, the self-test passed, precision is set
    loading      networks, folder
                 the run's text encoders are being loaded, which may take minutes; networks: their names
    planned      parts, checkpointing, keeping, device_bytes, host_bytes, sentence
                 how units will be trained in the memory that is free; keeping: "whole", "narrow" or "host", where
                 weights, gradients and moments are; bytes: that a unit takes, counted beforehand
    lease        lease, unit, round, index, steps, base_checkpoint, remaining_seconds
                 a unit was leased (the same one again after a crash)
    downloaded   file, bytes, seconds
                 a public file came over the network; bytes: without what an earlier attempt had brought
    takedowns    round, pictures, new
                 the run's list of pictures taken down has grown; round: the one from whose units on they are left out
    step         unit, round, step, steps, loss
                 a training step; at most two a second, and the last one of every unit
    trained      unit, round, loss, samples, seconds, bytes
                 a unit is finished and safe on the disk; bytes: of its delta
    claimed      claim, unit
                 the signed receipt of the claim is here
    sending      claim, unit, sent, size
                 an upload is under way; at most two a second
    uploaded     claim, unit, bytes, seconds
                 the signed receipt of the bytes is here; bytes: sent in the stretch that ended with it
    verdict      claim, unit, round, index, outcome, code, sentence, weight, checkpoint
                 the signed verdict is here; round and index: of the unit, or null; outcome: "accepted" or "rejected";
                 weight: in units of 2^-24; checkpoint: the number of the one that holds the delta, or null
    waiting      reason, code, seconds, part
                 this part of the work rests for so long (0: until something else happens); code: of an error, or "";
                 part: "files" if a leased unit waits for its files, or ""
    handed_back  unit, round, reason
                 a unit was given up, and its lease handed back if the coordinator could be reached
    refused      claim, unit, code, sentence
                 the coordinator refused a finished unit for good; it is kept in spool/RUN/refused
    stopping     reason
                 somebody asked the worker to stop; what happens before it does
    finished     reason, units, accepted, rejected, refused, waiting_units, bytes_up, bytes_down, seconds
                 the last event of a worker that ends well; all numbers but waiting_units are of this process: accepted
                 and rejected are verdicts that came to it, also on units that were trained before
    failed       code, sentence
                 the last event of a worker that can't go on; the exit status is not 0
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from protocol.printing import counted

STEP_EVENTS_EVERY_SECONDS: Final = 0.5
FILES: Final = "files"
"""The part of the work that waits: a leased unit, for its files."""

_CHECKPOINT_FILE: Final = re.compile(r"checkpoints/(\d+)/.+")


class Event(Protocol):
    """Something that happened."""

    NAME: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def line(self) -> str:
        """Return the event as a sentence for a person."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The coordinator proved to speak for the run and opened a session."""

    NAME: ClassVar[str] = "connected"
    run: str
    name: str
    host: str
    device: str
    device_class: str
    trainer_version: str
    public_url: str
    waiting_units: int

    def line(self) -> str:
        """Return the event as a sentence."""
        spool = f" {_waiting(self.waiting_units)} on this disk." if self.waiting_units else ""
        return f'Connected to run "{self.name}" ({self.run[:12]}) at {self.host} as device {self.device[:12]}.{spool}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """This machine is ready to train."""

    NAME: ClassVar[str] = "ready"
    device: str
    threads: int
    repeatable: bool
    reason: str
    seconds: float

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Ready to train on {self.device} with {counted(self.threads, 'CPU thread')}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """The run's text encoders are being loaded."""

    NAME: ClassVar[str] = "loading"
    networks: tuple[str, ...]
    folder: str

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Loading {', '.join(self.networks)} from {self.folder}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """How units will be trained in the memory that is free."""

    NAME: ClassVar[str] = "planned"
    parts: int
    checkpointing: bool
    keeping: str
    device_bytes: int
    host_bytes: int
    sentence: str

    def line(self) -> str:
        """Return the event as a sentence."""
        return self.sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A unit was leased."""

    NAME: ClassVar[str] = "lease"
    lease: str
    unit: str
    round: int
    index: int
    steps: int
    base_checkpoint: int
    remaining_seconds: float

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Round {self.round}, unit {self.index}: {self.steps} steps from checkpoint {self.base_checkpoint}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """A public file came over the network."""

    NAME: ClassVar[str] = "downloaded"
    file: str
    bytes: int
    seconds: float

    def line(self) -> str:
        """Return the event as a sentence."""
        size, time = readable_bytes(self.bytes), f"in {self.seconds:.1f} s"
        if checkpoint := _CHECKPOINT_FILE.fullmatch(self.file):
            return f"Fetched the weights of checkpoint {int(checkpoint[1])}: {size} {time}."
        return f"Fetched a shard of {size} {time}."


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenDown:
    """Pictures were taken down, and units leave them out."""

    NAME: ClassVar[str] = "takedowns"
    round: int
    pictures: int
    new: int

    def line(self) -> str:
        """Return the event as a sentence."""
        count = "1 picture is" if self.pictures == 1 else f"{self.pictures:,} pictures are"
        return f"{count} taken down ({self.new:,} new): units of round {self.round} and later do not train on them."


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A training step."""

    NAME: ClassVar[str] = "step"
    unit: str
    round: int
    step: int
    steps: int
    loss: float

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Step {self.step} of {self.steps}, loss {self.loss:.4f}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A unit is finished and safe on the disk."""

    NAME: ClassVar[str] = "trained"
    unit: str
    round: int
    loss: float
    samples: int
    seconds: float
    bytes: int

    def line(self) -> str:
        """Return the event as a sentence."""
        return (
            f"Trained {self.samples} samples in {self.seconds:.1f} s, last loss {self.loss:.4f}; "
            f"the delta of {readable_bytes(self.bytes)} is safe on disk."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """The receipt of a claim is here."""

    NAME: ClassVar[str] = "claimed"
    claim: str
    unit: str

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Unit {self.unit[:12]} is claimed; the receipt is here."


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """An upload is under way."""

    NAME: ClassVar[str] = "sending"
    claim: str
    unit: str
    sent: int
    size: int

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Sent {readable_bytes(self.sent)} of {readable_bytes(self.size)} of unit {self.unit[:12]}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """The receipt of a claim's bytes is here."""

    NAME: ClassVar[str] = "uploaded"
    claim: str
    unit: str
    bytes: int
    seconds: float

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Unit {self.unit[:12]} is delivered: {readable_bytes(self.bytes)} in {self.seconds:.1f} s."


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictCame:
    """The verdict on a claim is here."""

    NAME: ClassVar[str] = "verdict"
    claim: str
    unit: str
    round: int | None
    index: int | None
    outcome: str
    code: str
    sentence: str
    weight: int
    checkpoint: int | None

    def line(self) -> str:
        """Return the event as a sentence."""
        unit = f"Round {self.round}, unit {self.index} ({self.unit[:12]})"
        if self.round is None:
            unit = f"Unit {self.unit[:12]}"
        return f"{unit} was {self.outcome}: {self.sentence} [{self.code}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Nothing goes on for a while."""

    NAME: ClassVar[str] = "waiting"
    reason: str
    code: str
    seconds: float
    part: str = ""

    def line(self) -> str:
        """Return the event as a sentence."""
        code = f" [{self.code}]" if self.code else ""
        time = f"{math.ceil(self.seconds)} s" if self.seconds else ""
        if self.part == FILES:
            return f"Waiting for files{f', next try in {time}' if time else ''}: {self.reason}{code}"
        return f"Waiting{f' {time}' if time else ''}: {self.reason}{code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedBack:
    """A unit was given up."""

    NAME: ClassVar[str] = "handed_back"
    unit: str
    round: int
    reason: str

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"The unit of round {self.round} was handed back: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A finished unit was refused for good."""

    NAME: ClassVar[str] = "refused"
    claim: str
    unit: str
    code: str
    sentence: str

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Unit {self.unit[:12]} was refused: {self.sentence} [{self.code}] It is kept in spool/refused."


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """Somebody asked the worker to stop."""

    NAME: ClassVar[str] = "stopping"
    reason: str

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Stopping: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The worker ends well."""

    NAME: ClassVar[str] = "finished"
    reason: str
    units: int
    accepted: int
    rejected: int
    refused: int
    waiting_units: int
    bytes_up: int
    bytes_down: int
    seconds: float

    def line(self) -> str:
        """Return the event as a sentence."""
        spool = (
            f" {_waiting(self.waiting_units)} on this disk, to be sent at the next start." if self.waiting_units else ""
        )
        verdicts = counted(self.accepted + self.rejected, "verdict")
        told = f" ({self.accepted} accepted, {self.rejected} rejected)" if self.accepted + self.rejected else ""
        return (
            f"{self.reason} {counted(self.units, 'unit')} trained, {verdicts} heard{told}, "
            f"{readable_bytes(self.bytes_up)} up, {readable_bytes(self.bytes_down)} down.{spool}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The worker can't go on."""

    NAME: ClassVar[str] = "failed"
    code: str
    sentence: str

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"The worker can't go on: {self.sentence} [{self.code}]"


EVENTS: Final[tuple[type[Event], ...]] = (
    Connected, Ready, Loading, Planned, Leased, Downloaded, TakenDown, Step, Trained, Claimed, Sending, Uploaded,
    VerdictCame, Waiting, HandedBack, Refused, Stopping, Finished, Failed,
)  # fmt: skip
"""Every event, in the order of the table above."""


def to_json(event: Event) -> dict[str, Any]:
    """Return the object that `--json` writes."""
    return {"event": event.NAME, **dataclasses.asdict(event)}


def _waiting(units: int) -> str:
    return f"{counted(units, 'finished unit')} {'waits' if units == 1 else 'wait'}"


def readable_bytes(count: int) -> str:
    """Return a size for a person."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
