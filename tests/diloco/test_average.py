"""The running average of checkpoints."""

from pathlib import Path

import numpy as np
import pytest

from diloco.average import average, average_round, average_share
from diloco.checkpoint import TensorFile, write_checkpoint
from diloco.tables import Floats
from protocol.errors import CheckpointCorrupt


def _tensors(seed: int) -> dict[str, Floats]:
    random = np.random.Generator(np.random.PCG64(seed))
    return {
        "a": random.standard_normal((3, 700_001)).astype(np.float32),  # more than one chunk
        "b.bias": random.standard_normal(5).astype(np.float32),
    }


def test_the_first_checkpoints_are_soon_forgotten_and_later_ones_at_the_runs_decay() -> None:
    assert float(average_share(0.9, 1)) == pytest.approx(1 - 2 / 11)
    assert float(average_share(0.9, 71)) == pytest.approx(1 - 72 / 81)
    assert average_share(0.9, 1000) == average_share(0.9, 10_000) == np.float32(1.0 - 0.9)
    shares = [float(average_share(0.9, checkpoint)) for checkpoint in range(1, 100)]
    assert shares == sorted(shares, reverse=True)
    for decay, checkpoint in ((1.0, 1), (-0.1, 1), (0.9, 0)):
        with pytest.raises(ValueError, match="from checkpoint 1 on"):
            average_share(decay, checkpoint)


def test_the_average_moves_towards_the_weights_by_its_share_and_changes_nothing_in_place() -> None:
    ema, weights = np.array([1.0, -2.0], np.float32), np.array([3.0, -2.0], np.float32)
    assert average(ema, weights, np.float32(0.25)).tolist() == [1.5, -2.0]
    assert (ema.tolist(), weights.tolist()) == ([1.0, -2.0], [3.0, -2.0])


def test_files_are_averaged_tensor_by_tensor_and_come_out_canonical(tmp_path: Path) -> None:
    before, now = _tensors(1), _tensors(2)
    write_checkpoint(tmp_path / "before", before)
    write_checkpoint(tmp_path / "now", now)
    digest = average_round(tmp_path / "before", tmp_path / "now", tmp_path / "out", np.float32(0.1))
    found = TensorFile.open(tmp_path / "out").load()
    for name in before:
        assert np.array_equal(found[name], average(before[name], now[name], np.float32(0.1)))
    assert digest == write_checkpoint(tmp_path / "again", found)


def test_files_of_different_models_are_not_averaged(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "before", {"a": np.zeros(3, np.float32)})
    write_checkpoint(tmp_path / "now", {"a": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointCorrupt, match="different tensors"):
        average_round(tmp_path / "before", tmp_path / "now", tmp_path / "out", np.float32(0.1))
