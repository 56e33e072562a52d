import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diloco.codec import CodecConfig, EncodedDelta, bf16_to_f32, encode
from diloco.container import Container, write_container
from diloco.schema import Schema, TensorSpec
from diloco.sketch import sketch
from diloco.tables import Floats
from tests.diloco.examples import CODEC, OTHER_SEED, SCHEMA, SEED, UNIT_ID, delta, normals
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


@pytest.mark.parametrize("block", [16, 256, 65_536])
def test_equal_results_do_not_differ_in_the_least(tmp_path: Path, block: int) -> None:
    codec = CodecConfig(kind="dither4", block=block)
    assert compared(tmp_path, OWN, codec) == Comparison(raw_difference=0.0, code_difference=0.0)


@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-2, 0.1])
def test_the_least_raw_difference_is_at_most_the_true_one_however_loud_the_dither(
    tmp_path: Path, relative: float
) -> None:
    found = compared(tmp_path, disturbed(relative))
    assert found.raw_difference <= relative * 1.001
    # Only what crossed a boundary of its code can be seen: a share of the elements that is itself in proportion.
    assert found.raw_difference > 0.3 * relative**1.5
    # Codes flip by whole steps: the norm of their difference falls with the square root of the raw one only.
    assert 0.1 * relative < found.code_difference < 5.0 * relative


def test_another_unit_is_told_apart_by_both_differences(tmp_path: Path) -> None:
    found = compared(tmp_path, delta(1))
    assert found.raw_difference > 0.5
    assert found.code_difference > 1.0


def test_codes_under_another_dither_are_far_from_any_that_the_unit_could_give(tmp_path: Path) -> None:
    theirs = sent(tmp_path, encode(OWN, SCHEMA, CODEC, OTHER_SEED))
    assert least_raw_difference(theirs, OWN, SEED) > 0.02


def test_one_forged_code_costs_what_its_interval_says(tmp_path: Path) -> None:
    raw = {"x": normals("x", (256,), 1e-3)}
    honest = encode(raw, ONE_BLOCK, CODEC, SEED)
    step = float(bf16_to_f32(honest.scales["x"])[0])
    codes = honest.codes["x"].copy()
    place = int(np.flatnonzero(codes & 15 == 8)[0])
    codes[place] += 3  # the low half: element 2 * place counts three steps more
    forged = sent(tmp_path, replace(honest, codes={"x": codes}))
    size = math.sqrt(float(np.sum(raw["x"].astype(np.float64) ** 2)))
    found = least_raw_difference(forged, raw, SEED) * size / step
    # The code says up to one step less than it decodes to, or up to one more; the raw value lay within a step of zero.
    assert 2.0 <= found <= 3.0
    assert code_difference(forged, honest) == pytest.approx((3 * step) ** 2 / _norm2(honest))


def _norm2(encoded: EncodedDelta) -> float:
    return sum(float(np.sum(values.astype(np.float64) ** 2)) for values in encoded.decoded().values())


def test_a_scale_that_is_too_large_for_its_codes_is_noticed(tmp_path: Path) -> None:
    """Coarse scales make the dither louder, and so the room for poison wider, though every code fits its interval."""
    raw = {"x": normals("x", (256,), 1e-3)}
    honest = encode(raw, ONE_BLOCK, CODEC, SEED)
    doubled = {"x": raw["x"].copy()}
    doubled["x"][17] = np.float32(2.0) * np.max(np.abs(raw["x"]))
    louder = encode(doubled, ONE_BLOCK, CODEC, SEED)
    codes = louder.codes["x"].copy()
    codes[17 // 2] = codes[17 // 2] & 15 | (honest.codes["x"][17 // 2] & 0xF0)
    forged = sent(tmp_path, replace(louder, codes={"x": codes}))
    largest = float(np.max(np.abs(raw["x"])))
    size = math.sqrt(float(np.sum(raw["x"].astype(np.float64) ** 2)))
    # Some element must have been nearly twice as large as any of the referee's.
    assert least_raw_difference(forged, raw, SEED) * size > 0.9 * largest


def test_a_silent_block_must_have_been_silent(tmp_path: Path) -> None:
    raw = {"x": normals("x", (256,), 1e-3)}
    zeros = {"x": np.zeros(256, dtype=np.float32)}
    silent = sent(tmp_path, encode(zeros, ONE_BLOCK, CODEC, SEED))
    assert least_raw_difference(silent, raw, SEED) == pytest.approx(1.0)
    assert least_raw_difference(silent, zeros, SEED) == 0.0
    loud = sent(tmp_path, encode(raw, ONE_BLOCK, CODEC, SEED))
    assert math.isfinite(least_raw_difference(loud, zeros, SEED))


def test_sketches_estimate_the_difference_of_codes(tmp_path: Path) -> None:
    own = encode(OWN, SCHEMA, CODEC, SEED)
    for relative in (1e-3, 0.1):
        theirs = sent(tmp_path, encode(disturbed(relative), SCHEMA, CODEC, SEED))
        estimate = sketch_difference(sketch(theirs.decoded_chunks(), SEED), sketch(own.decoded_chunks(), SEED))
        assert estimate == pytest.approx(code_difference(theirs, own), rel=0.3)
    zero = np.zeros(1024, dtype=np.float32)
    assert sketch_difference(zero, zero) == 0.0


def test_both_differences_must_be_within_the_run_s_tolerances() -> None:
    v = replace(REPLAY, tolerance=1e-3, code_tolerance=0.02)
    assert judge(Comparison(raw_difference=1e-3, code_difference=0.02), v) == "confirmed"
    assert judge(Comparison(raw_difference=1.1e-3, code_difference=0.0), v) == "refuted"
    assert judge(Comparison(raw_difference=0.0, code_difference=0.021), v) == "refuted"
