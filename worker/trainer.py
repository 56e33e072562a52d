"""Training a leased unit, and what is computed from a finished delta. All of it blocks; torch is imported on first use.

Everything of one process trains in one thread, so that precision and thread settings hold for it.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from protocol.documents import Artifact, Claim, ClaimReceipt, Digest, Lease, RunConfig, UnitId, digest_of, sign
from protocol.errors import AnswerInvalid, CheckpointCorrupt, DeltaTruncated, MemoryTooSmall
from protocol.keys import PrivateKey
from protocol.layout import ROLE_DELTA
from worker.materials import Materials
from worker.progress import Planned

if TYPE_CHECKING:
    from diloco.codec import EncodedDelta
    from diloco.determinism import PrecisionReport
    from diloco.unit import UnitResult

OnStep = Callable[[int, int, float], None]
"""Told step (from 1), steps and loss after each step; may raise to abandon the unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedUnit:
    """A unit's encoded delta and what its claim says of it."""

    encoded: "EncodedDelta"
    trail_root: bytes
    loss: float
    samples: int
    seconds: float


class Trainer(Protocol):
    """What makes a unit's result on this machine: `train_unit`."""

    def __call__(
        self, config: RunConfig, lease: Lease, materials: Materials, *, device: str, on_step: OnStep
    ) -> TrainedUnit:
        """Train a leased unit; see `train_unit`."""
        ...


def prepare(device: str, threads: int) -> "PrecisionReport":
    """Import torch, check that this machine computes canonical bytes, and set the process up to train. Once.

    Raises:
        SelfTestFailed: this machine must not train.
    """
    from diloco.determinism import selftest, set_precision

    selftest()
    return set_precision(device, threads)


def plan_for(config: RunConfig, networks: Path | None, device: str) -> Planned:
    """Return how units would be trained in the memory that is free now; each plans for itself when it begins.

    Args:
        networks: see `Materials`.

    Raises:
        MemoryTooSmall: they can't be.
        NetworksMissing: the run needs text encoders here, and they are not there.
    """
    from verify.networks import encode_for
    from worker.plan import plan_unit, room_of, work_of

    encode_for(config, networks, device)  # they stay in the device's memory
    plan = plan_unit(work_of(config), room_of(device))
    return Planned(
        parts=plan.execution.parts,
        checkpointing=plan.execution.checkpointing,
        keeping=plan.execution.keeping,
        device_bytes=plan.device_bytes,
        host_bytes=plan.host_bytes,
        sentence=plan.sentence(),
    )


def train_unit(config: RunConfig, lease: Lease, materials: Materials, *, device: str, on_step: OnStep) -> TrainedUnit:
    """Train a unit and encode its delta.

    Raises:
        AnswerInvalid: the lease does not let a delta of this run's size be uploaded.
        MemoryTooSmall: see `compute_unit`, like all else.
    """
    from diloco.codec import encode
    from verify.replay import codec_config, delta_schema, unit_spec

    _check_allowed_size(config, lease)
    started = time.monotonic()
    result = compute_unit(config, lease.round, UnitId(lease.unit), materials, device=device, on_step=on_step)
    return TrainedUnit(
        encoded=encode(result.delta, delta_schema(config), codec_config(config), unit_spec(config, lease).seed),
        trail_root=result.trail.root,
        loss=result.loss_last,
        samples=result.samples,
        seconds=time.monotonic() - started,
    )


