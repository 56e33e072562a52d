"""Doing all of a run's merges again, from checkpoint 0 and the public deltas, and comparing every byte.

Nothing of the coordinator's is taken on trust but what it signed: units must follow from the run config, weights are
computed again, deltas are admitted again, and each round must give the SHA-256 that its manifest says.
"""

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from diloco.container import Container
from diloco.determinism import selftest
from diloco.merge import MergeInput, merge_round
from mmdit.export import CONFIG_PATH, DESCRIPTION_PATH, SCHEDULER_PATH, write_description
from protocol import layout
from protocol.assignment import unit_id
from protocol.documents import Artifact, Digest, Manifest, MergeEntry, RunConfig, RunId, envelope_digest
from protocol.errors import (
    BytesRefused,
    CheckpointCorrupt,
    DeltasPruned,
    DirectoryNotEmpty,
    PayloadInvalid,
    RebuildDiffers,
    RoundTooOld,
    UsageError,
)
from protocol.limits import MAX_PUBLIC_DOCUMENT_BYTES
from protocol.log import read_log
from protocol.trust import RunTrust
from verify.admission import admit_delta, file_sha256
from verify.checkpoint import check_file, open_run, read_limited
from verify.replay import (
    check_numerics,
    codec_config,
    conditioning_config,
    delta_schema,
    model_config,
    outer_config,
    pixel_space,
    unit_samples,
)
from verify.weights import Candidate, merge_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuiltRound:
    """A checkpoint that was merged again and came out as published; `last` is the newest one's number."""

    checkpoint: int
    last: int
    deltas: int
    weights_sha256: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildReport:
    """A whole run that came out as published; the newest checkpoint lies in `directory`."""

    run: RunId
    checkpoint: int
    deltas: int
    weights_sha256: Digest
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """The files that a round starts from."""

    weights: Path
    momentum: Path | None


def rebuild(
    public: Path,
    out: Path,
    on_round: Callable[[RebuiltRound], None] | None = None,
    *,
    run: RunId | None = None,
    start: int = 0,
) -> RebuildReport:
    """Re-derive the newest checkpoint of a run into `out` and compare each round on the way with its manifest.

    Needs the run's papers, every manifest, the first weights and every merged delta; `out` never holds more than two
    rounds' weights and momentum. It ends as a checkpoint directory that can be drawn from, without manifest and papers.

    Args:
        public: a run's public directory, or a mirror of it.
        out: a directory that is empty or not there yet.
        on_round: called after each round that came out as published.
        run: the run id that must stand behind it; None takes the directory's own.
        start: the checkpoint to begin from, taken as published; for runs whose oldest deltas were pruned.

    Raises:
        UsageError: there is no such checkpoint to begin from.
        RebuildDiffers: a round's bytes, weights, units or history are not what the rules give.
        DeltasPruned: a delta that is needed is not there.
        CheckpointCorrupt, DigestMismatch: a file of the mirror is missing or not the one that was signed.
        NumericsMismatch: this version computes otherwise than the run.
        SelfTestFailed: this machine does.
        DirectoryNotEmpty: `out` holds something.
    """
    selftest()
    trust = open_run(public, run)
    check_numerics(trust.config)
    manifests = _read_history(public, trust)
    _check_history(manifests, trust)
    if not 0 <= start < len(manifests):
        raise UsageError(f"There is no checkpoint {start} to begin from; the newest one is {len(manifests) - 1}.")
    _require_deltas(public, manifests[start + 1 :])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DirectoryNotEmpty(f"{out} is not empty; nothing was overwritten.")
    out.mkdir(parents=True, exist_ok=True)
    state = _genesis(public, manifests[0], trust.config) if start == 0 else _published(public, manifests[start])
    for before, manifest in itertools.pairwise(manifests[start:]):
        check_log(public, before, manifest)
        state = _rebuild_round(public, out, manifest, state, trust.config)
        shutil.rmtree(_workplace(out, manifest.checkpoint - 1), ignore_errors=True)
        if on_round is not None:
            on_round(_rebuilt(manifest, last=manifests[-1].checkpoint))
    _finish(out, manifests[-1], state, trust.config)
    return RebuildReport(
        run=trust.run,
        checkpoint=manifests[-1].checkpoint,
        deltas=sum(len(manifest.merged) for manifest in manifests[start + 1 :]),
        weights_sha256=_weights_sha256(manifests[-1]),
        directory=out,
    )


