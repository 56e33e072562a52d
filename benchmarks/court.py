"""Forged deltas before a referee and a replica: each attack on real units, and the best poison that tolerances hide."""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.cells import TRAINED_ROUNDS, Cells, Precision, Setting, say
from benchmarks.procedural import MODEL, SmallUnit
from benchmarks.report import Report
from diloco.codec import EncodedDelta, encode
from diloco.container import Container, write_container
from diloco.determinism import set_precision
from diloco.execution import Execution
from diloco.sketch import sketch
from diloco.unit import run_unit
from verify.attacks import ATTACKS, AttackKind, AttackWorld, Delta, norm, world_of
from verify.compare import compare, judge, sketch_difference
from verify.hiding import Room, hide
from verify.replay import codec_config, delta_schema
from verify.tolerances import DEFAULT_TOLERANCES, START_TOLERANCE

SHAPING: Final = tuple(name for name, attack in ATTACKS.items() if attack.kind is not AttackKind.MALFORMED)
WITHIN: Final = ("ride-tolerance", "hide-in-dither")
"""Attacks that stay within both tolerances by construction: what bounds them is their size."""


class Court:
    """Judges forged deltas of one unit as a referee and as a replica on other arithmetic would."""

    def __init__(self, setting: Setting, unit: SmallUnit, base: Delta, folder: Path) -> None:
        self.config = setting.run.config
        self.unit = unit
        self._path = folder / "forged.delta"
        run = (unit.spec, MODEL, base, unit.shards)
        self.own = run_unit(*run, device="cpu", on_step=None).delta
        self.encoded = self.encode(self.own)
        replica = self.encode(run_unit(*run, device="cpu", on_step=None, execution=Execution(parts=2)).delta)
        self._seed = hashlib.sha256(b"replica" + unit.spec.seed).digest()
        self._replica = sketch(replica.decoded_chunks(), self._seed)

    def encode(self, delta: Delta) -> EncodedDelta:
        """Encode with the unit's dither."""
        return encode(delta, delta_schema(self.config), codec_config(self.config), self.unit.spec.seed)

    def measure(self, forged: EncodedDelta) -> dict[str, Any]:
        """Return the differences and whether each judge lets it pass."""
        unit = bytes.fromhex(self.unit.id)
        write_container(self._path, forged, unit)
        container = Container.open(self._path, forged.schema, forged.codec, unit)
        container.check_finite()
        found = compare(container, self.encoded, self.own, self.unit.spec.seed)
        sketched = sketch_difference(sketch(container.decoded_chunks(), self._seed), self._replica)
        rules = self.config.verification
        return {
            "least_raw": found.raw_difference,
            "code": found.code_difference,
            "by_referee": judge(found, rules) == "refuted",
            "by_replica": sketched > rules.code_tolerance,
        }


