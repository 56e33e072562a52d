"""The running average of a run's checkpoints (EMA): smoother weights to draw with; nobody trains from them.

    share_r = 1 - min(decay, (1 + r) / (10 + r))            r = the checkpoint's number, from 1
    ema_r   = ema_(r-1) + share_r (theta_r - ema_(r-1))     ema_0 = theta_0

The decay begins low, so that the first checkpoints, which know little, are soon forgotten. Every operation is one
separate numpy fp32 call: the same bytes on every machine.
"""

from math import prod
from pathlib import Path

import numpy as np

from diloco.checkpoint import FileDigest, TensorFile, TensorFileWriter
from diloco.codec import chunk_ranges
from diloco.tables import Floats
from protocol.errors import CheckpointCorrupt


def average_share(decay: float, checkpoint: int) -> np.float32:
    """Return how much of the newest checkpoint goes into the average.

    Raises:
        ValueError: a decay outside of 0..1, or a checkpoint before the first merge.
    """
    if not 0.0 <= decay < 1.0 or checkpoint < 1:
        raise ValueError(
            f"decay {decay} at checkpoint {checkpoint}; it must be from 0 to below 1, from checkpoint 1 on"
        )
    return np.float32(1.0 - min(decay, (1 + checkpoint) / (10 + checkpoint)))


def average(ema: Floats, weights: Floats, share: np.float32) -> Floats:
    """Return the average after one more checkpoint; any shape, fp32; nothing is changed in place."""
    moved = np.subtract(weights, ema)
    np.multiply(moved, share, out=moved)
    return np.add(ema, moved, out=moved)


def average_round(ema: Path, weights: Path, out: Path, share: np.float32) -> FileDigest:
    """Write the average that follows from the one before and a checkpoint's weights, fsynced.

    Args:
        ema: the average before, or checkpoint 0's weights.
        weights: the checkpoint's weights.
        out: a temporary path; the caller renames it into place.

    Raises:
        CheckpointCorrupt: the two files hold different tensors.
    """
    before, now = TensorFile.open(ema), TensorFile.open(weights)
    if before.shapes != now.shapes:
        raise CheckpointCorrupt(f"{ema.name} and {weights.name} hold different tensors; fetch them again.")
    with TensorFileWriter(out, now.shapes) as writer:
        for name, shape in now.shapes.items():
            for start, stop in chunk_ranges(prod(shape)):
                writer.write(name, average(before.read(name, start, stop), now.read(name, start, stop), share))
    assert writer.digest is not None
    return writer.digest
