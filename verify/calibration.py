"""The evidence for a run's tolerances: honest differences and cheats measured on the run's own units.

A tolerance belongs to a model, an inner loop, a codec and a precision: what honest machines differ by depends on all of
them. `calibrate` measures it, and what the smallest cheats differ by, and proposes the tolerance that lies between.
"""

import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

import torch
from pydantic import Field

from diloco.checkpoint import write_checkpoint
from diloco.tables import Floats
from protocol.documents import Count, Finite, Hex32, Positive, RunConfig, ShortText, digest_of, parse_payload
from protocol.errors import PayloadInvalid
from protocol.limits import MAX_ENVELOPE_BYTES
from verify.laboratory import Laboratory, Measured, Pair
from verify.networks import check_networks
from verify.tolerances import START_TOLERANCE
from verify.variants import Variant, variants_here

CHEATS: Final = ("skip-tenth", "skip-tenth-stretched", "skip-half", "half-batch", "wrong-shard")
"""The cheats that come nearest to honest work, and two that do not."""
CLEAR: Final = 2.0
"""A tolerance is clear when it is so many times the largest honest difference, and the smallest cheat is that many
times the tolerance."""
_LEAST: Final = 1e-7
"""What an honest difference counts as at least: where all results are equal in every bit, other machines' are not."""
_CURVE_POINTS_PER_DECADE: Final = 8
_CURVE_DECADES: Final = (-8, 1)

Difference = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Tolerance = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How one kind of difference is distributed."""

    median: Difference
    p90: Difference
    p99: Difference
    largest: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantDifferences:
    """The largest differences between one variant's results and all others', either way round."""

    variant: ShortText
    pairs: Positive
    equal: Count
    raw: Difference
    least_raw: Difference
    code: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class CheatDifferences:
    """The smallest differences between a cheat's results and honest replays."""

    cheat: ShortText
    pairs: Positive
    least_raw: Difference
    code: Difference
    sketched: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """With this threshold: the share of honest pairs that it rejects, and of cheats that it lets pass."""

    threshold: Difference
    false_reject: Difference
    false_accept: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """How far a tolerance is from both sides.

    honest: the tolerance over the largest honest difference.
    cheat: the smallest cheat's difference over the tolerance.
    capped: the middle between the two lay above the start value, which was taken instead.
    clear: both margins are at least `CLEAR`. If not, honest work and cheats are too much alike for this inner loop:
        longer units, a larger `eps` or fp32 pull them apart.
    """

    honest: Difference
    cheat: Difference
    capped: bool
    clear: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured, on what, and the tolerances that follow. Its file is its payload, unsigned.

    pairs counts honest comparisons, equal those among them whose raw deltas were the same in every bit.
    """

    TYPE: ClassVar[str] = "application/vnd.commonweight.calibration+json"
    FORMAT: ClassVar[int] = 1
    config_sha256: Hex32
    precision: Literal["fp32", "bf16"]
    machine: ShortText
    torch: ShortText
    units: Positive
    pairs: Positive
    equal: Count
    raw: Spread
    least_raw: Spread
    code: Spread
    sketched: Spread
    variants: tuple[VariantDifferences, ...]
    cheats: tuple[CheatDifferences, ...]
    raw_curve: tuple[CurvePoint, ...]
    code_curve: tuple[CurvePoint, ...]
    tolerance: Tolerance
    code_tolerance: Tolerance
    raw_margins: Margins
    code_margins: Margins
    seconds: Finite


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationProgress:
    """One unit is measured: its place, the pairs so far, and the largest honest and smallest cheat's differences."""

    unit: int
    units: int
    pairs: int
    least_raw: float
    cheat_least_raw: float


def calibrate(
    config: RunConfig,
    base: Mapping[str, Floats],
    shards: Mapping[str, Path],
    units: int,
    on_progress: Callable[[CalibrationProgress], None] | None = None,
    *,
    round_number: int = 1,
    without: Mapping[str, Sequence[int]] | None = None,
    networks: Path | None = None,
    variants: Sequence[Variant] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Calibration:
    """Measure honest pairs and cheats on units of a run, and propose its tolerances.

    Each unit is trained once in every variant of this machine (eight on a new CPU with two cores) and once for each
    cheat. The temporary folder holds a raw delta for every variant.

    Args:
        config: the run's; its tolerances play no part.
        base: all tensors of a checkpoint of the run, best one that has trained for a while.
        shards: files of the run's training shards, by SHA-256.
        units: how many units; three show the magnitude, forty make a few thousand pairs.
        round_number: the round that the units are taken from, which fixes their learning rate.
        without: of a shard, by SHA-256, the samples that were taken down before that round.
        networks: the folder of the text encoders, for runs whose shards hold captions alone.
        variants: what to compare; None takes all that this machine has.
        clock: seconds; for `Calibration.seconds` alone.

    Raises:
        LocalProblem: a process that trained ended.
        NetworksMissing: the run needs text encoders, and they are not there.
        ValueError: no units, or fewer than two variants.
    """
    began = clock()
    chosen = tuple(variants_here(config.training.batch) if variants is None else variants)
    if units < 1 or len(chosen) < 2:
        raise ValueError("a calibration needs a unit and two ways to train it")
    check_networks(config, networks)
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="commonweight-calibration-") as name:
        base_file = Path(name) / "base.safetensors"
        write_checkpoint(base_file, base)
        with Laboratory(config, shards, chosen, Path(name), without=without, networks=networks) as laboratory:
            for index in range(units):
                measured.append(laboratory.measure(round_number, index, base_file, cheats=CHEATS))
                if on_progress is not None:
                    on_progress(_progress(measured, units))
    return summarise(config, measured, seconds=clock() - began)


