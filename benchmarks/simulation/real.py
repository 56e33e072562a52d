"""Physics with real training: tiny units, real containers, sketches, weights, merges and held-out losses.

Whatever the settler process does, its own functions do here. Honest results are kept by base and unit, so that nothing
is trained twice by a replica, a referee, an omniscient attacker or another run from the same base.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from benchmarks.procedural import SmallRun
from benchmarks.simulation.physics import HONEST, Task
from coordinator import settler
from coordinator.claims import Expected
from coordinator.replicas import ComparisonDue
from coordinator.rounds import Round
from coordinator.settling import MergePlan, Weighed
from coordinator.weighing import weigh
from diloco.checkpoint import TensorFile, write_checkpoint
from diloco.codec import EncodedDelta, encode
from diloco.container import Container, write_container
from diloco.determinism import set_precision
from diloco.evaluate import heldout_loss
from diloco.shards import Shard, ShardSet
from diloco.sketch import sketch
from diloco.tables import Floats
from diloco.unit import run_unit
from diloco.weigh import weigh_delta
from protocol import layout
from protocol.assignment import unit_shards
from protocol.documents import Artifact, Digest, Verification
from verify.attacks import ATTACKS, Delta, world_of
from verify.compare import Comparison, compare
from verify.plain_files import file_sha256
from verify.replay import codec_config, conditioning_config, delta_schema, model_config, shard_set, unit_spec_of
from verify.weights import Candidate, merge_weights, needs_sketches

Weighting = Literal["mean", "geometric-median", "multi-krum", "nnm-clip"]

_KNOWN_AT_LEAST: Final = 3
"""An attacker who needs the honest mean trains units itself until it knows so many deltas of the round."""
_SHARED_ROUNDS: Final = 3
"""Runs of one seed start alike; after a few rounds no two have the same base any more, and nothing is worth keeping."""
_TRIPLES: Final = 512
_TRIPLES_AT_ONCE: Final = 64
_NEEDS_HISTORY: Final = frozenset({"stale"})


class RealPhysics:
    """A `Physics` of real bytes, in a folder of its own.

    Args:
        small: the run; `small.config` decides unit ids, seeds and shards.
        folder: for deltas and checkpoints.
        memo: folder of honest raw deltas; several processes may share it.
        weighting: another rule than the config's for weighing merges, without a look for outliers; None for the
            config's own rule, with one. Unit ids follow from the config: so rules can be compared on the same units.
    """

    def __init__(self, small: SmallRun, folder: Path, *, memo: Path, weighting: Weighting | None = None) -> None:
        set_precision("cpu", 1)
        self.config = small.config
        self._small = small
        self._blind = None if weighting is None else replace(small.config.verification, weighting=weighting)
        self._folder = folder
        self._memo = memo
        for name in (folder / "blobs", memo):
            name.mkdir(parents=True, exist_ok=True)
        self._heldout = folder / "heldout.safetensors"
        self._heldout.write_bytes(small.heldout_bytes)
        self._schema, self._codec = delta_schema(small.config), codec_config(small.config)
        self._bases: dict[int, Delta] = {}
        self._base_digests: dict[int, str] = {}
        self._raw: dict[Task, Delta] = {}
        self.losses: dict[int, float] = {}

    # --- checkpoints -----------------------------------------------------------------------------------------

    def first_weights(self) -> Digest:
        """See `Physics`."""
        path = self._checkpoint(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = Digest(write_checkpoint(path, dict(self._small.genesis)).sha256.hex())
        self._published(0, digest)
        return digest

    def merge(self, closed: Round) -> Digest:
        """See `Physics`."""
        number = closed.round
        base = self._place(number - 1)
        job = {
            "base": str(base),
            "out": str(self._place(number)),
            "base_files": {layout.WEIGHTS: self._base_digests[number - 1]},
            "entries": [{**asdict(entry), "path": str(self.blob(entry.blob_sha256))} for entry in closed.merge],
            "unmerge": [
                {
                    **asdict(entry),
                    "path": str(self.blob(entry.blob_sha256)),
                    "rounds_ago": number - 1 - entry.checkpoint,
                }
                for entry in closed.unmerge
            ],
        }
        files = {entry["path"]: entry["sha256"] for entry in settler.merge(self.config, job)["files"]}
        digest = Digest(files[layout.WEIGHTS])
        self._published(number, digest)
        return digest

    def weights(self, checkpoint: int) -> Delta:
        """Return all tensors of a checkpoint."""
        if checkpoint not in self._bases:
            self._bases[checkpoint] = TensorFile.open(self._checkpoint(checkpoint)).load()
        return self._bases[checkpoint]

    def _published(self, number: int, digest: Digest) -> None:
        self._base_digests[number] = digest
        self.losses[number] = heldout_loss(
            model_config(self.config),
            TensorFile.open(self._checkpoint(number)).load(),
            shard_set(self.config, [Shard.open(self._heldout)]),
            bytes.fromhex(self.config.seed),
            count=_TRIPLES,
            batch=_TRIPLES_AT_ONCE,
            max_tokens=conditioning_config(self.config).max_tokens,
            device="cpu",
        )
        oldest = number - self.config.rounds.staleness_bound - 1
        self._bases = {kept: base for kept, base in self._bases.items() if kept >= oldest}
        self._raw = {task: delta for task, delta in self._raw.items() if task.round > oldest}

    def _place(self, number: int) -> Path:
        return self._folder / layout.checkpoint_directory(number)

    def _checkpoint(self, number: int) -> Path:
        return self._place(number) / layout.WEIGHTS

    # --- units -----------------------------------------------------------------------------------------------

    def honest(self, task: Task) -> Delta:
        """Return a unit's honest raw delta."""
        if task not in self._raw:
            self._raw[task] = self._remembered(task) if task.round <= _SHARED_ROUNDS else self._train(task)
        return self._raw[task]

    def _remembered(self, task: Task) -> Delta:
        kept = self._memo / f"{self._base_digests[task.round - 1][:32]}-{task.unit[:32]}.safetensors"
        if kept.exists():
            return TensorFile.open(kept).load()
        raw = self._train(task)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        write_checkpoint(unfinished, dict(raw))
        unfinished.rename(kept)
        return raw

    def _train(self, task: Task) -> Delta:
        return run_unit(
            unit_spec_of(self.config, task.round, task.unit),
            model_config(self.config),
            self.weights(task.round - 1),
            self._shards(task.round, task.index),
            device="cpu",
            on_step=None,
        ).delta

    def _shards(self, round_number: int, index: int) -> ShardSet:
        names = unit_shards(self.config, round_number, index)
        return ShardSet([self._small.shards[name] for name in names])

    def deliver(self, task: Task, kind: str, team: str, /) -> Artifact:
        """See `Physics`."""
        encoded = self._encoded(task) if kind == HONEST else self._forged(task, kind, team)
        unfinished = self._folder / "unfinished.delta"
        write_container(unfinished, encoded, bytes.fromhex(task.unit))
        digest, size = file_sha256(unfinished), unfinished.stat().st_size
        unfinished.rename(self.blob(digest))
        return Artifact(
            role=layout.ROLE_DELTA, content_sha256=encoded.content_digest().hex(), blob_sha256=digest, size=size
        )

    def _encoded(self, task: Task) -> EncodedDelta:
        seed = unit_spec_of(self.config, task.round, task.unit).seed
        return encode(self.honest(task), self._schema, self._codec, seed)

    def _forged(self, task: Task, kind: str, team: str) -> EncodedDelta:
        older = self.weights(task.round - 2) if task.round > 1 else None
        if older is None and kind in _NEEDS_HISTORY:
            return self._encoded(task)
        world = world_of(
            self.config,
            task.round,
            task.unit,
            base=self.weights(task.round - 1),
            older_base=older,
            shards=self._shards(task.round, task.index),
            other_shards=self._shards(task.round, (task.index + 1) % self.config.rounds.units),
            device="cpu",
            # Colluders push in one direction all the time: the worst that a bounded poison can do.
            seed=hashlib.sha256(f"team/{team}".encode()).digest(),
            known=self._known(task),
            own=self.honest(task),
        )
        return ATTACKS[kind].forge(world)

    def _known(self, task: Task) -> tuple[Delta, ...]:
        """Return the honest deltas of the round that were trained so far, a few at least: an omniscient attacker's."""
        index = 0
        while sum(other.round == task.round for other in self._raw) < _KNOWN_AT_LEAST:
            self.honest(self._task(task.round, index))
            index += 1
        return tuple(delta for other, delta in self._raw.items() if other.round == task.round)

    def _task(self, round_number: int, index: int) -> Task:
        return Task(unit=self._small.unit(round_number, index).id, round=round_number, index=index)

    def blob(self, digest: str) -> Path:
        """Return where a delta lies."""
        return self._folder / "blobs" / digest

    def container(self, unit: str, digest: str) -> Container:
        """Return a stored delta."""
        return Container.open(self.blob(digest), self._schema, self._codec, bytes.fromhex(unit))

    # --- looks at them ---------------------------------------------------------------------------------------

    def sketch(self, task: Task, artifact: Artifact, seed: Digest, /) -> bytes:
        """See `Physics`."""
        chunks = self.container(task.unit, artifact.blob_sha256).decoded_chunks()
        with np.errstate(over="ignore", invalid="ignore"):
            values: Floats = sketch(chunks, bytes.fromhex(seed))
        # What is no delta has no sketch that the coordinator takes; its maker sends something that it does.
        return np.nan_to_num(values, posinf=0.0, neginf=0.0).astype("<f4").tobytes()

    def admit(self, task: Task, expected: Expected, /) -> None:
        """See `Physics`."""
        job: settler.Job = {
            "path": str(self.blob(expected.artifact.blob_sha256)),
            "unit": task.unit,
            "artifact": asdict(expected.artifact),
            "file_digest": expected.artifact.blob_sha256,
        }
        if expected.sketch is not None:
            job["sketch"] = {"seed": expected.sketch[0], "value": expected.sketch[1].hex()}
        settler.admit(self.config, job)

    def difference(self, due: ComparisonDue) -> float:
        """See `Physics`."""
        job = {
            "path": str(self.blob(due.blob_sha256)),
            "unit": due.unit,
            "seed": due.seed,
            "sketch": due.sketch.hex(),
        }
        return float(settler.compare(self.config, job)["difference"])

    def replay(self, task: Task, artifact: Artifact, /) -> Comparison:
        """See `Physics`."""
        seed = unit_spec_of(self.config, task.round, task.unit).seed
        raw: Mapping[str, Floats] = self.honest(task)
        own = encode(raw, self._schema, self._codec, seed)
        return compare(self.container(task.unit, artifact.blob_sha256), own, raw, seed)

    def weigh(self, plan: MergePlan) -> Weighed:
        """See `Physics`."""
        if self._blind is not None:
            return self._weigh_blindly(plan, self._blind)
        job = {
            "base": str(self._checkpoint(plan.round - 1)),
            "heldout": str(self._heldout),
            "heldout_without": (),
            "seed": plan.seed,
            "entries": [{**asdict(entry), "path": str(self.blob(entry.blob_sha256))} for entry in plan.entries],
        }
        answer = weigh(self.config, job)
        return Weighed(outliers=answer["outliers"], weights=answer["weights"])

    def _weigh_blindly(self, plan: MergePlan, rules: Verification) -> Weighed:
        """Weigh everything by a rule, and have nothing looked at."""
        assert plan.seed is not None  # the run replays
        seed = bytes.fromhex(plan.seed)
        weighings = [weigh_delta(self.container(entry.unit, entry.blob_sha256), seed) for entry in plan.entries]
        weights = merge_weights(
            [Candidate.of(entry) for entry in plan.entries],
            rules=self.config.rounds,
            verification=rules,
            sketches=[weighing.sketch for weighing in weighings] if needs_sketches(rules) else None,
            norms2=[weighing.norm2 for weighing in weighings],
        )
        claims = [entry.claim for entry in plan.entries]
        return Weighed(outliers={}, weights=dict(zip(claims, weights, strict=True)))
