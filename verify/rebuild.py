"""Doing all of a run's merges again, from checkpoint 0 and the public deltas, and comparing every byte.

Nothing of the coordinator's is taken on trust but what it signed: units must follow from the run config, deltas are
admitted again, weights are computed again from the deltas themselves, and each round must give the SHA-256 that its
manifest says.

With `without`, it asks instead what the run would have become had one member never taken part. Then there is nothing to
compare with: the result is the asker's own.
"""

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diloco.average import average_round, average_share
from diloco.checkpoint import FileDigest
from diloco.container import Container
from diloco.determinism import selftest
from diloco.merge import MergeFiles, MergeInput, MergeResult, OuterState, UnmergeInput, merge_round
from diloco.patch import open_patch
from diloco.weigh import weigh_delta
from mmdit.export import CONFIG_PATH, DESCRIPTION_PATH, EMA_CONFIG_PATH, SCHEDULER_PATH, write_description
from protocol import layout
from protocol.assignment import member_of
from protocol.documents import Artifact, Digest, Manifest, MergeEntry, RunConfig, RunId, UnmergeEntry
from protocol.errors import (
    BytesRefused,
    DeltasPruned,
    DirectoryNotEmpty,
    PayloadInvalid,
    RebuildDiffers,
    RoundTooOld,
    UsageError,
)
from protocol.keys import PublicKey
from verify.admission import admit_delta
from verify.checkpoint import check_file, open_run
from verify.history import check_history, check_log, check_takedown_lists, read_history
from verify.plain_files import file_sha256
from verify.replay import (
    check_numerics,
    codec_config,
    conditioning_config,
    delta_schema,
    merge_rules,
    model_config,
    patch_config,
    space_of,
)
from verify.weights import Candidate, merge_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuiltRound:
    """A checkpoint that was merged again; `last` is the newest one's number.

    It came out as published, unless a member was left out: then `deltas` and `weights_sha256` are those of the what-if.
    """

    checkpoint: int
    last: int
    deltas: int
    weights_sha256: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildReport:
    """A whole run that was merged again; the newest checkpoint lies in `directory`.

    without: the pseudonym of the member that was left out, and `left_out` how many deltas of it. None: nobody was, and
        every byte came out as published. Otherwise nothing was compared.
    """

    run: RunId
    checkpoint: int
    deltas: int
    weights_sha256: Digest
    directory: Path
    without: Digest | None = None
    left_out: int = 0


