"""Were audits drawn as promised? Anybody can tell from a run's public log alone, once an epoch's secret is revealed.

Before the first claim of an epoch the coordinator logs the SHA-256 of the epoch's secret, and with each claim the
probability of its audit. Which claims were drawn follows from the secret and the claims: the coordinator could choose
neither afterwards. So it can't spare a friend, nor haunt a stranger, without leaving a mark here.

Pure functions over log entries; reading the log and its signatures is somebody else's business.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from protocol.canonical import sha256_hex
from protocol.documents import ClaimReceipt, Digest, Training, Verification
from protocol.errors import LogDiffers
from protocol.log import LogEntry
from protocol.verdicts import VerdictCode
from verify.log_entries import (
    AuditOpened,
    Claimed,
    Delivered,
    EpochOpened,
    EpochRevealed,
    OpinionLogged,
    OwnerMoved,
    Replicated,
    VerdictLogged,
    parse_entry,
)
from verify.policy import audit_share, by_size, is_drawn, is_sampled

_BY_THE_DRAW: Final = frozenset({"drawn", "probation"})
"""Reasons of audits that only the draw may give; the other reasons come on top of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawReport:
    """A log that holds, in numbers.

    Args:
        epochs, revealed: epochs opened, and those whose secret is known.
        claims, delivered: claims logged, and those whose bytes came.
        drawn, audited: claims of revealed epochs that were drawn, and those of them that an audit confirmed or refuted.
        audits: audits opened, by reason.
        replicas, replays: units run again by other volunteers, and by auditors.
        refuted: claims that an auditor refuted.
        receipts, unlogged: own receipts that agree with the log, and those of claims that it does not reach yet.
    """

    epochs: int
    revealed: int
    claims: int
    delivered: int
    drawn: int
    audited: int
    audits: Mapping[str, int]
    replicas: int
    replays: int
    refuted: int
    receipts: int = 0
    unlogged: int = 0

    @property
    def overhead(self) -> float:
        """Units run again, per unit that was run for its own sake."""
        return (self.replicas + self.replays) / max(1, self.claims - self.replicas)


@dataclass(slots=True, kw_only=True)
class _Record:
    """What the log has said of a claim so far; places are positions in the log, 0 for not yet."""

    said: Claimed
    position: int
    delivered: int = 0
    audited: set[str] = field(default_factory=set)
    confirmed: int = 0
    refuted: int = 0
    judged: int = 0
    merged: int = 0
    agreed_audits: set[int] = field(default_factory=set)
    replayed: bool = False

    @property
    def name(self) -> str:
        return f"Claim {self.said.claim[:12]} (entry {self.position})"


@dataclass(slots=True, kw_only=True)
class _Member:
    """An owner's record as the log tells it; `credit` counts audits that may still be counted as passed."""

    established: bool = False
    valid_in_row: int = 0
    credit: int = 0


