"""What an auditor tells, beside what a worker tells too.

Those are `connected`, `ready`, `loading`, `planned`, `downloaded`, `step`, `waiting`, `stopping` and `failed`.

`--json` writes one object a line, as `worker.progress` describes; these are the auditor's own events.

    audit          round, index, unit, claims, remaining_seconds
                   claims of one unit are to be judged, by training the unit again; claims: their digests
    opinion        claim, unit, finding, raw_difference, code_difference, trail_agrees, seconds
                   a signed opinion is recorded by the coordinator; finding: "confirmed" or "refuted"; seconds: of
                   running the unit again
    audit_dropped  round, index, unit, code, reason
                   an audit was left without an opinion; the coordinator gives it out again
    audits_done    reason, audits, confirmed, refuted, dropped, bytes_down, seconds
                   the last event of an auditor that ends well
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from protocol.printing import counted
from worker.progress import Event, readable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditTaken:
    """Claims of one unit are to be judged."""

    NAME: ClassVar[str] = "audit"
    round: int
    index: int
    unit: str
    claims: tuple[str, ...]
    remaining_seconds: float

    def line(self) -> str:
        """Return the event as a sentence."""
        claims = "a claim" if len(self.claims) == 1 else f"{len(self.claims)} claims"
        return f"Round {self.round}, unit {self.index}: to judge {claims}."


@dataclass(frozen=True, slots=True, kw_only=True)
class OpinionGiven:
    """A signed opinion is recorded by the coordinator."""

    NAME: ClassVar[str] = "opinion"
    claim: str
    unit: str
    finding: str
    raw_difference: float
    code_difference: float
    trail_agrees: bool
    seconds: float

    def line(self) -> str:
        """Return the event as a sentence."""
        return (
            f"Claim {self.claim[:12]} of unit {self.unit[:12]} is {self.finding}: "
            f"raw difference {self.raw_difference:.2g}, code difference {self.code_difference:.2g}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditDropped:
    """An audit was left without an opinion."""

    NAME: ClassVar[str] = "audit_dropped"
    round: int
    index: int
    unit: str
    code: str
    reason: str

    def line(self) -> str:
        """Return the event as a sentence."""
        code = f" [{self.code}]" if self.code else ""
        return f"The audit of unit {self.index} of round {self.round} was dropped: {self.reason}{code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditsDone:
    """The auditor ends well."""

    NAME: ClassVar[str] = "audits_done"
    reason: str
    audits: int
    confirmed: int
    refuted: int
    dropped: int
    bytes_down: int
    seconds: float

    def line(self) -> str:
        """Return the event as a sentence."""
        return (
            f"{self.reason} {counted(self.audits, 'audit')}: {counted(self.confirmed, 'claim')} confirmed, "
            f"{self.refuted} refuted; {counted(self.dropped, 'audit')} dropped, {readable_bytes(self.bytes_down)} down."
        )


AUDIT_EVENTS: Final[tuple[type[Event], ...]] = (AuditTaken, OpinionGiven, AuditDropped, AuditsDone)
"""Every event of this file, in the order of the table above."""
