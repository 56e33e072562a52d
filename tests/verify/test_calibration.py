import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.procedural import SmallRun, small_run
from diloco.checkpoint import write_checkpoint
from protocol.documents import digest_of, payload_of
from protocol.errors import FormatUnknown, LocalProblem, PayloadInvalid
from verify.calibration import (
    CHEATS,
    Calibration,
    CalibrationProgress,
    calibrate,
    propose,
    read_calibration,
)
from verify.laboratory import Laboratory
from verify.tolerances import DEFAULT_TOLERANCES, START_TOLERANCE
from verify.variants import Variant, variants_here

PLAIN = Variant(device="cpu", capability="native", threads=1, attention="default", parts=1)
OTHER = replace(PLAIN, attention="math", parts=2)


@pytest.fixture(scope="module")
def run() -> SmallRun:
    return small_run(seed=bytes(range(32)), units=2, rounds=2, shards=3)


@pytest.fixture(scope="module")
def shards(run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = run.write_shards(tmp_path_factory.mktemp("shards"))
    return {reference.sha256: path for reference, path in zip(run.config.data.shards, paths, strict=True)}


@pytest.fixture(scope="module")
def calibrated(run: SmallRun, shards: dict[str, Path]) -> tuple[Calibration, list[CalibrationProgress]]:
    seen: list[CalibrationProgress] = []
    ticks: Iterator[float] = iter((10.0, 12.5))
    calibration = calibrate(
        run.config, run.genesis, shards, 1, seen.append, variants=(PLAIN, OTHER), clock=lambda: next(ticks)
    )
    return calibration, seen


def test_a_calibration_measures_honest_pairs_both_ways_and_the_cheats(
    run: SmallRun, calibrated: tuple[Calibration, list[CalibrationProgress]]
) -> None:
    calibration, seen = calibrated
    assert (calibration.units, calibration.pairs, calibration.equal) == (1, 2, 0)
    assert 0 < calibration.raw.largest < 1e-4
    assert calibration.least_raw.largest <= calibration.raw.largest
    assert {cheat.cheat for cheat in calibration.cheats} == set(CHEATS)
    assert {found.variant for found in calibration.variants} == {"cpu native", "cpu native, math attention, batch in 2"}
    assert calibration.config_sha256 == digest_of(run.config)
    assert [progress.unit for progress in seen] == [1]
    assert calibration.seconds == 2.5


def test_the_proposed_tolerances_lie_between_honest_work_and_the_smallest_cheat(
    calibrated: tuple[Calibration, list[CalibrationProgress]],
) -> None:
    calibration, _ = calibrated
    assert calibration.least_raw.largest < calibration.tolerance < min(cheat.least_raw for cheat in calibration.cheats)
    assert calibration.code.largest < calibration.code_tolerance < min(cheat.code for cheat in calibration.cheats)
    assert calibration.raw_margins.clear
    assert calibration.code_margins.clear
    assert calibration.raw_margins.honest > 10
    assert calibration.raw_margins.cheat > 10
    # What runs take that were never calibrated must hold for this one too.
    tolerance, code_tolerance = DEFAULT_TOLERANCES["fp32"]
    assert calibration.least_raw.largest < tolerance < min(cheat.least_raw for cheat in calibration.cheats)
    assert calibration.code.largest < code_tolerance < min(cheat.code for cheat in calibration.cheats)


def test_the_curves_fall_and_rise_and_cross_nowhere_between_the_two(
    calibrated: tuple[Calibration, list[CalibrationProgress]],
) -> None:
    calibration, _ = calibrated
    for curve, tolerance in (
        (calibration.raw_curve, calibration.tolerance),
        (calibration.code_curve, calibration.code_tolerance),
    ):
        rejects, accepts = [point.false_reject for point in curve], [point.false_accept for point in curve]
        assert rejects == sorted(rejects, reverse=True)
        assert accepts == sorted(accepts)
        assert (rejects[-1], accepts[0]) == (0.0, 0.0)
        nearest = min(curve, key=lambda point: abs(math.log(point.threshold / tolerance)))
        assert (nearest.false_reject, nearest.false_accept) == (0.0, 0.0)


def test_a_calibration_is_its_canonical_file_and_no_other_file_is_one(
    calibrated: tuple[Calibration, list[CalibrationProgress]],
) -> None:
    calibration, _ = calibrated
    raw = payload_of(calibration)
    assert read_calibration(raw) == calibration
    with pytest.raises(FormatUnknown):
        read_calibration(raw.replace(b'"format":1', b'"format":2'))
    with pytest.raises(PayloadInvalid):
        read_calibration(b'{"format":1}')
    with pytest.raises(PayloadInvalid, match="at most"):
        read_calibration(b" " * 300_000)


def test_a_tolerance_is_the_geometric_middle_and_never_above_the_start_value() -> None:
    value, margins = propose(1e-6, 1e-2, most=START_TOLERANCE["fp32"])
    assert value == 1e-4
    assert (margins.honest, margins.cheat, margins.capped, margins.clear) == (100, 100, False, True)
    value, margins = propose(1e-4, 0.9, most=1e-3)
    assert (value, margins.capped, margins.clear) == (1e-3, True, True)
    value, margins = propose(0.03, 0.06, most=0.06)
    assert not margins.clear, "less than twice from both sides"
    value, _ = propose(0.0, 0.09, most=1e-3)
    assert 0 < value <= 1e-3, "equal bits on one machine promise nothing for another"


def test_a_process_that_ends_is_told_with_its_last_words(
    run: SmallRun, shards: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    write_checkpoint(base, {"nothing": next(iter(run.genesis.values()))})
    with Laboratory(run.config, shards, (PLAIN,), tmp_path) as laboratory, pytest.raises(LocalProblem, match="nothing"):
        laboratory.measure(1, 0, base)


def test_too_little_to_compare_is_refused(run: SmallRun, shards: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="two ways"):
        calibrate(run.config, run.genesis, shards, 1, variants=(PLAIN,))
    with pytest.raises(ValueError, match="needs a unit"):
        calibrate(run.config, run.genesis, shards, 0)


def test_this_machines_variants_differ_in_all_that_was_asked_for() -> None:
    found = variants_here(16)
    assert found[0] == PLAIN
    assert {variant.attention for variant in found} == {"default", "math"}
    assert {variant.parts for variant in found} == {1, 2}
    assert len({variant.name for variant in found}) == len(found)
    assert {variant.parts for variant in variants_here(15)} == {1}
    for variant in found:
        older = variant.capability != "native"
        assert (variant.environment().get("ATEN_CPU_CAPABILITY") == variant.capability) == older
