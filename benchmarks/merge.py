"""Weighing and merging 8, 32 and 128 deltas: speed, what robust weights cost beside the plain merge, and whether memory
grows with the number of deltas (it must not).

    python -m benchmarks.merge [--quick]

Each count runs in a process of its own, whose peak resident memory is measured by the kernel. The deltas are hard links
to a few real containers: a merge reads each of them through its own path.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks.report import Report
from diloco.checkpoint import write_checkpoint
from diloco.codec import CodecConfig, encode
from diloco.container import Container, write_container
from diloco.merge import (
    MergeFiles,
    MergeInput,
    MergeRules,
    OuterConfig,
    OuterState,
    merge_round,
    normalise_weights,
)
from diloco.patch import PatchConfig
from diloco.schema import Schema, schema_of
from diloco.streams import Stream
from diloco.tables import Floats
from diloco.weigh import weigh_delta
from mmdit.config import MMDiTConfig
from protocol.canonical import sha256_hex
from protocol.documents import Digest, Rounds, Verification
from verify.policy import ONE
from verify.weights import Candidate, merge_weights

COUNTS: Final = (8, 32, 128)
DISTINCT: Final = 4
MEMORY_GROWTH: Final = 1.10
WEIGHING_SHARE: Final = 0.10
CODEC: Final = CodecConfig(kind="dither", levels=1, block=1024, reach=704, width=64)
UNIT_ID: Final = bytes(32)
SEED: Final = bytes(range(32))
ROUNDS: Final = Rounds(
    planned=1,
    units=max(COUNTS),
    shards_per_unit=1,
    max_bytes_per_unit=2**30,
    min_window_ms=0,
    min_units=1,
    staleness_bound=0,
    staleness_discount=0,
    lease_ms=1_000,
    upload_ms=1_000,
    stages=(),
)
VERIFICATION: Final = Verification(
    mode="replay",
    tolerance=1e-3,
    code_tolerance=0.02,
    probation=20,
    floor=ONE // 20,
    referee_share=ONE // 10,
    ramp=50,
    owner_cap=ONE // 4,
    weighting="nnm-clip",
    hostile_share=ONE * 2 // 5,
    unmerge_from=0.5,
    norm_bound=3.0,
    screen_triples=0,
    evidence_sha256=None,
)


def config(*, quick: bool) -> MMDiTConfig:
    """Return a model of about 2 million parameters, or of about 22."""
    heads = 4 if quick else 10
    return MMDiTConfig(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3 if quick else 6,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=256,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(),
    )


def normals(schema: Schema, seed: bytes, scale: float) -> dict[str, Floats]:
    return {
        spec.name: (Stream(seed, spec.name).normal(0, 0, spec.num_elements) * np.float32(scale)).reshape(spec.shape)
        for spec in schema.tensors
    }


def prepare(directory: Path, schema: Schema) -> float:
    """Write base, momentum and the distinct containers; return the encoder's speed in GB/s of fp32."""
    write_checkpoint(directory / "base", normals(schema, bytes(32), 1.0))
    write_checkpoint(directory / "momentum", normals(schema, bytes([1]) * 32, 1e-3))
    seconds = 0.0
    for number in range(DISTINCT):
        delta = normals(schema, bytes([2 + number]) * 32, 1e-3)
        start = time.perf_counter()
        encoded = encode(delta, schema, CODEC, bytes([number]) * 32)
        seconds += time.perf_counter() - start
        write_container(directory / f"distinct{number}", encoded, UNIT_ID)
    for number in range(max(COUNTS)):
        os.link(directory / f"distinct{number % DISTINCT}", directory / f"{number}.delta")
    return DISTINCT * 4 * schema.num_elements / seconds / 1e9


def robust_weights(containers: list[Container]) -> tuple[int, ...]:
    """Weigh deltas as a run does that replays: sketches, Gram matrix, the run's rule, clips and caps."""
    weighings = [weigh_delta(container, SEED) for container in containers]
    candidates = [
        Candidate(
            claim=Digest(sha256_hex(b"%d" % number)),
            samples=1,
            late=0,
            influence=ONE,
            audited=False,
            member=Digest(sha256_hex(b"member %d" % number)),
        )
        for number in range(len(containers))
    ]
    return merge_weights(
        candidates,
        rules=ROUNDS,
        verification=VERIFICATION,
        sketches=[weighing.sketch for weighing in weighings],
        norms2=[weighing.norm2 for weighing in weighings],
    )