def rebuild(
    public: Path,
    out: Path,
    on_round: Callable[[RebuiltRound], None] | None = None,
    *,
    run: RunId | None = None,
    start: int = 0,
    without: str | None = None,
) -> RebuildReport:
    """Re-derive the newest checkpoint of a run into `out` and compare each round on the way with its manifest.

    Needs the run's papers, every manifest, the first weights and every merged delta; `out` never holds more than two
    rounds' weights and momentum. It ends as a checkpoint directory that can be drawn from, without manifest and papers.

    Args:
        public: a run's public directory, or a mirror of it.
        out: a directory that is empty or not there yet.
        on_round: called after each round.
        run: the run id that must stand behind it; None takes the directory's own.
        start: the checkpoint to begin from, taken as published; for runs whose oldest deltas were pruned.
        without: a member to leave out: its pseudonym in the manifests, or its owner key's id or public key, 64 hex
            digits each. What is left is weighed by the same rules, and nothing is compared with the manifests.

    Raises:
        UsageError: there is no such checkpoint to begin from, or no such member.
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
    manifests = read_history(public, trust)
    check_history(manifests, trust)
    check_takedown_lists(public, manifests, trust)
    if not 0 <= start < len(manifests):
        raise UsageError(f"There is no checkpoint {start} to begin from; the newest one is {len(manifests) - 1}.")
    member = None if without is None else _member(without, trust.run, manifests, start)
    _require_deltas(public, manifests[start + 1 :], member)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DirectoryNotEmpty(f"{out} is not empty; nothing was overwritten.")
    out.mkdir(parents=True, exist_ok=True)
    state = _genesis(public, manifests[0], trust.config) if start == 0 else _published(public, manifests[start])
    weights_sha256 = _weights_sha256(manifests[start])
    ema = _average_before(public, manifests[start], trust.config, state)
    rounds = _Rounds(public=public, out=out, config=trust.config, without=member, ema=ema)
    merged = 0
    for before, manifest in itertools.pairwise(manifests[start:]):
        check_log(public, before, manifest)
        rebuilt, state = rounds.merge(manifest, state, last=manifests[-1].checkpoint)
        merged, weights_sha256 = merged + rebuilt.deltas, rebuilt.weights_sha256
        shutil.rmtree(_workplace(out, manifest.checkpoint - 1), ignore_errors=True)
        if on_round is not None:
            on_round(rebuilt)
    _finish(out, manifests[-1], state, trust.config, ema=rounds.ema)
    return RebuildReport(
        run=trust.run,
        checkpoint=manifests[-1].checkpoint,
        deltas=merged,
        weights_sha256=weights_sha256,
        directory=out,
        without=member,
        left_out=sum(len(manifest.merged) for manifest in manifests[start + 1 :]) - merged,
    )


def _member(text: str, run: RunId, manifests: Sequence[Manifest], start: int) -> Digest:
    """Return the pseudonym that a pseudonym, a key id or a public key stands for; raise `UsageError`."""
    text = text.strip().lower()
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise UsageError("A member is named by 64 hex digits: its pseudonym, its owner key's id or its public key.")
    names = (Digest(text), member_of(run, text), member_of(run, PublicKey.from_hex(text).key_id))
    first = {entry.member: manifest.checkpoint for manifest in reversed(manifests) for entry in manifest.merged}
    for name in names:
        if name in first and first[name] <= start:
            raise UsageError(
                f"This member is part of checkpoint {first[name]} already; to leave it out, begin before that."
            )
        if name in first:
            return name
    raise UsageError(f"Nobody known as {text[:12]} has anything in this run's merges.")


def _entries(manifest: Manifest, without: Digest | None) -> list[MergeEntry | UnmergeEntry]:
    """Return every delta that a round needs: what it merges and what it takes out."""
    entries: list[MergeEntry | UnmergeEntry] = [*manifest.merged, *manifest.unmerged]
    return [entry for entry in entries if entry.member != without]


def _require_deltas(public: Path, manifests: Sequence[Manifest], without: Digest | None) -> None:
    """Look for every delta before hours are spent on merging."""
    for manifest in manifests:
        for entry in _entries(manifest, without):
            if not (public / layout.delta_path(entry.blob_sha256)).is_file():
                raise DeltasPruned(
                    f"{layout.delta_path(entry.blob_sha256)} of checkpoint {manifest.checkpoint} is not there: it was "
                    f"pruned, or not copied. `--from {_reach(public, manifests)}` rebuilds what the kept deltas reach."
                )


def _reach(public: Path, manifests: Sequence[Manifest]) -> int:
    """Return the oldest checkpoint from which every later delta is there."""
    for manifest in reversed(manifests):
        if not all((public / layout.delta_path(entry.blob_sha256)).is_file() for entry in _entries(manifest, None)):
            return manifest.checkpoint
    return 0


def _genesis(public: Path, manifest: Manifest, config: RunConfig) -> OuterState:
    directory = public / layout.checkpoint_directory(0)
    if _weights_sha256(manifest) != config.genesis_sha256:
        raise RebuildDiffers("Checkpoint 0 does not hold the first weights that the run config names.")
    weights = manifest.state_file(layout.ROLE_WEIGHTS)
    assert weights is not None  # it has a digest
    if len(manifest.state) != 1:
        raise RebuildDiffers("Checkpoint 0 starts with a momentum or a residual; a run starts from rest.")
    check_file(directory, weights)
    return OuterState(
        weights=directory / weights.path,
        weights_sha256=bytes.fromhex(weights.sha256),
        momentum=None,
        residual=None,
    )


def _published(public: Path, manifest: Manifest) -> OuterState:
    """Return a checkpoint's state as it was published, every byte as signed."""
    directory = public / layout.checkpoint_directory(manifest.checkpoint)
    paths = {}
    for role in (layout.STATE_ROLES[path] for path in layout.STATE):
        entry = manifest.state_file(role)
        if entry is None:
            raise RebuildDiffers(f"Checkpoint {manifest.checkpoint} was published without its {role}.")
        if manifest.snapshot != manifest.checkpoint and not (directory / entry.path).exists():
            raise UsageError(
                f"Of checkpoint {manifest.checkpoint} only the patch is kept; begin from {manifest.snapshot}, "
                "whose whole state is."
            )
        check_file(directory, entry)
        paths[role] = directory / entry.path
    return OuterState(
        weights=paths[layout.ROLE_WEIGHTS],
        weights_sha256=bytes.fromhex(_weights_sha256(manifest)),
        momentum=paths[layout.ROLE_MOMENTUM],
        residual=paths[layout.ROLE_RESIDUAL],
    )