def attack_cell(
    setting: Setting, units: int, folder: Path, cells: Cells, precision: str
) -> dict[str, list[dict[str, Any]]]:
    """Return for each attack what the court found on each unit."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SHAPING}
    for index in range(units):
        measure = partial(_attacked, setting, index, folder)
        cell = cells.get(f"attacks-{precision}-{index:02d}", setting.key, measure)
        for name in SHAPING:
            found[name].append(cell[name])
        say(f"{precision} attacks {index + 1}/{units}")
    return found


def _attacked(setting: Setting, index: int, folder: Path) -> dict[str, Any]:
    set_precision("cpu", 1)
    court = Court(setting, setting.run.unit(TRAINED_ROUNDS + 1, index), setting.trained, folder)
    world = _world(setting, court, index)
    return {name: court.measure(ATTACKS[name].forge(world)) for name in SHAPING}


def _world(setting: Setting, court: Court, index: int) -> AttackWorld:
    others = [setting.run.unit(TRAINED_ROUNDS + 1, index + 41 + k) for k in range(3)]
    known = tuple(
        run_unit(other.spec, MODEL, setting.trained, other.shards, device="cpu", on_step=None).delta for other in others
    )
    return world_of(
        setting.run.config,
        court.unit.round,
        court.unit.id,
        base=setting.trained,
        older_base=setting.older,
        shards=court.unit.shards,
        other_shards=others[0].shards,
        device="cpu",
        seed=hashlib.sha256(b"attacker %d" % index).digest(),
        known=known,
        own=court.own,
    )


def measure_attacks(folder: Path, precisions: Sequence[Precision], units: int, cells: Cells, report: Report) -> None:
    """Fill the second table and its targets."""
    for precision in precisions:
        setting = Setting(precision, folder / precision, ExitStack())
        found = attack_cell(setting, units, folder, cells, precision)
        for name, results in found.items():
            report.add_row(
                precision=precision,
                attack=name,
                units=len(results),
                least_raw_min=min(result["least_raw"] for result in results),
                least_raw_median=statistics.median(result["least_raw"] for result in results),
                D_min=min(result["code"] for result in results),
                D_median=statistics.median(result["code"] for result in results),
                caught_by_referee=statistics.mean(result["by_referee"] for result in results),
                caught_by_replica=statistics.mean(result["by_replica"] for result in results),
            )
        _add_attack_targets(report, precision, found)


def _add_attack_targets(report: Report, precision: str, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for judge_name in ("by_referee", "by_replica"):
        share = statistics.mean(result[judge_name] for result in found["skip-tenth"])
        report.add_target(
            f"skipping 10 % of the steps, caught by one audit {judge_name.replace('_', ' a ')} ({precision})",
            target="always",
            value=share,
            met=share == 1.0,
        )
    rest = [result["by_referee"] for name in SHAPING if name not in WITHIN for result in found[name]]
    report.add_target(
        f"every attack that leaves the tolerances, caught by one referee ({precision})",
        target="always",
        value=statistics.mean(rest),
        met=all(rest),
    )


# --- hidden poison -------------------------------------------------------------------------------------------


def measure_hidden(folder: Path, precisions: Sequence[Precision], units: int, cells: Cells, report: Report) -> None:
    """Fill the third table: the furthest that a poison within the tolerances moves what is merged."""
    for precision in precisions:
        setting = Setting(precision, folder / precision, ExitStack())
        cell = [
            cells.get(
                f"hidden-{precision}-{index:02d}",
                setting.key,
                partial(_hidden, setting, index, folder),
            )
            for index in range(units)
        ]
        tolerance, code_tolerance = DEFAULT_TOLERANCES[precision]
        worst = 0.0
        for bounds in ("both tolerances", "raw tolerance alone", "start tolerance alone"):
            results = [result[bounds] for result in cell]
            report.add_row(
                precision=precision,
                within=bounds,
                units=len(results),
                tolerance=results[0]["tolerance"],
                poison_max=max(result["poison"] for result in results),
                poison_over_tolerance=max(result["poison"] for result in results) / results[0]["tolerance"],
                decoded_change_max=max(result["change"] for result in results),
                least_raw_max=max(result["least_raw"] for result in results),
                D_max=max(result["code"] for result in results),
            )
            if bounds == "both tolerances":
                worst = max(result["change"] for result in results)
                within = all(r["least_raw"] <= tolerance and r["code"] <= code_tolerance for r in results)
        report.add_target(
            f"change of the decoded delta that the best hidden poison makes, of the delta's norm ({precision})",
            target=f"at most {code_tolerance**0.5:.3f}, the root of the code tolerance",
            value=worst,
            met=within and worst <= code_tolerance**0.5,
        )


def _hidden(setting: Setting, index: int, folder: Path) -> dict[str, Any]:
    set_precision("cpu", 1)
    court = Court(setting, setting.run.unit(TRAINED_ROUNDS + 1, index), setting.trained, folder)
    world = _world(setting, court, index)
    backdoor = ATTACKS["caption-backdoor"].forge(world).decoded()
    directions = {
        "noise": world.noise(),
        "backdoor": {name: backdoor[name] - court.own[name] for name in court.own},
    }
    rules = setting.run.config.verification
    rooms = {
        "both tolerances": Room(raw=rules.tolerance, code=rules.code_tolerance),
        "raw tolerance alone": Room(raw=rules.tolerance, code=None),
        "start tolerance alone": Room(raw=START_TOLERANCE[setting.run.config.training.precision], code=None),
    }
    return {name: _worst(court, directions, room) for name, room in rooms.items()}


def _worst(court: Court, directions: Mapping[str, Delta], room: Room) -> dict[str, Any]:
    honest = court.encoded.decoded()
    worst: dict[str, Any] = {"poison": -1.0}
    for direction in directions.values():
        forged = hide(court.own, direction, court.encoded.schema, court.encoded.codec, court.unit.spec.seed, room)
        moved = {name: values - honest[name] for name, values in forged.decoded().items()}
        along = sum(float(np.sum(moved[n].astype(np.float64) * direction[n])) for n in moved) / norm(direction)
        found = court.measure(forged)
        if along / norm(court.own) > worst["poison"]:
            worst = {
                "tolerance": room.raw,
                "poison": along / norm(court.own),
                "change": norm(moved) / norm(honest),
                "least_raw": found["least_raw"],
                "code": found["code"],
            }
    return worst
