"""What a volunteer can show for its work: of each finished unit what became of it, read from the signed papers on disk.

Reading changes nothing and takes no lock, so that it can be done beside a running worker. The papers were verified
before they were stored.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from protocol.canonical import parse_json
from protocol.documents import Claim, ClaimReceipt, D, Digest, Lease, RunId, Verdict, parse_payload
from protocol.envelope import parse_envelope
from protocol.errors import Refusal, UsageError
from protocol.layout import ROLE_DELTA
from protocol.limits import APPEAL_MS
from worker.spool import APPEALED, CLAIM, CLAIM_RECEIPT, LEASE, STATE, VERDICT

SHOWN_DIGITS: Final = 12
"""Digits of a unit's or claim's id that people are shown."""
LEAST_DIGITS: Final = 8
"""Digits of an id that a person must give at least."""
_AREAS: Final = ("pending", "settled", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of a unit, and what the coordinator signed about it. None where nothing was signed yet.

    Args:
        outcome: "refused" if the coordinator did not even take the claim or its bytes.
        weight: in units of 2^-24 of the merge.
        checkpoint: the one that holds the delta.
        audit_share: probability of an audit, in 2^-24, promised with the claim.
        delta: the delta's file, while it is kept.
        appeal_until_ms: until when a rejection can be appealed, UTC milliseconds.
        appealed: an appeal was sent. answered: a verdict has come since.
    """

    run: RunId
    unit: str
    round: int
    index: int
    claim: Digest
    outcome: Literal["accepted", "rejected", "waiting", "refused"]
    code: str
    sentence: str
    weight: int
    checkpoint: int | None
    epoch: int | None
    log_position: int | None
    audit_share: int | None
    secret_sha256: str | None
    delta: Path | None
    appeal_until_ms: int | None
    appealed: bool
    answered: bool
    directory: Path

    def line(self) -> str:
        """Return the receipt as a line for a person."""
        weight = f"{100 * self.weight / 2**24:.2f} %" if self.outcome == "accepted" else "-"
        checkpoint = "-" if self.checkpoint is None else str(self.checkpoint)
        unit, code = self.unit[:SHOWN_DIGITS], self.code or "-"
        place = f"{unit}  {self.round:>5}  {self.outcome:<8}  {code:<14}"
        appeal = " You appealed; a second referee's finding is awaited." if self.appealed and not self.answered else ""
        return f"{place}  {weight:>8}  {checkpoint:>10}  {self.sentence}{appeal}"

    def to_json(self) -> dict[str, Any]:
        """Return the receipt for programs."""
        paths = {"delta": None if self.delta is None else str(self.delta), "directory": str(self.directory)}
        return asdict(self) | paths


HEADING: Final = (
    f"{'unit':<{SHOWN_DIGITS}}  {'round':>5}  {'outcome':<8}  {'code':<14}  {'weight':>8}  {'checkpoint':>10}  why"
)


def runs_of(home: Path) -> tuple[RunId, ...]:
    """Return the runs that this home has worked for."""
    return tuple(RunId(path.name) for path in sorted((home / "spool").glob("*")) if path.is_dir())


def read_receipts(home: Path, run: RunId) -> tuple[Receipt, ...]:
    """Return a run's receipts in the order of its units; entries that are damaged or just moving are left out."""
    found: dict[str, Receipt] = {}
    for area in _AREAS:
        for directory in sorted((home / "spool" / run / area).glob("*")):
            with suppress(OSError, KeyError, Refusal):
                found[directory.name] = _read(run, area, directory)
    return tuple(sorted(found.values(), key=lambda receipt: (receipt.round, receipt.index, receipt.claim)))


def claim_receipts(home: Path, run: RunId) -> tuple[ClaimReceipt, ...]:
    """Return what the coordinator signed about this home's claims: epoch, place in the log, probability of an audit."""
    receipts = (_document(receipt.directory, CLAIM_RECEIPT, ClaimReceipt) for receipt in read_receipts(home, run))
    return tuple(receipt for receipt in receipts if receipt is not None)