def compute_unit(
    config: RunConfig,
    round_number: int,
    unit: UnitId,
    materials: Materials,
    *,
    device: str,
    on_step: OnStep,
) -> "UnitResult":
    """Run a unit, for the first time or again; who trains it and who judges it compute the same.

    Raises:
        TrainingDiverged, DeltaNotFinite: the result is of no use.
        CheckpointCorrupt, ShardCorrupt: the files do not have the form that the run promises.
        NumericsMismatch: this version would compute another unit.
        MemoryTooSmall: this machine has not enough memory.
        NetworksMissing: the run needs text encoders here, and they are not there.
        PayloadInvalid: the run's config describes something that this version can't build.
    """
    import torch

    from diloco.checkpoint import TensorFile
    from diloco.unit import run_unit
    from verify.replay import check_numerics, model_config, unit_spec_of
    from worker.plan import GB, plan_unit, room_of, work_of

    check_numerics(config)
    spec, model = unit_spec_of(config, round_number, unit), model_config(config)
    # First, since any text encoders stay in the device's memory.
    samples = materials.shard_set(config, device)
    plan = plan_unit(work_of(config), room_of(device))
    tensors = TensorFile.open(materials.base).load()
    try:
        return run_unit(
            spec,
            model,
            tensors,
            samples,
            device=device,
            on_step=lambda report: on_step(report.step, report.steps, report.loss),
            execution=plan.execution,
        )
    except ValueError as error:
        raise CheckpointCorrupt(f"The base checkpoint does not fit the run's model: {error}.") from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryTooSmall(
            f"There was not enough memory on {device} for a unit, though {plan.device_bytes / GB:.2f} GB were to be "
            f"enough. Close other programs and start again; if that does not help, report it: {error}"
        ) from None


def _check_allowed_size(config: RunConfig, lease: Lease) -> None:
    from diloco.container import largest_container
    from verify.replay import codec_config, delta_schema

    size = largest_container(delta_schema(config), codec_config(config))
    if any(limit.role == ROLE_DELTA and limit.max_bytes < size for limit in lease.artifacts):
        raise AnswerInvalid(f"The lease allows less than the {size:,} bytes that a delta of this run may have.")


def write_delta(trained: TrainedUnit, lease: Lease, path: Path) -> None:
    """Write the delta's container and wait until the disk has it."""
    from diloco.container import write_container

    write_container(path, trained.encoded, bytes.fromhex(lease.unit))


def make_claim(
    trained: TrainedUnit,
    lease: Lease,
    lease_sha256: Digest,
    delta: Path,
    *,
    key: PrivateKey,
    salt: bytes,
    trainer_version: str,
    device_class: str,
) -> tuple[Digest, bytes]:
    """Commit to a written delta; return the claim's digest and signed envelope.

    Args:
        lease_sha256: of the lease's payload as it was signed, which may hold members that this version does not know.
        salt: 32 random bytes, which keep the claim's digest from being guessed before its epoch is revealed.
    """
    with delta.open("rb") as file:
        blob_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    artifact = Artifact(
        role=ROLE_DELTA,
        content_sha256=trained.encoded.content_digest().hex(),
        blob_sha256=blob_sha256,
        size=delta.stat().st_size,
    )
    claim = Claim(
        run=lease.run,
        lease=lease.lease,
        lease_sha256=lease_sha256,
        unit=lease.unit,
        device=lease.device,
        artifacts=(artifact,),
        trail_root=trained.trail_root.hex(),
        salt=salt.hex(),
        samples=trained.samples,
        loss=trained.loss,
        trainer_version=trainer_version,
        device_class=device_class,
    )
    return digest_of(claim), sign(claim, key)


def sketch_delta(config: RunConfig, claim: Claim, receipt: ClaimReceipt, path: Path) -> bytes:
    """Return the sketch of a written delta under the seed of its claim's receipt: 1,024 little-endian fp32.

    Raises:
        BytesRefused: the file is not the delta that was claimed any more.
    """
    from diloco.container import Container
    from diloco.sketch import sketch
    from verify.replay import codec_config, delta_schema

    check_size(path, claim.artifacts[0])
    container = Container.open(path, delta_schema(config), codec_config(config), bytes.fromhex(claim.unit))
    return sketch(container.decoded_chunks(), bytes.fromhex(receipt.sketch_seed)).astype("<f4").tobytes()


def check_size(path: Path, artifact: Artifact) -> None:
    """Raise `DeltaTruncated` if a file of the spool is gone or has another size than was claimed."""
    size = path.stat().st_size if path.exists() else 0
    if size != artifact.size:
        raise DeltaTruncated(f"{path} has {size:,} bytes; {artifact.size:,} were claimed. The disk has lost some.")


def file_is(path: Path, artifact: Artifact) -> bool:
    """Return whether a file still has the bytes that were claimed."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == artifact.blob_sha256
    except OSError:
        return False