def _rebuilt(manifest: Manifest, *, last: int) -> RebuiltRound:
    return RebuiltRound(
        checkpoint=manifest.checkpoint,
        last=last,
        deltas=len(manifest.merged),
        weights_sha256=_weights_sha256(manifest),
    )


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


def _read_history(public: Path, trust: RunTrust) -> Sequence[Manifest]:
    """Return the manifests of checkpoints 0 to the newest, each verified and chained to the one before."""
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


def _digest(raw: bytes, trust: RunTrust) -> Digest:
    return envelope_digest(Manifest, raw, trust.coordinator, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)


def _count(public: Path) -> int:
    number = 0
    while (public / layout.checkpoint_directory(number) / layout.MANIFEST).exists():
        number += 1
    return number


def _check_history(manifests: Sequence[Manifest], trust: RunTrust) -> None:
    """Check what was merged into what, without touching a delta."""

    @cache
    def units_of(number: int) -> frozenset[str]:
        return frozenset(unit_id(trust.config_sha256, number, index) for index in range(trust.config.rounds.units))

    seen: set[str] = set()
    for manifest in manifests:
        number = manifest.checkpoint
        if bool(manifest.merged) != bool(number):
            raise RebuildDiffers(f"Checkpoint {number} merged {len(manifest.merged)} deltas.")
        if manifest.outer != trust.config.outer:
            raise RebuildDiffers(f"Checkpoint {number} was made with another outer step than the run config's.")
        for entry in manifest.merged:
            _check_entry(entry, number, units_of, trust.config)
            if entry.unit in seen or entry.claim in seen:
                raise RebuildDiffers(f"Checkpoint {number} merged unit {entry.unit[:12]} a second time.")
            seen |= {entry.unit, entry.claim}
        _check_weights(manifest, trust.config)


def _check_entry(entry: MergeEntry, number: int, units_of: Callable[[int], frozenset[str]], config: RunConfig) -> None:
    if entry.round > number or entry.unit not in units_of(entry.round):
        raise RebuildDiffers(f"Checkpoint {number} merged {entry.unit[:12]}, which is no unit of round {entry.round}.")
    if entry.samples != unit_samples(config):
        raise RebuildDiffers(
            f"Checkpoint {number} counts {entry.samples} samples for unit {entry.unit[:12]}; every unit of the run has "
            f"{unit_samples(config)}."
        )


def _check_weights(manifest: Manifest, config: RunConfig) -> None:
    if not manifest.merged:
        return
    candidates = [
        Candidate(claim=Digest(entry.claim), round=entry.round, samples=entry.samples) for entry in manifest.merged
    ]
    try:
        weights = merge_weights(candidates, merging_round=manifest.checkpoint, rules=config.rounds)
    except (RoundTooOld, ValueError) as error:
        raise RebuildDiffers(f"Checkpoint {manifest.checkpoint} merged what the rules exclude: {error}") from None
    for entry, weight in zip(manifest.merged, weights, strict=True):
        if entry.weight != weight:
            raise RebuildDiffers(
                f"Checkpoint {manifest.checkpoint} gave claim {entry.claim[:12]} the weight {entry.weight}; the rules "
                f"give it {weight}."
            )


def _require_deltas(public: Path, manifests: Sequence[Manifest]) -> None:
    """Look for every delta before hours are spent on merging."""
    for manifest in manifests:
        for entry in manifest.merged:
            if not (public / layout.delta_path(entry.blob_sha256)).is_file():
                raise DeltasPruned(
                    f"{layout.delta_path(entry.blob_sha256)} of checkpoint {manifest.checkpoint} is not there: it was "
                    f"pruned, or not copied. `--from {_reach(public, manifests)}` rebuilds what the kept deltas reach."
                )


def _reach(public: Path, manifests: Sequence[Manifest]) -> int:
    """Return the oldest checkpoint from which every later delta is there."""
    for manifest in reversed(manifests):
        if not all((public / layout.delta_path(entry.blob_sha256)).is_file() for entry in manifest.merged):
            return manifest.checkpoint
    return 0


def _genesis(public: Path, manifest: Manifest, config: RunConfig) -> _State:
    directory = public / layout.checkpoint_directory(0)
    if _weights_sha256(manifest) != config.genesis_sha256:
        raise RebuildDiffers("Checkpoint 0 does not hold the first weights that the run config names.")
    files = {role: manifest.state_file(role) for role in (layout.ROLE_WEIGHTS, layout.ROLE_MOMENTUM)}
    if files[layout.ROLE_MOMENTUM] is not None:
        raise RebuildDiffers("Checkpoint 0 starts with a momentum; a run starts from rest.")
    weights = files[layout.ROLE_WEIGHTS]
    assert weights is not None  # it has a digest
    check_file(directory, weights)
    return _State(weights=directory / weights.path, momentum=None)


