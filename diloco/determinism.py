"""Does this machine compute canonical bytes, and is it set up to train as the run says?"""

import ctypes
import hashlib
import sys
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from diloco.codec import CodecConfig, encode
from diloco.merge import OuterConfig, outer_step
from diloco.patch import PatchConfig, round_step
from diloco.schema import Schema, TensorSpec
from diloco.sketch import sketch
from diloco.streams import Stream
from diloco.tables import Floats, logit_normal_table
from protocol.errors import SelfTestFailed

GOLDEN: Final = "8b4693eb9c2d1af93217915e7d5469ad1a83f16d4ef93ec03447ef019d684d25"
"""SHA-256 that `selftest_digest` gives on every right machine; part of `NUMERICS`."""
_SUBNORMAL: Final = np.float32(2.0**-140)
# From glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionReport:
    """How this process trains: device, CPU threads, whether repeated runs give equal bits, and why."""

    device: str
    threads: int
    bitwise_repeatable: bool
    reason: str


def selftest() -> None:
    """Encode, merge and sketch a small example and compare with the golden digest; takes some milliseconds.

    Raises:
        SelfTestFailed: this machine rounds differently, or flushes subnormal numbers to zero.
    """
    found = selftest_digest()
    if found != GOLDEN:
        raise SelfTestFailed(
            "This machine does not compute the golden merge to the same bits "
            f"(got {found[:16]}, expected {GOLDEN[:16]}); its work could not be checked. "
            "Something may have switched the processor to flush small numbers to zero; a fresh process may help."
        )


def selftest_digest() -> str:
    """Return the digest of all that the example computes in two rounds: codes, scales, sketches, weights, momentum."""
    shape = (37, 41)
    schema = Schema(tensors=(TensorSpec(name="example", shape=shape),))
    codec = CodecConfig(kind="dither", levels=1, block=256, reach=704, width=128)
    seed = hashlib.sha256(b"commonweight/selftest/v1").digest()
    # Products of table entries spread the magnitudes, so that sums really have to round.
    source = Stream(seed, "init/example")
    size = 37 * 41
    theta = source.normal(0, 0, size) * logit_normal_table()[source.u16(0, 1, size)]
    v = source.normal(0, 2, size) * np.float32(1e-3)
    v[::7] = _SUBNORMAL  # a machine that flushes subnormals loses these
    hasher = hashlib.sha256()
    outer, patch = OuterConfig(lr=0.7, momentum=0.9), PatchConfig(block=256, threshold=192)
    residual = np.zeros_like(theta)
    for round_number in (1, 2):
        weighted: list[tuple[int, Floats]] = []
        for index in range(3):
            delta = source.normal(round_number, index, size) * np.float32(1e-3 / (index + 1))
            encoded = encode({"example": delta.reshape(shape)}, schema, codec, bytes([round_number * 16 + index]) * 32)
            for part in encoded.data():
                hasher.update(part)
            decoded = encoded.decoded()["example"].reshape(-1)
            hasher.update(sketch([decoded], seed).astype("<f4").tobytes())
            weighted.append((5_592_405 + index, decoded))
        # Beside the deltas, elements that only momentum moves: here it stays subnormal.
        for _, decoded in weighted:
            decoded[::7] = 0.0
        step, v = outer_step(v, weighted, outer)
        rounded = round_step(np.add(residual, step), patch, "example")
        theta, residual = np.subtract(theta, rounded.patch), rounded.residual
    for values in (theta, v, residual):
        hasher.update(values.astype("<f4").tobytes())
    return hasher.hexdigest()


def set_precision(device: str, threads: int) -> PrecisionReport:
    """Set the process up to train in true fp32 or bf16: no TF32, no sums in bf16, no flushing of subnormals.

    Deterministic algorithms are not forced: where they cost (up to twice the time on GPUs) they buy nothing, since
    replays are judged by tolerance.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads for torch.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    # Covers all matrix products; the patch embedding is one of them, so no convolution, with a switch of its own, runs.
    torch.set_float32_matmul_precision("highest")
    _keep_freed_memory()
    if device == "cpu":
        return PrecisionReport(
            device=device,
            threads=threads,
            bitwise_repeatable=True,
            reason="CPU kernels split and add in a fixed order for a fixed number of threads",
        )
    torch.backends.cudnn.benchmark = False
    # Products of bf16 matrices that are summed in parts would add the parts in bf16, differently on each kind of GPU.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return PrecisionReport(
        device=device,
        threads=threads,
        bitwise_repeatable=False,
        reason="attention's backward pass on GPUs may add in any order; forcing an order costs more than it buys",
    )


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step.

    By default it gives large blocks back to the system, which clears each page anew before it is used again: 4 % of the
    time of a step of 77 million parameters. Other allocators are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