def merge(directory: Path, count: int, *, quick: bool) -> None:
    """Open, check, weigh and merge `count` deltas in this process; print the measurements as JSON."""
    schema = schema_of(config(quick=quick))
    torch.set_num_threads(1)
    before = peak_mib()
    start = time.perf_counter()
    containers = [Container.open(directory / f"{number}.delta", schema, CODEC, UNIT_ID) for number in range(count)]
    for container in containers:
        container.check_finite()
    checked = time.perf_counter()
    robust_weights(containers)
    weighed = time.perf_counter()
    claims = [hashlib.sha256(number.to_bytes(4, "little")).digest() for number in range(count)]
    weights = normalise_weights([1] * count, claims)
    inputs = [
        MergeInput(claim_digest=claim, container=container, weight=weight)
        for claim, container, weight in zip(claims, containers, weights, strict=True)
    ]
    rules = MergeRules(
        outer=OuterConfig(lr=0.7, momentum=0.9), patch=PatchConfig(block=1024, threshold=256), schema=schema
    )
    base = OuterState(
        weights=directory / "base", weights_sha256=bytes(32), momentum=directory / "momentum", residual=None
    )
    out = MergeFiles(weights=directory / "w", momentum=directory / "m", residual=directory / "r", patch=directory / "p")
    merge_round(base, inputs, rules, out)
    merged = time.perf_counter()
    measured = {
        "check_s": checked - start,
        "weigh_s": weighed - checked,
        "merge_s": merged - weighed,
        "peak_mib": peak_mib(),
        "before_mib": before,
    }
    sys.stdout.write(json.dumps(measured))


def peak_mib() -> float:
    """Return this process's largest resident memory; `getrusage` would give the parent's, which survives exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not report VmHWM")


def measure(directory: Path, count: int, *, quick: bool) -> dict[str, float]:
    """Run `merge` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.merge", "--merge", str(count), "--directory", str(directory)]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def main() -> int:
    """Run the benchmark; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model; writes no result file")
    parser.add_argument("--merge", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge is not None:
        merge(arguments.directory, arguments.merge, quick=arguments.quick)
        return 0
    report = Report(name="merge")
    schema = schema_of(config(quick=arguments.quick))
    peaks: dict[int, float] = {}
    shares: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        encode_speed = prepare(Path(directory), schema)
        for count in COUNTS:
            measured = measure(Path(directory), count, quick=arguments.quick)
            gigabytes = count * 4 * schema.num_elements / 1e9
            peaks[count] = measured["peak_mib"]
            shares[count] = measured["weigh_s"] / measured["merge_s"]
            report.add_row(
                deltas=count,
                parameters=schema.num_elements,
                encode_gb_per_s=encode_speed,
                check_gb_per_s=gigabytes / measured["check_s"],
                merge_gb_per_s=gigabytes / measured["merge_s"],
                merge_s=measured["merge_s"],
                weigh_s=measured["weigh_s"],
                weigh_share=shares[count],
                peak_mib=measured["peak_mib"],
                before_mib=measured["before_mib"],
            )
    report.add_target(
        f"time of robust weighing against that of the plain merge, {max(COUNTS)} deltas",
        target=f"at most {WEIGHING_SHARE:.2f}",
        value=shares[max(COUNTS)],
        met=shares[max(COUNTS)] <= WEIGHING_SHARE,
    )
    growth = peaks[max(COUNTS)] / peaks[min(COUNTS)]
    report.add_target(
        f"peak memory of merging {max(COUNTS)} deltas against {min(COUNTS)}",
        target=f"at most {MEMORY_GROWTH:.2f} times",
        value=growth,
        met=growth <= MEMORY_GROWTH,
    )
    return 0 if report.finish(quick=arguments.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
