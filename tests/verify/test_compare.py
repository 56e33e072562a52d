import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diloco.codec import CodecConfig, EncodedDelta, bf16_to_f32, bf16_upward, dither, encode
from diloco.container import Container, write_container
from diloco.packing import Signed
from diloco.schema import Schema, TensorSpec
from diloco.sketch import sketch
from diloco.streams import Stream
from diloco.tables import Floats
from tests.diloco.examples import CODEC, FINE, OTHER_SEED, SCHEMA, SEED, UNIT_ID, delta, normals
from tests.verify.examples import REPLAY
from verify.compare import (
    Comparison,
    code_difference,
    compare,
    judge,
    least_raw_difference,
    sketch_difference,
)

OWN = delta(0)
NORM = math.sqrt(sum(float(np.sum(values.astype(np.float64) ** 2)) for values in OWN.values()))
ONE_BLOCK = Schema(tensors=(TensorSpec(name="x", shape=(256,)),))
each_codec = pytest.mark.parametrize("codec", [CODEC, FINE], ids=["ternary", "7 levels"])


def sent(directory: Path, encoded: EncodedDelta) -> Container:
    write_container(directory / "sent", encoded, UNIT_ID)
    return Container.open(directory / "sent", encoded.schema, encoded.codec, UNIT_ID)


def disturbed(relative: float) -> dict[str, Floats]:
    """The own delta with noise of this norm, relative to its own."""
    noise = {spec.name: normals(f"{spec.name}/noise", spec.shape) for spec in SCHEMA.tensors}
    size = math.sqrt(sum(float(np.sum(values.astype(np.float64) ** 2)) for values in noise.values()))
    return {name: OWN[name] + np.float32(relative * NORM / size) * noise[name] for name in OWN}


def compared(directory: Path, theirs: Mapping[str, Floats], codec: CodecConfig = CODEC) -> Comparison:
    own = encode(OWN, SCHEMA, codec, SEED)
    return compare(sent(directory, encode(theirs, SCHEMA, codec, SEED)), own, OWN, SEED)


@pytest.mark.parametrize("levels", [1, 2, 7, 31, 127])
@pytest.mark.parametrize("block", [16, 256, 65_536])
@pytest.mark.parametrize(("reach", "width"), [(704, 128), (1280, 256), (256, 0)])
def test_equal_results_do_not_differ_in_the_least(
    tmp_path: Path, block: int, levels: int, reach: int, width: int
) -> None:
    codec = CodecConfig(kind="dither", levels=levels, block=block, reach=reach, width=width)
    assert compared(tmp_path, OWN, codec) == Comparison(raw_difference=0.0, code_difference=0.0)


@pytest.mark.parametrize("levels", [1, 7, 31, 127])
def test_what_the_encoder_s_own_rounding_lifts_over_a_boundary_does_not_count(tmp_path: Path, levels: int) -> None:
    """Values a hair below the boundary between two codes, where fp32 rounds their quotient or sum up to it, or not."""
    schema = Schema(tensors=(TensorSpec(name="x", shape=(65_536,)),))
    codec = CodecConfig(kind="dither", levels=levels, block=256, reach=1280, width=256)
    random = np.random.default_rng(levels)
    x = random.standard_normal(65_536).astype(np.float32)
    uniform = dither(Stream(SEED, "dither"), 0, 0, 65_536, codec.width).astype(np.float64)
    for _ in range(4):
        # Moving values to their boundaries moves the mean, and with it the scale: after a few turns it stays.
        steps = np.repeat(bf16_to_f32(encode({"x": x}, schema, codec, SEED).scales["x"]), 256).astype(np.float64)
        boundary = (np.floor(x / steps + uniform) - uniform) * steps
        below = np.nextafter(boundary.astype(np.float32), np.float32(-np.inf))
        x = np.where(np.arange(65_536) % 2, below, boundary.astype(np.float32))
    theirs = sent(tmp_path, encode({"x": x}, schema, codec, SEED))
    assert least_raw_difference(theirs, {"x": x}, SEED) == 0.0


@each_codec
@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-2, 0.1])
def test_the_least_raw_difference_is_at_most_the_true_one_however_loud_the_dither(
    tmp_path: Path, relative: float, codec: CodecConfig
) -> None:
    found = compared(tmp_path, disturbed(relative), codec)
    assert found.raw_difference <= relative * 1.001
    # Only what crossed a boundary of its code can be seen: a share of the elements that is itself in proportion, and
    # to the size of a step inversely.
    assert found.raw_difference > 0.3 * relative**1.5 / (FINE.levels / codec.levels) ** 0.5
    # Codes flip by whole steps: the norm of their difference falls with the square root of the raw one only.
    assert 0.1 * relative < found.code_difference < 5.0 * relative


@each_codec
def test_another_unit_is_told_apart_by_both_differences(tmp_path: Path, codec: CodecConfig) -> None:
    found = compared(tmp_path, delta(1), codec)
    assert found.raw_difference > 0.5
    assert found.code_difference > 1.0