def claim_of(receipt: Receipt) -> Claim | None:
    """Return the claim of a receipt."""
    return _document(receipt.directory, CLAIM, Claim)


def select(receipts: Sequence[Receipt], text: str) -> tuple[Receipt, ...]:
    """Return the receipts whose claim or unit begins with these hex digits.

    Raises:
        UsageError: too few digits to mean anything.
    """
    wanted = text.lower()
    if len(wanted) < LEAST_DIGITS or set(wanted) - set("0123456789abcdef"):
        raise UsageError(f"{text[:80]!r} is no unit or claim: give at least {LEAST_DIGITS} of its hex digits.")
    return tuple(r for r in receipts if r.claim.startswith(wanted) or r.unit.startswith(wanted))


def the_one(receipts: Iterable[Receipt], text: str) -> Receipt:
    """Return the only one of these receipts.

    Raises:
        UsageError: there is none, or more than one.
    """
    found = tuple(receipts)
    if len(found) == 1:
        return found[0]
    what = "No unit" if not found else f"{len(found)} units"
    raise UsageError(f"{what} of this home can be meant by {text[:80]!r}; `commonweight worker receipts` lists them.")


def _read(run: RunId, area: str, directory: Path) -> Receipt:
    lease, claim = _document(directory, LEASE, Lease), _document(directory, CLAIM, Claim)
    if lease is None or claim is None:
        raise FileNotFoundError(directory)
    promised = _document(directory, CLAIM_RECEIPT, ClaimReceipt)
    verdict = _document(directory, VERDICT, Verdict)
    state = parse_json((directory / STATE).read_bytes())
    refused = state if area == "refused" and isinstance(state, dict) else None
    delta = directory / f"{ROLE_DELTA}.safetensors.zst"
    rejected = verdict is not None and verdict.outcome == "rejected"
    given_ms = (directory / VERDICT).stat().st_mtime_ns // 1_000_000 if rejected else 0
    code, sentence = _words(verdict, refused, str(state.get("state")) if isinstance(state, dict) else "")
    return Receipt(
        run=run,
        unit=claim.unit,
        round=lease.round,
        index=lease.index,
        claim=Digest(directory.name),
        outcome="refused" if refused else "waiting" if verdict is None else verdict.outcome,
        code=code,
        sentence=sentence,
        weight=0 if verdict is None else verdict.weight,
        checkpoint=None if verdict is None else verdict.checkpoint,
        epoch=None if promised is None else promised.epoch,
        log_position=None if promised is None else promised.log_position,
        audit_share=None if promised is None else promised.audit_share,
        secret_sha256=None if promised is None else promised.secret_sha256,
        delta=delta if delta.exists() else None,
        appeal_until_ms=given_ms + APPEAL_MS if rejected else None,
        appealed=(directory / APPEALED).exists(),
        answered=verdict is not None and _is_older(directory / APPEALED, directory / VERDICT),
        directory=directory,
    )


def _is_older(one: Path, other: Path) -> bool:
    return one.exists() and one.stat().st_mtime_ns < other.stat().st_mtime_ns


_WAITING: Final = {
    "trained": "Trained; the coordinator has not heard of it yet.",
    "claimed": "Claimed; its sketch has not been sent yet.",
    "sketched": "Claimed; its bytes are on their way.",
    "kept": "A replica: its bytes are kept here until the verdict.",
    "received": "Delivered; the verdict is awaited.",
}


def _words(verdict: Verdict | None, refused: dict[str, Any] | None, state: str) -> tuple[str, str]:
    if verdict is not None:
        return verdict.code, verdict.sentence
    if refused is not None:
        return str(refused["code"]), str(refused["sentence"])
    return "", _WAITING.get(state, "On its way.")


def _document(directory: Path, name: str, kind: type[D]) -> D | None:
    try:
        raw = (directory / name).read_bytes()
    except FileNotFoundError:
        return None
    return parse_payload(kind, parse_envelope(raw).payload)
