"""How many bytes deltas and patches take, and how quickly they are made and read.

A delta of a model of 21 million parameters is encoded, written, opened, checked and decoded, for some settings of the
codec; a patch likewise. Bytes are those of the files, headers and tables included.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks.report import Report
from diloco.codec import CodecConfig, chunk_ranges, encode
from diloco.container import Container, write_container
from diloco.patch import PatchConfig, PatchWriter, open_patch, round_step
from diloco.schema import Schema, schema_of
from diloco.streams import Stream
from diloco.tables import Floats
from mmdit.config import MMDiTConfig

UP_TARGET: Final = 0.15
DOWN_TARGET: Final = 0.17
SPEED_TARGET: Final = 0.2
"""GB of fp32 a second and core, encoding and decoding."""
REPEATS: Final = 3
SEED: Final = bytes(range(32))
PATCH: Final = PatchConfig(block=1024, threshold=326)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A setting of the codec, and what to call it."""

    name: str
    codec: CodecConfig


def _case(name: str, levels: int, block: int, reach: float, width: float) -> Case:
    codec = CodecConfig(kind="dither", levels=levels, block=block, reach=round(256 * reach), width=round(256 * width))
    return Case(name=name, codec=codec)


CASES: Final = (
    _case("ternary, the default", 1, 1024, 2.75, 0.25),
    _case("ternary, without bias", 1, 1024, 4.5, 1.0),
    _case("ternary, to the nearest", 1, 1024, 2.0, 0.0),
    _case("5 levels", 2, 1024, 4.0, 0.5),
    _case("15 levels (4 bits)", 7, 1024, 5.0, 1.0),
    _case("255 levels (8 bits)", 127, 1024, 6.0, 1.0),
)


def model(*, quick: bool) -> Schema:
    """Return the tensors of the benchmark's model."""
    heads = 2 if quick else 6
    config = MMDiTConfig(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2 if quick else 8,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(),
    )
    return schema_of(config)


def made_up_delta(schema: Schema) -> dict[str, Floats]:
    """Return a delta whose values are spread like those of trained ones: normal, with other scales in other rows."""
    delta = {}
    for spec in schema.tensors:
        values = Stream(SEED, f"init/{spec.name}").normal(0, 0, spec.num_elements).reshape(spec.shape or (1,))
        rows = Stream(SEED, f"init/rows/{spec.name}").normal(0, 0, len(values))
        loud = np.exp2(rows).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
        delta[spec.name] = (values * loud * np.float32(1e-3)).astype(np.float32).reshape(spec.shape)
    return delta


def best(work: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of some runs: what the machine can do when nobody else is at it."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure_delta(
    report: Report, case: Case, delta: dict[str, Floats], schema: Schema, folder: Path, repeats: int
) -> float:
    """Add the row of a setting; return its bytes a parameter."""
    gigabytes = 4 * schema.num_elements / 1e9
    path = folder / "delta"
    coded = encode(delta, schema, case.codec, SEED)
    write_container(path, coded, SEED)
    opened = Container.open(path, schema, case.codec, SEED)
    size = path.stat().st_size / schema.num_elements
    decoded = coded.decoded()
    error = sum(float(np.sum((decoded[n] - delta[n]).astype(np.float64) ** 2)) for n in delta)
    energy = sum(float(np.sum(values.astype(np.float64) ** 2)) for values in delta.values())
    encoding = best(lambda: encode(delta, schema, case.codec, SEED), repeats)
    writing = best(lambda: write_container(folder / "again", coded, SEED), repeats)
    checking = best(opened.check_finite, repeats)
    reading = best(lambda: [None for _ in opened.decoded_chunks()], repeats)
    report.add_row(
        what=case.name,
        bytes_per_parameter=size,
        bits_per_parameter=8 * size,
        relative_error=(error / energy) ** 0.5,
        encode_GB_s=gigabytes / encoding,
        pack_and_write_GB_s=gigabytes / writing,
        check_GB_s=gigabytes / checking,
        unpack_and_decode_GB_s=gigabytes / reading,
    )
    return size


def measure_patch(report: Report, step: dict[str, Floats], schema: Schema, folder: Path, repeats: int) -> float:
    """Add the row of a patch after some rounds of the same step, when what waits has settled; return its bytes."""
    gigabytes = 4 * schema.num_elements / 1e9
    waiting = {name: np.zeros(values.size, dtype=np.float32) for name, values in step.items()}
    path = folder / "patch"
    spent = 0.0
    for number in range(6):
        turned = {name: np.roll(values.reshape(-1), 7919 * number) for name, values in step.items()}
        started = time.perf_counter()
        with PatchWriter(path, schema, PATCH, SEED) as writer:
            for spec in schema.tensors:
                for start, stop in chunk_ranges(spec.num_elements):
                    total = waiting[spec.name][start:stop] + turned[spec.name][start:stop]
                    rounded = round_step(total, PATCH, spec.name)
                    waiting[spec.name][start:stop] = rounded.residual
                    writer.write(rounded)
        spent = time.perf_counter() - started
    opened = open_patch(path, schema, PATCH, SEED)
    left = sum(float(np.sum(values.astype(np.float64) ** 2)) for values in waiting.values())
    energy = sum(float(np.sum(values.astype(np.float64) ** 2)) for values in step.values())
    size = path.stat().st_size / schema.num_elements
    report.add_row(
        what="patch, threshold 1.275",
        bytes_per_parameter=size,
        bits_per_parameter=8 * size,
        relative_error=(left / energy) ** 0.5,
        encode_GB_s=gigabytes / spent,
        pack_and_write_GB_s=None,
        check_GB_s=gigabytes / best(opened.check_finite, repeats),
        unpack_and_decode_GB_s=gigabytes / best(lambda: [None for _ in opened.decoded_chunks()], repeats),
    )
    return size


def main() -> int:
    """Run the benchmark; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, once; write nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    schema = model(quick=quick)
    repeats = 1 if quick else REPEATS
    report = Report(name="codec")
    delta = made_up_delta(schema)
    with tempfile.TemporaryDirectory() as name:
        sizes = [measure_delta(report, case, delta, schema, Path(name), repeats) for case in CASES]
        down = measure_patch(report, delta, schema, Path(name), repeats)
    report.add_target(
        f"bytes a parameter up, of {schema.num_elements:,}, everything included",
        target=f"at most {UP_TARGET}",
        value=sizes[0],
        met=sizes[0] <= UP_TARGET,
    )
    report.add_target(
        "bytes a parameter down, everything included",
        target=f"at most {DOWN_TARGET}",
        value=down,
        met=down <= DOWN_TARGET,
    )
    for what, column in (("encoding", "encode_GB_s"), ("unpacking and decoding", "unpack_and_decode_GB_s")):
        slowest = min(float(row[column] or 0.0) for row in report.rows)
        report.add_target(
            f"slowest {what}, GB of fp32 a second on one core",
            target=f"at least {SPEED_TARGET}",
            value=slowest,
            met=slowest >= SPEED_TARGET,
        )
    return 0 if report.finish(quick=quick) else 1


if __name__ == "__main__":
    sys.exit(main())
