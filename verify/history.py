"""A run's manifests from the first to the newest: verified, chained, and following from the run config.

Everything here is read off the record alone; no delta is touched.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from protocol import layout
from protocol.assignment import unit_id, unit_samples
from protocol.documents import (
    Digest,
    Manifest,
    MergeEntry,
    RunConfig,
    Takedowns,
    UnitId,
    UnmergeEntry,
    envelope_digest,
)
from protocol.errors import CheckpointCorrupt, DocumentRefused, PayloadInvalid, RebuildDiffers, WrongRun
from protocol.limits import MAX_PUBLIC_DOCUMENT_BYTES, MAX_TAKEDOWNS_BYTES
from protocol.log import read_log
from protocol.takedowns import check_grown, check_takedowns
from protocol.trust import RunTrust
from verify.checkpoint import read_limited
from verify.policy import ONE


def read_history(public: Path, trust: RunTrust) -> Sequence[Manifest]:
    """Return the manifests of checkpoints 0 to the newest, each verified and chained to the one before.

    Raises:
        RebuildDiffers: they do not follow on each other.
        CheckpointCorrupt: one is missing, or there is none.
    """
    latest = public / layout.LATEST
    last = trust.manifest(read_limited(latest)).checkpoint if latest.exists() else _count(public) - 1
    manifests: list[Manifest] = []
    previous: Digest | None = None
    for number in range(last + 1):
        raw = read_limited(public / layout.checkpoint_directory(number) / layout.MANIFEST)
        manifest = trust.manifest(raw)
        if manifest.checkpoint != number:
            raise RebuildDiffers(f"In the place of checkpoint {number} lies the manifest of {manifest.checkpoint}.")
        if manifest.previous_manifest_sha256 != previous:
            raise RebuildDiffers(f"The manifest of checkpoint {number} does not follow on the one before it.")
        previous = _digest(raw, trust)
        manifests.append(manifest)
    if not manifests:
        raise CheckpointCorrupt(f"{public} holds no checkpoint.")
    if latest.exists() and _digest(read_limited(latest), trust) != previous:
        # Stops a coordinator from showing two histories.
        raise RebuildDiffers(f"{layout.LATEST} and checkpoint {last} are two different manifests of one checkpoint.")
    return manifests


def check_log(public: Path, before: Manifest, manifest: Manifest) -> None:
    """Check that the log entries between two checkpoints lead from the one signed head to the other, if they are there.

    Raises:
        RebuildDiffers: the entries do not follow from each other, or do not end at the signed head.
        CheckpointCorrupt: the log file can't be read.
    """
    path = public / layout.log_path(manifest.checkpoint)
    if not path.exists():
        return  # a mirror of the deltas and manifests alone: the bytes can be derived without the log
    raw = read_limited(path)
    position, head = before.log_position, bytes.fromhex(before.log_head)
    try:
        for entry in read_log(raw, position=position, head=head):
            position, head = entry.position, entry.head
    except PayloadInvalid as error:
        raise RebuildDiffers(f"The log of checkpoint {manifest.checkpoint} does not hold: {error.message}") from None
    if (position, head.hex()) != (manifest.log_position, manifest.log_head):
        raise RebuildDiffers(
            f"The log of checkpoint {manifest.checkpoint} ends at entry {position}; its manifest signs another end."
        )


def check_history(manifests: Sequence[Manifest], trust: RunTrust) -> None:
    """Check what was merged into what, and what was taken out again.

    Raises:
        RebuildDiffers: a unit that is none, or was merged before; lateness, samples or influence that can't be; a delta
            taken out that was never merged so, or twice; another outer step; a seed for weighing that is missing; or a
            snapshot that is not there yet, or older than one that was named before.
    """

    @cache
    def units_of(number: int) -> frozenset[str]:
        return frozenset(unit_id(trust.config_sha256, number, index) for index in range(trust.config.rounds.units))

    merged: dict[str, tuple[int, MergeEntry]] = {}
    units: set[str] = set()
    removed: set[str] = set()
    snapshot = 0
    for manifest in manifests:
        number = manifest.checkpoint
        if bool(manifest.merged) != bool(number):
            raise RebuildDiffers(f"Checkpoint {number} merged {len(manifest.merged)} deltas.")
        if manifest.outer != trust.config.outer:
            raise RebuildDiffers(f"Checkpoint {number} was made with another outer step than the run config's.")
        if not snapshot <= manifest.snapshot <= number:
            raise RebuildDiffers(f"Checkpoint {number} names {manifest.snapshot} as the newest one that is kept whole.")
        snapshot = manifest.snapshot
        _check_seed(manifest, trust.config)
        for out in manifest.unmerged:
            _check_removal(out, number, merged, removed)
            removed.add(out.claim)
        for entry in manifest.merged:
            _check_entry(entry, number, units_of, trust.config)
            if entry.unit in units or entry.claim in merged:
                raise RebuildDiffers(f"Checkpoint {number} merged unit {entry.unit[:12]} a second time.")
            units.add(entry.unit)
            merged[entry.claim] = (number, entry)


def check_takedown_lists(public: Path, manifests: Sequence[Manifest], trust: RunTrust) -> None:
    """Check that the lists of pictures taken down only grew, each from its own round on.

    Raises:
        RebuildDiffers: a list does not hold, or rewrites the one before it.
        CheckpointCorrupt: one is missing.
    """
    before: Takedowns | None = None
    named: str | None = None
    for manifest in manifests:
        digest, number = manifest.takedowns_sha256, manifest.checkpoint
        if digest == named:
            continue
        after = None
        try:
            if digest is not None:
                raw = read_limited(public / layout.takedowns_path(digest), MAX_TAKEDOWNS_BYTES)
                after = trust.takedowns(raw, digest)
                check_takedowns(after, trust.config, number)
            check_grown(before, after, number - 1)
        except (DocumentRefused, WrongRun) as refusal:
            raise RebuildDiffers(f"Checkpoint {number}: {refusal.message}") from None
        before, named = after, digest


def _check_seed(manifest: Manifest, config: RunConfig) -> None:
    weighs = config.verification.mode != "none" and manifest.checkpoint > 0
    if weighs and manifest.weigh_seed is None:
        raise RebuildDiffers(f"Checkpoint {manifest.checkpoint} does not say under which seed it was weighed.")
    if not weighs and manifest.weigh_seed is not None:
        raise RebuildDiffers(f"Checkpoint {manifest.checkpoint} names a seed for weighing, but was weighed without.")


def _check_removal(
    out: UnmergeEntry, number: int, merged: dict[str, tuple[int, MergeEntry]], removed: set[str]
) -> None:
    into, entry = merged.get(out.claim, (number, None))
    if entry is None or into != out.checkpoint or not _is_same(out, entry):
        raise RebuildDiffers(f"Checkpoint {number} takes out claim {out.claim[:12]}, which was not merged like that.")
    if out.claim in removed:
        raise RebuildDiffers(f"Checkpoint {number} takes out claim {out.claim[:12]} a second time.")


def _is_same(out: UnmergeEntry, entry: MergeEntry) -> bool:
    names = ("claim", "unit", "blob_sha256", "content_sha256", "size", "weight", "member")
    return all(getattr(out, name) == getattr(entry, name) for name in names)


def _check_entry(entry: MergeEntry, number: int, units_of: Callable[[int], frozenset[str]], config: RunConfig) -> None:
    if entry.round > number or entry.unit not in units_of(entry.round):
        raise RebuildDiffers(f"Checkpoint {number} merged {entry.unit[:12]}, which is no unit of round {entry.round}.")
    samples = unit_samples(config, UnitId(entry.unit))
    if entry.samples != samples:
        raise RebuildDiffers(
            f"Checkpoint {number} counts {entry.samples} samples for unit {entry.unit[:12]}, which has {samples}."
        )
    if entry.late > number - entry.round:
        raise RebuildDiffers(
            f"Checkpoint {number} counts unit {entry.unit[:12]} of round {entry.round} as {entry.late} rounds late."
        )
    if entry.late > config.rounds.staleness_bound:
        raise RebuildDiffers(
            f"Checkpoint {number} merged unit {entry.unit[:12]}, which came {entry.late} rounds late; the run merges "
            f"work that is up to {config.rounds.staleness_bound} rounds late."
        )
    if config.verification.mode == "none" and entry.influence != ONE:
        raise RebuildDiffers(
            f"Checkpoint {number} counts unit {entry.unit[:12]} by a record, but the run keeps no records."
        )


def _digest(raw: bytes, trust: RunTrust) -> Digest:
    return envelope_digest(Manifest, raw, trust.coordinator, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)


def _count(public: Path) -> int:
    number = 0
    while (public / layout.checkpoint_directory(number) / layout.MANIFEST).exists():
        number += 1
    return number