def _published(public: Path, manifest: Manifest) -> _State:
    """Return a checkpoint's state as it was published, every byte as signed."""
    directory = public / layout.checkpoint_directory(manifest.checkpoint)
    paths = {}
    for role in (layout.ROLE_WEIGHTS, layout.ROLE_MOMENTUM):
        entry = manifest.state_file(role)
        if entry is None:
            raise RebuildDiffers(f"Checkpoint {manifest.checkpoint} was published without its {role}.")
        check_file(directory, entry)
        paths[role] = directory / entry.path
    return _State(weights=paths[layout.ROLE_WEIGHTS], momentum=paths[layout.ROLE_MOMENTUM])


def _rebuild_round(public: Path, out: Path, manifest: Manifest, state: _State, config: RunConfig) -> _State:
    place = _workplace(out, manifest.checkpoint)
    place.mkdir(parents=True)
    made = _State(weights=place / "weights.safetensors", momentum=place / "momentum.safetensors")
    assert made.momentum is not None
    result = merge_round(
        state.weights,
        state.momentum,
        [_merge_input(public, entry, config) for entry in manifest.merged],
        outer_config(config),
        made.weights,
        made.momentum,
    )
    momentum = manifest.state_file(layout.ROLE_MOMENTUM)
    for name, published, rebuilt in (
        ("weights", _weights_sha256(manifest), result.weights.sha256.hex()),
        ("momentum", momentum.sha256 if momentum else "none", result.momentum.sha256.hex()),
    ):
        if published != rebuilt:
            raise RebuildDiffers(
                f"Checkpoint {manifest.checkpoint} does not follow from its deltas: its {name} should have the SHA-256 "
                f"{rebuilt[:12]}, but {published[:12]} was published."
            )
    return made


def _merge_input(public: Path, entry: MergeEntry, config: RunConfig) -> MergeInput:
    path = public / layout.delta_path(entry.blob_sha256)
    artifact = Artifact(
        role=layout.ROLE_DELTA,
        content_sha256=entry.content_sha256,
        blob_sha256=entry.blob_sha256,
        size=entry.size,
    )
    try:
        admit_delta(path, config=config, unit=entry.unit, artifact=artifact)
        container = Container.open(path, delta_schema(config), codec_config(config), bytes.fromhex(entry.unit))
    except BytesRefused as refusal:
        raise type(refusal)(f"{path}: {refusal.message}") from None
    return MergeInput(claim_digest=bytes.fromhex(entry.claim), container=container, weight=entry.weight)


def _finish(out: Path, manifest: Manifest, state: _State, config: RunConfig) -> None:
    """Put the newest state where a checkpoint has it, and compare the files that describe it too."""
    try:
        write_description(
            out, config=model_config(config), conditioning=conditioning_config(config), space=pixel_space(config)
        )
    except ValueError as error:
        raise PayloadInvalid(f"RunConfig: {error}.") from None
    published = {entry.path: entry.sha256 for entry in manifest.files}
    for path in (CONFIG_PATH, SCHEDULER_PATH, DESCRIPTION_PATH):
        if published.get(path.as_posix()) != file_sha256(out / path):
            raise RebuildDiffers(f"Checkpoint {manifest.checkpoint} has another {path} than the run config gives.")
    if state.momentum is None:
        shutil.copyfile(state.weights, out / layout.WEIGHTS)
        return
    (out / layout.MOMENTUM).parent.mkdir(exist_ok=True)
    for made, name in ((state.weights, layout.WEIGHTS), (state.momentum, layout.MOMENTUM)):
        if made.is_relative_to(out):
            made.replace(out / name)
        else:
            shutil.copyfile(made, out / name)  # the newest checkpoint itself was the start: it stays where it is
    shutil.rmtree(_workplace(out, manifest.checkpoint), ignore_errors=True)


def _workplace(out: Path, checkpoint: int) -> Path:
    return out / f".round-{checkpoint:06d}"


def _weights_sha256(manifest: Manifest) -> Digest:
    weights = manifest.state_file(layout.ROLE_WEIGHTS)
    if weights is None:
        raise RebuildDiffers(f"The manifest of checkpoint {manifest.checkpoint} names no weights.")
    return Digest(weights.sha256)
