"""One training step (forward, backward, AdamW): ours against `diffusers.SD3Transformer2DModel` in the same loop.

    python -m benchmarks.train_step [--quick]

Both models hold the same weights and take turns, step by step, so that whatever else the machine does falls on both.
The ratio is the median over pairs of neighbouring steps; below 1 ours is quicker. Times are processor time on a CPU
(one thread, so on an idle machine the same as wall time) and wall time on a GPU.
"""

import argparse
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import Report
from mmdit.config import MMDiTConfig
from mmdit.presets import PRESETS
from mmdit.transformer import MMDiT

_WARM_UP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape on one device in one precision ("fp32", or "bf16" for automatic mixed precision)."""

    name: str
    config: MMDiTConfig
    batch: int
    tokens: int
    device: str
    precision: str
    steps: int


def _cases(*, quick: bool) -> Iterator[Case]:
    d12 = PRESETS["d12"]
    d4 = replace(
        d12,
        num_layers=4,
        num_attention_heads=4,
        caption_projection_dim=256,
        joint_attention_dim=512,
        pooled_projection_dim=512,
    )
    digits = Case(
        name="digits",
        config=PRESETS["digits"],
        batch=32,
        tokens=6,
        device="cpu",
        precision="fp32",
        steps=60 if quick else 400,
    )
    hidden_256 = Case(
        name="hidden 256",
        config=d4,
        batch=4,
        tokens=77,
        device="cpu",
        precision="fp32",
        steps=8 if quick else 40,
    )
    yield digits
    yield hidden_256
    yield replace(hidden_256, name="hidden 256, no norm", config=replace(d4, qk_norm=None))
    if not quick:
        yield replace(hidden_256, name="hidden 256, dual", config=replace(d4, dual_attention_layers=(0, 1)))
    if torch.cuda.is_available():
        steps = 20 if quick else 60
        on_gpu = Case(name="d12", config=d12, batch=16, tokens=154, device="cuda", precision="fp32", steps=steps)
        yield replace(digits, name="digits on a GPU", device="cuda")
        yield on_gpu
        yield replace(on_gpu, precision="bf16", batch=64)


def _reference(config: MMDiTConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers and its imports warn about themselves
        diffusers: Any = importlib.import_module("diffusers")  # it has no types
        model = diffusers.SD3Transformer2DModel.from_config(config.to_diffusers())
    assert isinstance(model, nn.Module)
    return model


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config, side = case.config, case.config.sample_size
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(case.batch, config.in_channels, side, side, generator=generator)
    text = torch.randn(case.batch, case.tokens, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(case.batch, config.pooled_projection_dim, generator=generator)
    timestep = 1000 * torch.rand(case.batch, generator=generator)
    return latent.to(case.device), text.to(case.device), pooled.to(case.device), timestep.to(case.device)


def _stepper(case: Case, model: nn.Module, predict: Callable[[], Tensor], target: Tensor) -> Callable[[], float]:
    """A function that makes one training step and returns its milliseconds."""
    # The fused AdamW is the quickest in torch, so the comparison is about the models.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mixed = case.precision == "bf16"
    clock = time.process_time if case.device == "cpu" else time.perf_counter

    def step() -> float:
        _wait(case.device)
        start = clock()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device, torch.bfloat16) if mixed else nullcontext():
            loss = (predict().float() - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _wait(case.device)
        return 1e3 * (clock() - start)

    return step


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _measure(case: Case) -> tuple[float, float, float]:
    """Median milliseconds of our step, of diffusers' step, and the median of the ratios of neighbours."""
    latent, text, pooled, timestep = _inputs(case)
    torch.manual_seed(0)
    ours, theirs = MMDiT(case.config), _reference(case.config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours, theirs = ours.to(case.device), theirs.to(case.device)
    target = torch.zeros_like(ours(latent, text, pooled, timestep))

    def diffusers_predicts() -> Tensor:
        (out,) = theirs(
            hidden_states=latent,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timestep,
            return_dict=False,
        )
        assert isinstance(out, Tensor)
        return out

    step_ours = _stepper(case, ours, lambda: ours(latent, text, pooled, timestep), target)
    step_theirs = _stepper(case, theirs, diffusers_predicts, target)
    for _ in range(_WARM_UP):
        step_ours()
        step_theirs()
    times_ours, times_theirs = [], []
    for i in range(case.steps):
        if i % 2:  # whoever comes second finds the cache as the other left it
            times_theirs.append(step_theirs())
            times_ours.append(step_ours())
        else:
            times_ours.append(step_ours())
            times_theirs.append(step_theirs())
    ratios = [a / b for a, b in zip(times_ours, times_theirs, strict=True)]
    return statistics.median(times_ours), statistics.median(times_theirs), statistics.median(ratios)


def main() -> int:
    """Measure every case; exit status 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Our training step against diffusers' in the same loop.")
    parser.add_argument("--quick", action="store_true", help="fewer steps; writes nothing")
    quick: bool = parser.parse_args().quick
    torch.set_num_threads(1)
    report = Report(name="train_step")
    for case in _cases(quick=quick):
        ours, theirs, ratio = _measure(case)
        report.add_row(
            case=case.name,
            device=case.device,
            precision=case.precision,
            batch=case.batch,
            steps=case.steps,
            ours_ms=round(ours, 3),
            diffusers_ms=round(theirs, 3),
            ratio=round(ratio, 4),
        )
        report.add_target(
            f"{case.name} ({case.device}, {case.precision}): our step over diffusers'",
            target="at most 1.00",
            value=round(ratio, 4),
            met=ratio <= 1.0,
        )
    return 0 if report.finish(quick=quick) else 1


if __name__ == "__main__":
    sys.exit(main())