def summarise(config: RunConfig, measured: Sequence[Measured], *, seconds: float) -> Calibration:
    """Return the calibration that follows from what a laboratory measured on units of one run."""
    honest = [pair for unit in measured for pair in unit.honest]
    cheats = [pair for unit in measured for pair in unit.cheats]
    precision = config.training.precision
    tolerance, raw_margins = propose(
        max(pair.least_raw for pair in honest),
        min(pair.least_raw for pair in cheats),
        most=START_TOLERANCE[precision],
    )
    # A replica's answer is judged by sketches alone, so their estimate counts where it is the worse one.
    code_tolerance, code_margins = propose(
        max(max(pair.code, pair.sketched) for pair in honest),
        min(min(pair.code, pair.sketched) for pair in cheats),
        most=1.0,
    )
    return Calibration(
        config_sha256=digest_of(config),
        precision=precision,
        machine=machine_words(),
        torch=torch.__version__,
        units=len(measured),
        pairs=len(honest),
        equal=sum(pair.same_bits for pair in honest),
        raw=_spread(pair.raw or 0.0 for pair in honest),
        least_raw=_spread(pair.least_raw for pair in honest),
        code=_spread(pair.code for pair in honest),
        sketched=_spread(pair.sketched for pair in honest),
        variants=tuple(_of_variant(name, honest) for name in dict.fromkeys(pair.claimant for pair in honest)),
        cheats=tuple(_of_cheat(name, cheats) for name in dict.fromkeys(pair.claimant for pair in cheats)),
        raw_curve=_curve([pair.least_raw for pair in honest], [pair.least_raw for pair in cheats]),
        code_curve=_curve([pair.code for pair in honest], [pair.code for pair in cheats]),
        tolerance=tolerance,
        code_tolerance=code_tolerance,
        raw_margins=raw_margins,
        code_margins=code_margins,
        seconds=round(seconds, 1),
    )


def read_calibration(raw: bytes) -> Calibration:
    """Return the calibration that a file holds; raise `FormatUnknown` or `PayloadInvalid`."""
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise PayloadInvalid(f"A calibration has at most {MAX_ENVELOPE_BYTES:,} bytes, this one has {len(raw):,}.")
    return parse_payload(Calibration, raw)


def propose(honest: float, cheat: float, *, most: float) -> tuple[float, Margins]:
    """Return the tolerance between the largest honest difference and the smallest cheat's, at most `most`.

    The geometric middle has the same factor to both sides, since nothing says which is the likelier to be exceeded: the
    honest by a machine that was not measured, the cheat by one who is bolder.
    """
    honest = max(honest, _LEAST)
    middle = math.sqrt(honest * cheat)
    value = _two_digits(min(middle, most))
    margins = Margins(
        honest=_three_digits(value / honest),
        cheat=_three_digits(cheat / value),
        capped=middle > most,
        clear=min(value / honest, cheat / value) >= CLEAR,
    )
    return value, margins


def machine_words() -> str:
    """Return what the numbers depend on, and nothing that names the machine or its owner."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{gpu}"


def _progress(measured: Sequence[Measured], units: int) -> CalibrationProgress:
    honest = [pair for unit in measured for pair in unit.honest]
    cheats = [pair for unit in measured for pair in unit.cheats]
    return CalibrationProgress(
        unit=len(measured),
        units=units,
        pairs=len(honest),
        least_raw=max(pair.least_raw for pair in honest),
        cheat_least_raw=min(pair.least_raw for pair in cheats),
    )


def _spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    median, p90, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.9, 0.99))
    return Spread(median=median, p90=p90, p99=p99, largest=ordered[-1])


def _of_variant(name: str, honest: Sequence[Pair]) -> VariantDifferences:
    ours = [pair for pair in honest if name in (pair.claimant, pair.referee)]
    return VariantDifferences(
        variant=name,
        pairs=len(ours),
        equal=sum(pair.same_bits for pair in ours),
        raw=max(pair.raw or 0.0 for pair in ours),
        least_raw=max(pair.least_raw for pair in ours),
        code=max(pair.code for pair in ours),
    )


def _of_cheat(name: str, cheats: Sequence[Pair]) -> CheatDifferences:
    ours = [pair for pair in cheats if pair.claimant == name]
    return CheatDifferences(
        cheat=name,
        pairs=len(ours),
        least_raw=min(pair.least_raw for pair in ours),
        code=min(pair.code for pair in ours),
        sketched=min(pair.sketched for pair in ours),
    )


def _curve(honest: Sequence[float], cheats: Sequence[float]) -> tuple[CurvePoint, ...]:
    low, high = _CURVE_DECADES
    points = (high - low) * _CURVE_POINTS_PER_DECADE + 1
    thresholds = [_two_digits(10.0 ** (low + step / _CURVE_POINTS_PER_DECADE)) for step in range(points)]
    return tuple(
        CurvePoint(
            threshold=threshold,
            false_reject=sum(value > threshold for value in honest) / len(honest),
            false_accept=sum(value <= threshold for value in cheats) / len(cheats),
        )
        for threshold in thresholds
    )


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def _three_digits(value: float) -> float:
    return float(f"{value:.2e}")
