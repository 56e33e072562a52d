"""Finding what a verdict was about: a unit of a run, and the delta that was claimed for it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol import layout
from protocol.assignment import unit_id
from protocol.documents import Artifact, Digest, MergeEntry, RunConfig, UnitId, UnmergeEntry
from protocol.errors import DigestMismatch, UsageError
from protocol.trust import RunTrust
from worker.cache import Wanted
from worker.public_files import PublicFiles, newest_checkpoint, read_manifest
from worker.receipts import LEAST_DIGITS, Receipt, claim_of
from worker.referee import artifact_of
from worker.trainer import file_is

_PLACE: Final = re.compile(r"(\d{1,9})/(\d{1,9})")
_DIGITS: Final = re.compile(rf"[0-9a-f]{{{LEAST_DIGITS},64}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlace:
    """A unit of a run."""

    unit: UnitId
    round: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A delta that was claimed for a unit: its file, what was claimed of it, and where it comes from.

    `trail_root` is None where no claim is at hand.
    """

    path: Path
    claimed: Artifact
    trail_root: str | None
    source: str


def find_unit(text: str, receipts: Sequence[Receipt], trust: RunTrust, rounds: int) -> UnitPlace:
    """Return the unit that a person means by ROUND/INDEX, by the first digits of its id, or of an own claim's.

    Args:
        receipts: the person's own, of this run.
        rounds: rounds to look through.

    Raises:
        UsageError: it is none of them, or the run has no such unit.
    """
    config, config_sha256 = trust.config, trust.config_sha256
    if place := _PLACE.fullmatch(text):
        round_number, index = int(place[1]), int(place[2])
        if not (1 <= round_number <= config.rounds.planned and index < config.rounds.units):
            raise UsageError(
                f"The run has no unit {text}: {config.rounds.planned} rounds, counted from 1, of {config.rounds.units} "
                "units, counted from 0."
            )
        return UnitPlace(unit=unit_id(config_sha256, round_number, index), round=round_number, index=index)
    wanted = text.lower()
    if not _DIGITS.fullmatch(wanted):
        raise UsageError(f"{text[:80]!r} is neither ROUND/INDEX nor {LEAST_DIGITS} or more hex digits of a unit.")
    for receipt in receipts:
        if receipt.unit.startswith(wanted) or receipt.claim.startswith(wanted):
            return UnitPlace(unit=UnitId(receipt.unit), round=receipt.round, index=receipt.index)
    for round_number in range(1, min(rounds, config.rounds.planned) + 1):
        for index in range(config.rounds.units):
            if (unit := unit_id(config_sha256, round_number, index)).startswith(wanted):
                return UnitPlace(unit=unit, round=round_number, index=index)
    raise UsageError(f"The run has no unit {text[:80]} in its first {rounds} rounds.")


def own_evidence(place: UnitPlace, receipts: Sequence[Receipt]) -> Evidence | None:
    """Return the delta that this person claimed for the unit, if it is kept; a rejected one before any other."""
    mine = [receipt for receipt in receipts if receipt.unit == place.unit and receipt.delta is not None]
    for receipt in sorted(mine, key=lambda receipt: receipt.outcome != "rejected"):
        claim = claim_of(receipt)
        if claim is not None and receipt.delta is not None:
            return Evidence(
                path=receipt.delta,
                claimed=claim.artifacts[0],
                trail_root=claim.trail_root,
                source=f"own claim {receipt.claim[:12]}, {receipt.outcome} {receipt.code}".rstrip(),
            )
    return None


def public_evidence(place: UnitPlace, files: PublicFiles, trust: RunTrust) -> Evidence | None:
    """Return the delta that was merged for the unit, from the run's public files; None if none was."""
    for checkpoint in range(place.round, newest_checkpoint(files, trust) + 1):
        manifest = read_manifest(files, trust, checkpoint)
        entries: tuple[MergeEntry | UnmergeEntry, ...] = (*manifest.merged, *manifest.unmerged)
        for entry in entries:
            if entry.unit == place.unit:
                return _published(entry, files, checkpoint)
    return None


def given_evidence(place: UnitPlace, path: Path, config: RunConfig, own: Evidence | None) -> Evidence:
    """Return a file that a person gave, as what it says of itself; with the trail of the own claim if it is that.

    Raises:
        UsageError: there is no such file.
        BytesRefused: it is no delta of this unit.
    """
    if not path.is_file():
        raise UsageError(f"There is no file {path}.")
    claimed = artifact_of(path, config, place.unit)
    mine = own is not None and own.claimed == claimed
    return Evidence(path=path, claimed=claimed, trail_root=own.trail_root if own and mine else None, source=str(path))


def missing_own(place: UnitPlace, receipts: Sequence[Receipt], evidence: Evidence) -> tuple[str, ...]:
    """Return a sentence for each own claim on the unit that the evidence is not about, lest they be confused."""
    return tuple(
        f"       NOT your own claim {receipt.claim[:12]}, {receipt.outcome}: its delta is not kept here any more"
        for receipt in receipts
        if receipt.unit == place.unit and receipt.delta is None and receipt.claim[:12] not in evidence.source
    )


def check_evidence(evidence: Evidence) -> None:
    """Raise `DigestMismatch` if a file is not what was claimed any more: then it says nothing about the claim."""
    if not file_is(evidence.path, evidence.claimed):
        raise DigestMismatch(f"{evidence.path} is not what was claimed any more; the disk has changed it.")


def _published(entry: MergeEntry | UnmergeEntry, files: PublicFiles, checkpoint: int) -> Evidence:
    wanted = Wanted(path=layout.delta_path(entry.blob_sha256), sha256=Digest(entry.blob_sha256), size=entry.size)
    artifact = Artifact(
        role=layout.ROLE_DELTA,
        content_sha256=entry.content_sha256,
        blob_sha256=entry.blob_sha256,
        size=entry.size,
    )
    return Evidence(
        path=files.file(wanted),
        claimed=artifact,
        trail_root=None,
        source=f"claim {entry.claim[:12]}, merged into checkpoint {checkpoint}",
    )