@each_codec
def test_codes_under_another_dither_are_far_from_any_that_the_unit_could_give(
    tmp_path: Path, codec: CodecConfig
) -> None:
    theirs = sent(tmp_path, encode(OWN, SCHEMA, codec, OTHER_SEED))
    assert least_raw_difference(theirs, OWN, SEED) > 0.02


def with_codes(encoded: EncodedDelta, numbers: Signed) -> EncodedDelta:
    return replace(encoded, codes={"x": encoded.codec.packing.pack(numbers)})


def codes_of(encoded: EncodedDelta) -> Signed:
    return encoded.codec.packing.unpack(encoded.codes["x"], 256)


@pytest.mark.parametrize(("codec", "steps"), [(FINE, 3), (FINE, -5), (CODEC, 2), (CODEC, -2)])
def test_one_forged_code_costs_what_its_interval_says(tmp_path: Path, codec: CodecConfig, steps: int) -> None:
    raw = {"x": normals("x", (256,), 1e-3)}
    honest = encode(raw, ONE_BLOCK, codec, SEED)
    step = float(bf16_to_f32(honest.scales["x"])[0])
    numbers = codes_of(honest)
    # From one side to the other: the code counts so many steps more, or less.
    place = int(np.flatnonzero(numbers == -np.sign(steps))[0])
    numbers[place] += steps
    forged = sent(tmp_path, with_codes(honest, numbers))
    size = math.sqrt(float(np.sum(raw["x"].astype(np.float64) ** 2)))
    found = least_raw_difference(forged, raw, SEED) * size / step
    # Each code stands for an interval that is one step wide: a move of n steps crosses all between the two.
    assert abs(steps) - 1 <= found <= abs(steps)
    assert code_difference(forged, honest) == pytest.approx((steps * step) ** 2 / _norm2(honest))


def _norm2(encoded: EncodedDelta) -> float:
    return sum(float(np.sum(values.astype(np.float64) ** 2)) for values in encoded.decoded().values())


@each_codec
@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_a_scale_that_is_not_that_of_the_raw_delta_is_noticed(
    tmp_path: Path, codec: CodecConfig, factor: float
) -> None:
    """Coarse scales make the rounding louder, and so the room for poison wider, though every code fits its interval."""
    raw = {"x": normals("x", (256,), 1e-3)}
    honest = encode(raw, ONE_BLOCK, codec, SEED)
    scales = bf16_upward((bf16_to_f32(honest.scales["x"]) * np.float32(factor)).astype(np.float32))
    uniform = dither(Stream(SEED, "dither"), 0, 0, 256, codec.width)
    numbers = np.floor(raw["x"] / bf16_to_f32(scales) + uniform)
    numbers = np.clip(numbers, -codec.levels, codec.levels).astype(np.int8)
    forged = sent(tmp_path, replace(with_codes(honest, numbers), scales={"x": scales}))
    # To change the mean magnitude by a share of itself takes that share of a normal delta's norm, times sqrt(2 / pi).
    assert least_raw_difference(forged, raw, SEED) > 0.75 * abs(factor - 1.0)


@each_codec
def test_a_silent_block_must_have_been_silent(tmp_path: Path, codec: CodecConfig) -> None:
    raw = {"x": normals("x", (256,), 1e-3)}
    zeros = {"x": np.zeros(256, dtype=np.float32)}
    silent = sent(tmp_path, encode(zeros, ONE_BLOCK, codec, SEED))
    assert least_raw_difference(silent, raw, SEED) == pytest.approx(1.0)
    assert least_raw_difference(silent, zeros, SEED) == 0.0
    loud = sent(tmp_path, encode(raw, ONE_BLOCK, codec, SEED))
    assert math.isfinite(least_raw_difference(loud, zeros, SEED))


@each_codec
def test_sketches_estimate_the_difference_of_codes(tmp_path: Path, codec: CodecConfig) -> None:
    own = encode(OWN, SCHEMA, codec, SEED)
    for relative in (1e-3, 0.1):
        theirs = sent(tmp_path, encode(disturbed(relative), SCHEMA, codec, SEED))
        estimate = sketch_difference(sketch(theirs.decoded_chunks(), SEED), sketch(own.decoded_chunks(), SEED))
        assert estimate == pytest.approx(code_difference(theirs, own), rel=0.3)
    zero = np.zeros(1024, dtype=np.float32)
    assert sketch_difference(zero, zero) == 0.0


def test_both_differences_must_be_within_the_run_s_tolerances() -> None:
    v = replace(REPLAY, tolerance=1e-3, code_tolerance=0.02)
    assert judge(Comparison(raw_difference=1e-3, code_difference=0.02), v) == "confirmed"
    assert judge(Comparison(raw_difference=1.1e-3, code_difference=0.0), v) == "refuted"
    assert judge(Comparison(raw_difference=0.0, code_difference=0.021), v) == "refuted"