def _average_before(public: Path, manifest: Manifest, config: RunConfig, state: OuterState) -> Path | None:
    """Return the running average that the next round moves, if the run keeps one."""
    if not config.outer.ema_decay:
        return None
    if manifest.checkpoint == 0:
        return state.weights
    entry = manifest.state_file(layout.ROLE_EMA)
    if entry is None:
        raise RebuildDiffers(f"Checkpoint {manifest.checkpoint} was published without its running average.")
    directory = public / layout.checkpoint_directory(manifest.checkpoint)
    check_file(directory, entry)
    return directory / entry.path


class _Rounds:
    """Merges the rounds of a run one after another, and remembers with which weights."""

    def __init__(self, *, public: Path, out: Path, config: RunConfig, without: Digest | None, ema: Path | None) -> None:
        self.ema = ema
        """The running average after the last round that was merged."""
        self._public = public
        self._out = out
        self._config = config
        self._without = without
        self._weights: dict[str, int] = {}
        """Of each claim merged here: what is taken out of a what-if was merged with another weight than in the run."""

    def merge(self, manifest: Manifest, state: OuterState, *, last: int) -> tuple[RebuiltRound, OuterState]:
        """Merge one round into `state`; compare it with its manifest unless a member is left out."""
        place = _workplace(self._out, manifest.checkpoint)
        place.mkdir(parents=True)
        made = MergeFiles(
            weights=place / "weights.safetensors",
            momentum=place / "momentum.safetensors",
            residual=place / "residual.safetensors",
            patch=place / "patch.safetensors.zst",
        )
        entries = [entry for entry in manifest.merged if entry.member != self._without]
        containers = {entry.claim: self._container(entry) for entry in _entries(manifest, self._without)}
        weights = self._weigh(manifest, entries, containers)
        result = merge_round(
            state,
            [
                MergeInput(claim_digest=bytes.fromhex(claim), container=containers[claim], weight=weight)
                for claim, weight in weights.items()
            ],
            merge_rules(self._config),
            made,
            unmerge=self._removals(manifest, containers),
        )
        averaged = self._average(manifest.checkpoint, made.weights, place / "ema.safetensors")
        if self._without is None:
            _compare(manifest, result, averaged)
            self._compare_patch(manifest, state, made.patch)
        rebuilt = RebuiltRound(
            checkpoint=manifest.checkpoint,
            last=last,
            deltas=len(entries),
            weights_sha256=Digest(result.weights.sha256.hex()),
        )
        return rebuilt, OuterState(
            weights=made.weights,
            weights_sha256=result.weights.sha256,
            momentum=made.momentum,
            residual=made.residual,
        )

    def _average(self, checkpoint: int, weights: Path, out: Path) -> FileDigest | None:
        """Move the running average, if there is one, by one checkpoint."""
        if self.ema is None:
            return None
        share = average_share(self._config.outer.ema_decay, checkpoint)
        digest = average_round(self.ema, weights, out, share)
        self.ema = out
        return digest

    def _compare_patch(self, manifest: Manifest, state: OuterState, ours: Path) -> None:
        """A published patch must lead to the published weights, or volunteers could not follow."""
        published = self._public / layout.checkpoint_directory(manifest.checkpoint) / layout.PATCH
        if not published.exists():
            return  # a mirror of the deltas and manifests alone
        check_file(published.parent, manifest.file(layout.PATCH))
        schema, rules = delta_schema(self._config), patch_config(self._config)
        patches = [open_patch(path, schema, rules, state.weights_sha256) for path in (published, ours)]
        if len({patch.content_digest() for patch in patches}) != 1:
            raise RebuildDiffers(f"The patch of checkpoint {manifest.checkpoint} is not the one that its deltas give.")

    def _weigh(
        self, manifest: Manifest, entries: Sequence[MergeEntry], containers: Mapping[str, Container]
    ) -> Mapping[str, int]:
        """Return the weight of each claim by the rules; check them against the manifest unless a member is left out."""
        try:
            weights = _weights(manifest, entries, containers, self._config)
        except (RoundTooOld, ValueError) as error:
            if self._without is None:
                raise RebuildDiffers(
                    f"Checkpoint {manifest.checkpoint} merged what the rules exclude: {error}"
                ) from None
            weights = (0,) * len(entries)  # nobody is left, or nobody who has any weight alone
        if self._without is None:
            _compare_weights(manifest, weights)
        found = {entry.claim: weight for entry, weight in zip(entries, weights, strict=True)}
        self._weights.update(found)
        return found

    def _removals(self, manifest: Manifest, containers: Mapping[str, Container]) -> list[UnmergeInput]:
        return [
            UnmergeInput(
                container=containers[entry.claim],
                weight=self._weights.get(entry.claim, entry.weight),
                rounds_ago=manifest.checkpoint - 1 - entry.checkpoint,
            )
            for entry in manifest.unmerged
            if entry.member != self._without
        ]

    def _container(self, entry: MergeEntry | UnmergeEntry) -> Container:
        """Admit a delta as if it had just been uploaded, and open it."""
        path = self._public / layout.delta_path(entry.blob_sha256)
        artifact = Artifact(
            role=layout.ROLE_DELTA,
            content_sha256=entry.content_sha256,
            blob_sha256=entry.blob_sha256,
            size=entry.size,
        )
        schema, codec = delta_schema(self._config), codec_config(self._config)
        try:
            admit_delta(path, config=self._config, unit=entry.unit, artifact=artifact)
            return Container.open(path, schema, codec, bytes.fromhex(entry.unit))
        except BytesRefused as refusal:
            raise type(refusal)(f"{path}: {refusal.message}") from None


