"""Running a unit again and comparing a claim's delta with it: what an auditor signs, and what a volunteer repeats.

All of it blocks; torch is imported on first use. A verdict needs the raw delta of this machine's own run, which is
never stored: a referee that stops has to run the unit again.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from protocol.assignment import unit_seed
from protocol.documents import Artifact, Digest, Opinion, RunConfig, RunId, UnitId, sign
from protocol.errors import BytesRefused, DeltaSchemaMismatch
from protocol.layout import ROLE_DELTA
from worker.audit_client import ClaimToJudge
from worker.machine import Machine
from worker.materials import Materials
from worker.trainer import OnStep, compute_unit

if TYPE_CHECKING:
    from diloco.codec import EncodedDelta
    from diloco.tables import Floats

INADMISSIBLE: Final = 1e9
"""Both differences of a claim whose bytes no encoder writes: they are no delta that could be compared with anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A unit as this machine computes it: its delta before and after encoding, its trail, and how long it took."""

    raw: Mapping[str, "Floats"]
    encoded: "EncodedDelta"
    trail_root: bytes
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a comparison gave. `problem` is why the bytes are no delta of the run, if they are not; else empty."""

    finding: Literal["confirmed", "refuted"]
    raw_difference: float
    code_difference: float
    problem: str = ""


def replay(
    config: RunConfig,
    round_number: int,
    unit: UnitId,
    materials: Materials,
    *,
    device: str,
    on_step: OnStep,
) -> Replay:
    """Run a unit again; see `worker.trainer.compute_unit` for what may go wrong."""
    from diloco.codec import encode
    from verify.replay import codec_config, delta_schema

    started = time.monotonic()
    result = compute_unit(config, round_number, unit, materials, device=device, on_step=on_step)
    seed = bytes.fromhex(unit_seed(unit))
    return Replay(
        raw=result.delta,
        encoded=encode(result.delta, delta_schema(config), codec_config(config), seed),
        trail_root=result.trail.root,
        seconds=time.monotonic() - started,
    )


def delta_artifact(config: RunConfig, artifacts: Sequence[Artifact]) -> Artifact:
    """Return a claim's delta, if it is no larger than the run's model allows: no more than that is fetched.

    Raises:
        DeltaSchemaMismatch: the claim has no such artifact.
    """
    from diloco.container import largest_container
    from verify.replay import codec_config, delta_schema

    size = largest_container(delta_schema(config), codec_config(config))
    for artifact in artifacts:
        if artifact.role == ROLE_DELTA and artifact.size <= size:
            return artifact
    raise DeltaSchemaMismatch(f"The claim has no delta of at most {size:,} bytes, as the run's model implies.")


def artifact_of(path: Path, config: RunConfig, unit: UnitId) -> Artifact:
    """Return what a claim would say of a container.

    Raises:
        BytesRefused: size or header are not those of a delta of this unit.
    """
    from diloco.container import Container
    from verify.plain_files import file_sha256
    from verify.replay import codec_config, delta_schema

    container = Container.open(path, delta_schema(config), codec_config(config), bytes.fromhex(unit))
    return Artifact(
        role=ROLE_DELTA,
        content_sha256=container.content_digest().hex(),
        blob_sha256=file_sha256(path),
        size=path.stat().st_size,
    )


def judge_file(config: RunConfig, unit: UnitId, artifact: Artifact, path: Path, own: Replay) -> Found:
    """Compare a claim's container with one's own run of the unit.

    Bytes that are the claimed ones and still no delta of the run are refuted: the device signed for them.
    """
    from diloco.container import Container
    from verify.admission import admit_delta
    from verify.compare import compare, judge
    from verify.replay import codec_config, delta_schema

    try:
        admit_delta(path, config=config, unit=unit, artifact=artifact)
    except BytesRefused as refusal:
        return inadmissible(refusal)
    container = Container.open(path, delta_schema(config), codec_config(config), bytes.fromhex(unit))
    compared = compare(container, own.encoded, own.raw, bytes.fromhex(unit_seed(unit)))
    return Found(
        finding=judge(compared, config.verification),
        raw_difference=compared.raw_difference,
        code_difference=compared.code_difference,
    )


def inadmissible(refusal: BytesRefused) -> Found:
    """Return the finding on a claim whose bytes are no delta of the run."""
    return Found(finding="refuted", raw_difference=INADMISSIBLE, code_difference=INADMISSIBLE, problem=refusal.message)


def opinion_on(judged: ClaimToJudge, found: Found, own: Replay, *, run: RunId, machine: Machine) -> bytes:
    """Return the signed opinion on a claim; `machine.key` is the auditor's."""
    opinion = Opinion(
        run=run,
        claim=judged.digest,
        unit=judged.claim.unit,
        auditor=machine.key.public.key_id,
        finding=found.finding,
        raw_difference=found.raw_difference,
        code_difference=found.code_difference,
        trail_agrees=trail_agrees(judged.claim.trail_root, own),
        content_sha256=Digest(own.encoded.content_digest().hex()),
        seconds=own.seconds,
        trainer_version=machine.trainer_version,
        device_class=machine.device_class,
    )
    return sign(opinion, machine.key)


def trail_agrees(trail_root: str, own: Replay) -> bool:
    """Return whether a claimed trail is this machine's own: a shortcut where it is, and nothing where it is not."""
    return trail_root == own.trail_root.hex()
