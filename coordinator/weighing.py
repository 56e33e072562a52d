"""Weighing a merge: sketches, norms and the held-out screen of a round's deltas; outliers and weights from them.

A job of the settler process. What it returns is recorded in the manifest, and anybody can compute it again
(`verify.rebuild`); the outliers that it names are audited before they may be merged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from diloco.container import Container
from diloco.tables import Floats
from diloco.weigh import gram, weigh_delta
from protocol.documents import Digest, MergeEntry, RunConfig
from verify.replay import codec_config, conditioning_config, delta_schema, model_config, shard_set
from verify.screen import loss_changes, outliers
from verify.weights import Candidate, merge_weights, needs_sketches, norm_clips

Job = dict[str, Any]

BATCH: Final = 64
_ENTRY: Final = frozenset(field.name for field in fields(MergeEntry))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """The deltas of a merge that is planned, in the order of their claims."""

    entries: Sequence[MergeEntry]
    containers: Sequence[Container]
    sketches: Sequence[Floats]
    norms2: Sequence[float]


def weigh(config: RunConfig, job: Job) -> Job:
    """Return {"outliers": reason by claim, "weights": units of 2^-24 by claim} for the deltas of a merge.

    Outliers are looked for among the deltas that no audit confirmed; the weights are those of all the others.
    """
    cohort = measured(config, job)
    audited = {entry.claim for entry in cohort.entries if entry.audited}
    screen = _screen(config, job, cohort, audited)
    found = outliers(
        [Digest(entry.claim) for entry in cohort.entries],
        members=[entry.member for entry in cohort.entries],
        norms2=cohort.norms2,
        samples=[entry.samples for entry in cohort.entries],
        gram=gram(_clipped(config, cohort)),
        audited=audited,
        changes=None if screen is None else screen.changes,
        base_loss=0.0 if screen is None else screen.base_loss,
        verification=config.verification,
    )
    kept = [index for index, entry in enumerate(cohort.entries) if Digest(entry.claim) not in found]
    return {"outliers": dict(found), "weights": weights_of(config, cohort, kept)}


def measured(config: RunConfig, job: Job) -> Cohort:
    """Open, sketch and measure the deltas of a merge under the job's seed."""
    seed = bytes.fromhex(job["seed"])
    entries = [
        MergeEntry(**{name: value for name, value in entry.items() if name in _ENTRY}) for entry in job["entries"]
    ]
    containers = [
        Container.open(Path(entry["path"]), delta_schema(config), codec_config(config), bytes.fromhex(entry["unit"]))
        for entry in job["entries"]
    ]
    weighings = [weigh_delta(container, seed) for container in containers]
    return Cohort(
        entries=entries,
        containers=containers,
        sketches=[weighing.sketch for weighing in weighings],
        norms2=[weighing.norm2 for weighing in weighings],
    )


def _clipped(config: RunConfig, cohort: Cohort) -> list[Floats]:
    clips = norm_clips(cohort.norms2, config.verification.norm_bound)
    return [np.multiply(sketch, np.float32(clip)) for sketch, clip in zip(cohort.sketches, clips, strict=True)]


def weights_of(config: RunConfig, cohort: Cohort, kept: Sequence[int]) -> dict[str, int]:
    """Return the weights by claim of the deltas at the places `kept`, as if there were no others."""
    if not any(cohort.entries[index].influence for index in kept):
        return {cohort.entries[index].claim: 0 for index in kept}
    entries = [cohort.entries[index] for index in kept]
    weights = merge_weights(
        [Candidate.of(entry) for entry in entries],
        rules=config.rounds,
        verification=config.verification,
        sketches=[cohort.sketches[index] for index in kept] if needs_sketches(config.verification) else None,
        norms2=[cohort.norms2[index] for index in kept],
    )
    return {entry.claim: weight for entry, weight in zip(entries, weights, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Held-out losses of a merge's deltas, each tried alone: their changes by triple, and the base's mean loss."""

    changes: dict[Digest, tuple[float, ...]]
    base_loss: float


def _screen(config: RunConfig, job: Job, cohort: Cohort, audited: set[str]) -> Screen | None:
    """Return how each delta changes the held-out losses, triple by triple; None where there is nothing to screen."""
    triples = config.verification.screen_triples
    if not triples or all(entry.claim in audited for entry in cohort.entries):
        return None
    import torch

    from diloco.checkpoint import TensorFile
    from diloco.evaluate import TripleLoss, heldout_losses
    from diloco.shards import Shard

    torch.set_num_threads(1)
    base = TensorFile.open(Path(job["base"])).load()
    heldout = shard_set(config, [Shard.open(Path(job["heldout"]))], [job["heldout_without"]])

    def losses(weights: dict[str, Floats]) -> list[TripleLoss]:
        return heldout_losses(
            model_config(config),
            weights,
            heldout,
            bytes.fromhex(config.seed),
            count=triples,
            batch=BATCH,
            max_tokens=conditioning_config(config).max_tokens,
            device="cpu",
        )

    before = losses(base)
    changes = {}
    for entry, container in zip(cohort.entries, cohort.containers, strict=True):
        moved = dict(base)
        for spec in container.schema.tensors:
            step = container.decode(spec.name, 0, spec.num_elements).reshape(spec.shape)
            moved[spec.name] = np.subtract(base[spec.name], step)
        changes[Digest(entry.claim)] = loss_changes(before, losses(moved))
    return Screen(changes=changes, base_loss=math.fsum(triple.loss for triple in before) / len(before))
