from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diloco.codec import UNIT, bf16_to_f32, decode
from diloco.patch import PatchConfig, PatchWriter, apply_patches, open_patch, round_step
from diloco.schema import Schema, TensorSpec
from diloco.streams import Stream
from diloco.tables import Floats
from protocol.errors import CheckpointCorrupt, DeltaNotFinite
from tests.diloco.examples import SEED

PATCH = PatchConfig(block=64, threshold=UNIT)
finite = st.floats(min_value=-1e6, max_value=1e6, width=32, allow_subnormal=False)
steps = hnp.arrays(np.float32, st.integers(1, 300), elements=finite)


@given(steps)
def test_what_a_patch_leaves_out_is_kept_to_the_last_bit(step: Floats) -> None:
    rounded = round_step(step, PATCH, "x")
    assert np.array_equal(rounded.residual, step - rounded.patch)
    found = decode(rounded.packed, rounded.scales, step.size, codec=PATCH.codec)
    assert np.array_equal(found, rounded.patch)


@given(steps)
def test_only_what_exceeds_its_share_of_the_blocks_mean_magnitude_moves_at_once(step: Floats) -> None:
    rounded = round_step(step, PATCH, "x")
    scales = np.repeat(bf16_to_f32(rounded.scales), 64)[: step.size]
    for start in range(0, step.size, 64):
        block = np.abs(step[start : start + 64].astype(np.float64))
        moved = rounded.patch[start : start + 64] != 0
        if not scales[start]:
            assert not moved.any()
            continue
        mean = block.mean()
        assert np.all(block[moved] >= mean * (1 - 1e-6))
        assert np.all(block[~moved] <= mean * (1 + 1e-6))
        # The scale is the mean of what moves, rounded up to 8 bits.
        assert block[moved].mean() * (1 - 1e-5) <= scales[start] <= block[moved].mean() * (1 + 2.0**-7 + 1e-5)


def test_what_waits_stays_within_a_few_steps_however_long_the_run() -> None:
    stream = Stream(SEED, "init/steps")
    steady = stream.normal(0, 0, 1024) * np.float32(0.5)
    residual = np.zeros(1024, dtype=np.float32)
    largest = 0.0
    for number in range(1, 300):
        step = steady + stream.normal(number, 0, 1024)
        residual = round_step(residual + step, PatchConfig(block=1024, threshold=UNIT), "x").residual
        largest = max(largest, float(np.linalg.norm(residual) / np.linalg.norm(step)))
    assert largest < 1.0


def test_a_step_of_zeros_or_of_next_to_nothing_moves_nothing() -> None:
    for value in (0.0, 2.0**-110):
        rounded = round_step(np.full(100, value, dtype=np.float32), PATCH, "x")
        assert not rounded.scales.any()
        assert not rounded.patch.any()
        assert np.all(rounded.residual == np.float32(value))


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**101])
def test_a_step_that_is_not_finite_is_not_published(value: float) -> None:
    step = np.zeros(10, dtype=np.float32)
    step[3] = value
    with pytest.raises(DeltaNotFinite, match="step of x"), np.errstate(over="ignore", invalid="ignore"):
        round_step(step, PATCH, "x")


@pytest.mark.parametrize(("block", "threshold"), [(64, 0), (64, 2000), (100, 256), (8, 256)])
def test_settings_out_of_range_are_refused(block: int, threshold: int) -> None:
    with pytest.raises(ValueError, match=r"threshold|block"):
        PatchConfig(block=block, threshold=threshold)


def test_a_patch_that_is_interrupted_is_not_there(tmp_path: Path) -> None:
    schema = Schema(tensors=(TensorSpec(name="x", shape=(100,)),))

    def interrupted() -> None:
        with PatchWriter(tmp_path / "patch", schema, PATCH, bytes(32)) as writer:
            writer.write(round_step(np.ones(100, dtype=np.float32), PATCH, "x"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_weights_without_the_tensors_of_a_patch_are_refused(tmp_path: Path) -> None:
    from diloco.checkpoint import write_checkpoint

    schema = Schema(tensors=(TensorSpec(name="x", shape=(100,)),))
    with PatchWriter(tmp_path / "patch", schema, PATCH, bytes(32)) as writer:
        writer.write(round_step(np.ones(100, dtype=np.float32), PATCH, "x"))
    write_checkpoint(tmp_path / "base", {"y": np.ones(100, dtype=np.float32)})
    with pytest.raises(CheckpointCorrupt, match="base does not have the tensors"):
        apply_patches(tmp_path / "base", [open_patch(tmp_path / "patch", schema, PATCH, bytes(32))], tmp_path / "out")