def _weights(
    manifest: Manifest, entries: Sequence[MergeEntry], containers: Mapping[str, Container], config: RunConfig
) -> tuple[int, ...]:
    if entries and not any(entry.influence for entry in entries):
        return (0,) * len(entries)  # nobody's record counts for anything yet: the round merges, and moves, nothing
    if manifest.weigh_seed is None:
        weighings = None
    else:
        seed = bytes.fromhex(manifest.weigh_seed)
        weighings = [weigh_delta(containers[entry.claim], seed) for entry in entries]
    return merge_weights(
        [Candidate.of(entry) for entry in entries],
        rules=config.rounds,
        verification=config.verification,
        sketches=None if weighings is None else [weighing.sketch for weighing in weighings],
        norms2=None if weighings is None else [weighing.norm2 for weighing in weighings],
    )


def _compare_weights(manifest: Manifest, weights: Sequence[int]) -> None:
    for entry, weight in zip(manifest.merged, weights, strict=True):
        if entry.weight != weight:
            raise RebuildDiffers(
                f"Checkpoint {manifest.checkpoint} gave claim {entry.claim[:12]} the weight {entry.weight}; the rules "
                f"give it {weight}."
            )


def _compare(manifest: Manifest, result: MergeResult, averaged: FileDigest | None) -> None:
    for role, digest in (
        (layout.ROLE_WEIGHTS, result.weights),
        (layout.ROLE_MOMENTUM, result.momentum),
        (layout.ROLE_RESIDUAL, result.residual),
        (layout.ROLE_EMA, averaged),
    ):
        rebuilt = digest.sha256.hex() if digest else "none"
        entry = manifest.state_file(role)
        published = entry.sha256 if entry else "none"
        if published != rebuilt:
            raise RebuildDiffers(
                f"Checkpoint {manifest.checkpoint} does not follow from its deltas: its {role} should have the SHA-256 "
                f"{rebuilt[:12]}, but {published[:12]} was published."
            )


def _finish(out: Path, manifest: Manifest, state: OuterState, config: RunConfig, *, ema: Path | None) -> None:
    """Put the newest state where a checkpoint has it, and compare the files that describe it too."""
    try:
        write_description(
            out,
            config=model_config(config),
            conditioning=conditioning_config(config),
            space=space_of(config),
            shift=config.training.shift,
            ema=ema is not None,
        )
    except ValueError as error:
        raise PayloadInvalid(f"RunConfig: {error}.") from None
    published = {entry.path: entry.sha256 for entry in manifest.files}
    for path in (CONFIG_PATH, SCHEDULER_PATH, DESCRIPTION_PATH, *([EMA_CONFIG_PATH] if ema else [])):
        if published.get(path.as_posix()) != file_sha256(out / path):
            raise RebuildDiffers(f"Checkpoint {manifest.checkpoint} has another {path} than the run config gives.")
    if state.momentum is None:
        shutil.copyfile(state.weights, out / layout.WEIGHTS)
        return
    (out / layout.MOMENTUM).parent.mkdir(exist_ok=True)
    assert state.residual is not None  # it goes with the momentum
    made_files = dict(zip(layout.STATE, (state.weights, state.momentum, state.residual), strict=True))
    if ema is not None:
        made_files[layout.EMA] = ema
    for name, made in made_files.items():
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