class DrawCheck:
    """Reads a log entry by entry and raises `LogDiffers` at the first that breaks the run's own rules.

    0 Every entry has the form of its kind. 1 An epoch is opened once, and its revealed secret is the one promised then.
    2 A claim belongs to the newest epoch, which is not revealed: no choice between two draws. 3 Its probability is what
    the policy gives to its owner's record and its unit's size, and that record follows from audits in the log. 4 Every
    drawn claim whose bytes came was audited, and judged before the secret was revealed; none was merged before an audit
    had confirmed it. 5 No claim was audited in the draw's name without being drawn. 6 Agreements that were drawn for it
    had a referee.
    """

    def __init__(self, verification: Verification, training: Training) -> None:
        self._rules = verification
        self._most = training.steps * training.batch
        self._sizes = {self._most} | ({training.short_steps * training.batch} if training.short_share else set())
        self._promised: dict[int, str] = {}
        self._secrets: dict[int, bytes] = {}
        self._claims: dict[Digest, _Record] = {}
        self._members: dict[str, _Member] = {}
        self._replicated: set[int] = set()
        self._replayed: set[tuple[int, str]] = set()
        self._reasons: Counter[str] = Counter()
        self._position = 0
        self._drawn = self._audited = 0

    def read(self, entry: LogEntry) -> None:
        """Take the next entry."""
        self._position = entry.position
        said = parse_entry(entry)  # 0
        match said:
            case EpochOpened():
                self._open(entry, said)
            case EpochRevealed():
                self._reveal(entry, said)
            case Claimed():
                self._claim(entry, said)
            case OwnerMoved():
                self._owner(entry, said)
            case None:
                return
            case _:
                self._about_claim(entry, said)

    def report(self) -> DrawReport:
        """Return the numbers of what was read."""
        return DrawReport(
            epochs=len(self._promised),
            revealed=len(self._secrets),
            claims=len(self._claims),
            delivered=sum(record.delivered > 0 for record in self._claims.values()),
            drawn=self._drawn,
            audited=self._audited,
            audits=dict(sorted(self._reasons.items())),
            replicas=len(self._replicated),
            replays=len(self._replayed),
            refuted=sum(record.refuted > 0 for record in self._claims.values()),
        )

    def check_receipt(self, receipt: ClaimReceipt) -> bool:
        """Compare a volunteer's own receipt with the log; return whether the log reaches as far.

        Raises:
            LogDiffers: the receipt promised something else.
        """
        record = self._claims.get(Digest(receipt.claim))
        name = f"Claim {receipt.claim[:12]}"
        promised = self._promised.get(receipt.epoch)
        if promised is not None and promised != receipt.secret_sha256:
            raise LogDiffers(f"{name}: its receipt names another secret of epoch {receipt.epoch} than the log.")
        if record is None:
            if self._position >= receipt.log_position:
                raise LogDiffers(f"{name} is not in the log, though its receipt says entry {receipt.log_position}.")
            return False
        said = record.said
        if (record.position, said.epoch, said.audit_share) != (
            receipt.log_position,
            receipt.epoch,
            receipt.audit_share,
        ):
            raise LogDiffers(f"{name} has another place, epoch or probability in the log than in its receipt.")
        secret = self._secrets.get(receipt.epoch)
        if secret is not None:
            seed = hmac.new(secret, bytes.fromhex(receipt.claim), hashlib.sha256).hexdigest()
            if seed != receipt.sketch_seed:
                raise LogDiffers(f"{name} was given a sketch seed that does not follow from its epoch's secret.")
        return True

    # --- epochs --------------------------------------------------------------------------------------------------

    def _open(self, entry: LogEntry, said: EpochOpened) -> None:
        if said.epoch in self._promised or said.epoch < max(self._promised, default=0):  # 1
            raise LogDiffers(f"Entry {entry.position} opens epoch {said.epoch} again, or out of order.")
        self._promised[said.epoch] = said.secret_sha256

    def _reveal(self, entry: LogEntry, said: EpochRevealed) -> None:
        secret = bytes.fromhex(said.secret)
        if said.epoch in self._secrets or said.epoch not in self._promised:
            raise LogDiffers(f"Entry {entry.position} reveals epoch {said.epoch}, which is not open.")
        if sha256_hex(secret) != self._promised[said.epoch]:  # 1
            raise LogDiffers(f"The secret of epoch {said.epoch} is not the one that was promised when it was opened.")
        self._secrets[said.epoch] = secret
        for record in self._claims.values():
            if record.said.epoch == said.epoch:
                self._check_drawn(record, secret)

    def _check_drawn(self, record: _Record, secret: bytes) -> None:
        claim, name = Digest(record.said.claim), record.name
        if not is_drawn(secret, claim, record.said.audit_share):
            if by_the_draw := record.audited & _BY_THE_DRAW:  # 5
                raise LogDiffers(f"{name} was audited as {min(by_the_draw)}, and the secret did not draw it.")
            return
        self._drawn += 1
        self._audited += record.confirmed > 0 or record.refuted > 0
        looked_at = record.audited or record.confirmed or record.refuted  # as the replica in another's audit, say
        if record.delivered and not looked_at and (not record.judged or record.merged):  # 4
            raise LogDiffers(f"{name} was drawn for an audit, and none was opened.")
        if record.delivered and not (record.confirmed or record.refuted or record.judged):
            raise LogDiffers(f"{name} was drawn for an audit, which had no end when the secret was revealed.")
        self._check_merged(record)
        # By whichever audit: a claim can have several, and one look at it answers for all.
        alone = record.agreed_audits and not record.replayed and (not record.judged or record.merged)
        if alone and is_sampled(secret, claim, self._rules.referee_share):  # 6
            raise LogDiffers(f"{name} agreed with its replica and was drawn for a referee, who never came.")

    def _check_merged(self, record: _Record) -> None:
        if record.merged and not 0 < record.confirmed < record.merged:
            raise LogDiffers(f"{record.name} was drawn for an audit, and merged before one had confirmed it.")

    # --- claims --------------------------------------------------------------------------------------------------

    def _claim(self, entry: LogEntry, said: Claimed) -> None:
        record = _Record(said=said, position=entry.position)
        if said.claim in self._claims:
            raise LogDiffers(f"{record.name} is logged twice.")
        if said.epoch != max(self._promised, default=-1):  # 2
            raise LogDiffers(f"{record.name} does not belong to the newest epoch.")
        if said.epoch in self._secrets:
            raise LogDiffers(f"{record.name} came when everybody knew the secret of epoch {said.epoch}.")
        if said.samples not in self._sizes:
            raise LogDiffers(f"{record.name} is for {said.samples} samples, as many as no unit of the run has.")
        member = self._member(said.member)
        share = by_size(
            audit_share(self._rules, established=member.established, valid_in_row=member.valid_in_row),
            samples=said.samples,
            most=self._most,
        )
        if said.audit_share != share:  # 3
            raise LogDiffers(
                f"{record.name} was given a probability of {said.audit_share} / 2^24; its owner's record gives {share}."
            )
        self._claims[Digest(said.claim)] = record

    def _about_claim(
        self,
        entry: LogEntry,
        said: Delivered | AuditOpened | Replicated | OpinionLogged | VerdictLogged,
    ) -> None:
        record = self._claims.get(Digest(said.claim))
        if record is None:
            raise LogDiffers(f"Entry {entry.position} ({entry.kind}) is about claim {said.claim[:12]}, not in the log.")
        match said:
            case Delivered():
                record.delivered = entry.position
            case AuditOpened():
                record.audited.add(said.reason)
                self._reasons[said.reason] += 1
            case Replicated():
                self._replica(entry, said, record)
            case OpinionLogged():
                self._opinion(entry, said, record)
            case VerdictLogged():
                self._verdict(entry, said, record)

    def _replica(self, entry: LogEntry, said: Replicated, record: _Record) -> None:
        other = self._claims.get(Digest(said.replica))
        if other is None:
            raise LogDiffers(f"Entry {entry.position}: the replica {said.replica[:12]} is not in the log.")
        self._replicated.add(said.audit)
        if entry.kind != "agreed":
            return
        record.agreed_audits.add(said.audit)
        # Agreement counts only with an established other owner: that of newcomers proves nothing.
        if other.said.member != record.said.member and self._member(other.said.member).established:
            record.confirmed = record.confirmed or entry.position
            self._member(record.said.member).credit += 1

    def _opinion(self, entry: LogEntry, said: OpinionLogged, record: _Record) -> None:
        self._replayed.add((said.audit, said.auditor))
        record.replayed = True
        if said.finding == "refuted":
            record.refuted = record.refuted or entry.position
            return
        record.confirmed = record.confirmed or entry.position
        self._member(record.said.member).credit += 1

    def _verdict(self, entry: LogEntry, said: VerdictLogged, record: _Record) -> None:
        record.judged = entry.position
        if said.code != VerdictCode.MERGED:
            return
        record.merged = entry.position
        secret = self._secrets.get(record.said.epoch)
        if secret is not None and is_drawn(secret, Digest(record.said.claim), record.said.audit_share):  # 4
            self._check_merged(record)

    # --- owners --------------------------------------------------------------------------------------------------

    def _member(self, member: str) -> _Member:
        return self._members.setdefault(member, _Member())

    def _owner(self, entry: LogEntry, said: OwnerMoved) -> None:
        """Check 3: nobody's record grows but by audits that the log shows."""
        member = self._member(said.member)
        name = f"Entry {entry.position}: owner {said.member[:12]}"
        expected = {
            "audit-passed": member.valid_in_row + 1,
            "audit-failed": 0,
            "cleared": 0,
        }.get(said.event, member.valid_in_row)
        if said.valid_in_row != expected:
            raise LogDiffers(f"{name} has {said.valid_in_row} audits in a row; the log makes it {expected}.")
        if said.event == "audit-passed":
            if not member.credit:
                raise LogDiffers(f"{name} passed an audit that the log does not show.")
            member.credit -= 1
        if said.event == "promoted" and said.valid_in_row < self._rules.probation:
            raise LogDiffers(f"{name} was promoted after {said.valid_in_row} audits, not {self._rules.probation}.")
        established = said.state == "established"
        if established and not (member.established or said.event == "promoted"):
            raise LogDiffers(f"{name} is established without having been promoted.")
        member.established, member.valid_in_row = established, said.valid_in_row


def check_draws(
    entries: Iterable[LogEntry],
    verification: Verification,
    training: Training,
    receipts: Iterable[ClaimReceipt] = (),
) -> DrawReport:
    """Read a whole log, and a volunteer's own receipts if given; return what it amounts to.

    Args:
        entries: from the first one on, already checked against the chain of heads.
        verification, training: the run's rules, and its units' sizes.
        receipts: the volunteer's own, verified.

    Raises:
        LogDiffers: the log breaks the run's rules, or a receipt promised something else; the sentence names the claim.
    """
    check = DrawCheck(verification, training)
    for entry in entries:
        check.read(entry)
    reached = [check.check_receipt(receipt) for receipt in receipts]
    return replace(check.report(), receipts=sum(reached), unlogged=len(reached) - sum(reached))
