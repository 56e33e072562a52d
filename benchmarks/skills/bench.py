"""The measured run: its recipe, its snapshots on the disk, and what each of them is worth."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Final

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from benchmarks.cells import Cells, say
from benchmarks.plots import PICTURES
from benchmarks.report import Cell, Report
from benchmarks.skills.prompts import SKILLS, Prompt, heldout_prompts
from benchmarks.skills.score import DRAWING, asked, loaded, score, score_almost, score_drawn
from benchmarks.skills.sheet import write_sheet
from benchmarks.skills.training import CHUNK_STEPS, Recipe, Training, model_config, run
from mmdit.conditioning import ConditioningConfig

CONDITIONING: Final = ConditioningConfig(kind="byte-patch", max_tokens=12, token_dim=144, pooled_dim=256)
FULL: Final = Recipe(
    model=model_config(CONDITIONING, patch=4, layers=4, heads=3),
    conditioning=CONDITIONING,
    steps=2000 * CHUNK_STEPS,
    batch=16,
    lr=2.5e-3,
)
QUICK: Final = replace(
    FULL,
    model=model_config(CONDITIONING, patch=8, layers=1, heads=2),
    steps=2 * CHUNK_STEPS,
    batch=8,
    warmup=8,
)
SNAPSHOT_CHUNKS: Final = 128
"""Chunks between two snapshots."""
PROMPTS: Final = 164
"""Of each skill for the final score: every held-out word once."""
CURVE_PROMPTS: Final = 60
"""Of each skill for the snapshots before."""
JUDGED: Final = 164
QUICK_PROMPTS: Final = 4
SHEET_SEED: Final = 7

Shares = dict[str, float]
"""By skill."""


def train(recipe: Recipe, folder: Path) -> None:
    """Train to the end, leaving `average-SAMPLES.safetensors` in a folder; goes on from where it was broken off."""

    def after(training: Training, loss: float) -> None:
        number = training.step // CHUNK_STEPS
        if number % 8 == 0:
            say(f"{training.samples} samples, {training.cpu_seconds:.0f} s of processor time, loss {loss:.5f}")
        if number % SNAPSHOT_CHUNKS == 0 or training.step >= recipe.steps:
            _keep(training, folder)

    folder.mkdir(parents=True, exist_ok=True)
    run(recipe, folder / "state.pt", after_chunk=after)


def _keep(training: Training, folder: Path) -> None:
    path = folder / f"average-{training.samples:07d}.safetensors"
    new = path.with_suffix(".new")
    save_file(training.averaged(), new, metadata={"cpu_seconds": f"{training.cpu_seconds:.1f}"})
    new.replace(path)


def snapshots(folder: Path) -> dict[int, Path]:
    """Return the snapshots by samples trained on, in order."""
    return {int(path.stem.partition("-")[2]): path for path in sorted(folder.glob("average-*.safetensors"))}


def measure(recipe: Recipe, folder: Path, *, quick: bool) -> bool:
    """Train, score each snapshot, and write the results and the sheet unless `quick`; whether every target was met."""
    train(recipe, folder)
    report, cells = Report(name="skills"), Cells(None if quick else folder / "scores")
    count = QUICK_PROMPTS if quick else PROMPTS
    found = snapshots(folder)
    last = max(found)
    for samples, path in found.items():
        prompts = asked(count if samples == last else min(count, CURVE_PROMPTS))
        _add_row(report, "held out", path, len(prompts), samples, _scored(cells, recipe, path, prompts, "held"))
    scored = report.rows[-1]
    prompts = asked(count, heldout=False)
    _add_row(
        report, "as in training", found[last], len(prompts), last, _scored(cells, recipe, found[last], prompts, "seen")
    )
    judged = QUICK_PROMPTS if quick else JUDGED
    real, wrong = _judged(cells, asked(judged))
    _add_row(report, "drawn by the generator", None, len(SKILLS) * judged, None, real)
    _add_row(report, "drawn wrong in one point", None, len(SKILLS) * judged, None, wrong)
    _add_targets(report, scored, real, wrong)
    if not quick:
        _draw_sheet(recipe, found[last])
    return report.finish(quick=quick)


def _scored(cells: Cells, recipe: Recipe, path: Path, prompts: Sequence[Prompt], which: str) -> Shares:
    def drawn() -> Shares:
        found = dict(score(loaded(recipe, load_file(path)), prompts).by_skill)
        say(f"{path.stem}, {which}: {', '.join(f'{skill} {share:.3f}' for skill, share in found.items())}")
        return found

    key = hashlib.sha256(path.read_bytes() + repr((DRAWING, [prompt.caption for prompt in prompts])).encode())
    shares: Shares = cells.get(f"{path.stem}-{which}", key.hexdigest(), drawn)
    return shares


def _judged(cells: Cells, prompts: Sequence[Prompt]) -> tuple[Shares, Shares]:
    """Return how many right and how many wrong pictures the judge accepts."""

    def accepted() -> tuple[Shares, Shares]:
        return dict(score_drawn(prompts, prompts).by_skill), dict(score_almost(prompts).by_skill)

    key = hashlib.sha256(repr([prompt.caption for prompt in prompts]).encode()).hexdigest()
    real, wrong = cells.get("judge", key, accepted)
    return real, wrong


def _add_row(report: Report, what: str, path: Path | None, pictures: int, samples: int | None, shares: Shares) -> None:
    report.add_row(
        prompts=what,
        samples=samples,
        cpu_seconds=None if path is None else round(_cpu_seconds(path)),
        pictures=pictures,
        **{skill: round(share, 4) for skill, share in shares.items()},
        overall=round(fmean(shares.values()), 4),
    )


def _add_targets(report: Report, scored: Mapping[str, Cell], real: Shares, wrong: Shares) -> None:
    overall, spelling, seconds = (float(str(scored[name])) for name in ("overall", "spelling", "cpu_seconds"))
    report.add_target(
        "held-out combinations that are drawn right, mean of the skills",
        target="at least 0.80",
        value=overall,
        met=overall >= 0.80,
    )
    report.add_target(
        "held-out words that are spelled right", target="at least 0.60", value=spelling, met=spelling >= 0.60
    )
    report.add_target(
        "seconds of processor time in training", target="at most 7,200", value=seconds, met=seconds <= 7200
    )
    accepted, fooled = min(real.values()), max(wrong.values())
    report.add_target(
        "right pictures that the judge accepts, worst skill",
        target="at least 0.98",
        value=accepted,
        met=accepted >= 0.98,
    )
    report.add_target(
        "pictures wrong in one point that the judge accepts, worst skill",
        target="at most 0.02",
        value=fooled,
        met=fooled <= 0.02,
    )


def _draw_sheet(recipe: Recipe, path: Path) -> None:
    """Draw held-out prompts, the first of each skill, as they come: right or wrong."""
    prompts = [prompt for skill in SKILLS for prompt in heldout_prompts(np.random.default_rng(SHEET_SEED), skill, 6)]
    pictures = score(loaded(recipe, load_file(path)), prompts).pictures
    write_sheet(prompts, pictures, PICTURES / "skills.png")


def _cpu_seconds(path: Path) -> float:
    with safe_open(path, "np") as file:
        return float(file.metadata()["cpu_seconds"])
