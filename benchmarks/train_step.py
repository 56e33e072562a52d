"""One training step of a unit: ours against `diffusers.SD3Transformer2DModel` in a plain, well-written eager loop.

    python -m benchmarks.train_step [--quick]

Ours is the step that `run_unit` takes. The other loop does the same work with what torch and diffusers offer: the same
batch and loss, the fused AdamW, fused attention, clipped gradients, and in bf16 fp32 weights under autocast, as
diffusers' own training scripts have it. Each side has a process of its own, as it would in use, and they take turns,
step by step, so that whatever else the machine does falls on both. A speed is the median over pairs of neighbouring
steps of their time over ours; above 1 ours is quicker. Times are processor time on a CPU (one thread, so on an idle
machine the same as wall time) and wall time on a GPU.

Where the gain comes from on a CPU. In fp32 three quarters of the time are matrix products, the same MKL calls on both
sides. The gain lies in the rest: a GELU whose backward pass is one product, one pass each for a modulation and a gate,
the patch embedding as a product, text queries that nothing reads left out, freed memory that is kept instead of cleared
anew. Where text is padded with zeros, all zeros of a sample are computed once (`mmdit.silence`), which saves products
too. In bf16, on a processor without bf16 instructions, nearly all of it is that the same numbers go through the fp32
product (`mmdit.products`); torch's own bf16 products take up to a hundred times as long there. The rows "bf16 against
fp32" therefore compare with the quickest that diffusers can do on such a processor, which is to train in fp32.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from benchmarks.plain_training import LR, plain_training
from benchmarks.report import Report
from diloco.determinism import set_precision
from diloco.draws import Batch
from diloco.execution import Execution
from diloco.unit import TrainingSpec, make_trainer
from mmdit.config import MMDiTConfig
from mmdit.flow import flow_loss_B
from mmdit.presets import PRESETS, of_depth
from mmdit.transformer import MMDiT

Precision = Literal["fp32", "bf16"]
Side = Literal["ours", "theirs"]
_MOST_WARM_UP: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape on one device.

    Args:
        tokens: text tokens of every sample.
        said: of them, at least and at most so many are no padding, evenly drawn; all if there is no such pair.
        precision: ours, and theirs unless `against` says otherwise.
        steps: pairs of steps that are timed.
        target: the least speed, if one is claimed.
    """

    name: str
    config: MMDiTConfig
    batch: int
    tokens: int
    said: tuple[int, int] | None
    device: str
    precision: Precision
    against: Precision
    steps: int
    target: float | None


def _cases(*, quick: bool) -> Iterator[Case]:
    def both_ways(case: Case, slow_steps: int) -> Iterator[Case]:
        yield case
        yield replace(case, precision="bf16", against="bf16", steps=slow_steps, target=1.3)
        yield replace(
            case, name=f"{case.name}, bf16 against fp32", precision="bf16", steps=case.steps // 2, target=None
        )

    digits = Case(
        name="digits",
        config=PRESETS["digits"],
        batch=32,
        tokens=6,
        said=None,
        device="cpu",
        precision="fp32",
        against="fp32",
        steps=60 if quick else 400,
        target=1.1,
    )
    # 128 x 128 pixels through an 8-fold autoencoder.
    d8 = replace(
        digits,
        name="d8",
        config=replace(of_depth(8), sample_size=16, pos_embed_max_size=8),
        batch=4,
        tokens=154,
        steps=24,
    )
    d4 = replace(of_depth(4), joint_attention_dim=512, pooled_projection_dim=512)
    hidden_256 = replace(digits, name="hidden 256", config=d4, batch=4, tokens=77, steps=8 if quick else 40, target=1.0)
    yield from both_ways(digits, 20 if quick else 100)
    yield hidden_256
    yield replace(hidden_256, name="hidden 256, no norm", config=replace(d4, qk_norm=None))
    if not quick:
        yield from both_ways(d8, 2)
        yield replace(d8, name="d8, 20 to 80 tokens and zeros", said=(20, 80), steps=12)
        yield replace(hidden_256, name="hidden 256, dual", config=replace(d4, dual_attention_layers=(0, 1)))
    if torch.cuda.is_available():
        steps = 20 if quick else 60
        d12 = replace(digits, config=PRESETS["d12"], batch=16, tokens=154, device="cuda", steps=steps, target=1.0)
        yield replace(digits, name="digits on a GPU", device="cuda", target=1.0)
        yield replace(d12, name="d12")
        yield replace(d12, name="d12", precision="bf16", against="bf16", batch=64)


# --- the process of one side -----------------------------------------------------------------------------------


def _batch(case: Case) -> Batch:
    config, side = case.config, case.config.sample_size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.batch, *shape, generator=generator)

    text = normal(case.tokens, config.joint_attention_dim)
    if case.said is not None:
        least, most = case.said
        for row, end in enumerate(torch.randint(least, most + 1, (case.batch,), generator=generator).tolist()):
            text[row, end:] = 0
    return Batch(
        latent=normal(config.in_channels, side, side),
        text=text,
        pooled=normal(config.pooled_projection_dim),
        noise=normal(config.in_channels, side, side),
        t=torch.rand(case.batch, generator=generator),
    ).to(case.device)


def _training(case: Case) -> TrainingSpec:
    return plain_training(batch=case.batch, tokens=case.tokens, precision=case.precision)


def _our_step(case: Case) -> Callable[[], float]:
    set_precision(case.device, 1)
    drawn, base = _batch(case), {name: tensor.numpy() for name, tensor in _weights(case.config).items()}
    trainer = make_trainer(_training(case), case.config, base, device=case.device, execution=Execution())

    def step() -> float:
        (loss,) = trainer.step(drawn, LR)
        return float(loss.item())

    return step


def _their_step(case: Case) -> Callable[[], float]:
    torch.set_num_threads(1)
    drawn, model = _batch(case), _reference(case)
    training = _training(case)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=training.weight_decay, fused=True
    )

    def predict(latent: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor, /) -> Tensor:
        (out,) = model(
            hidden_states=latent,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timestep,
            return_dict=False,
        )
        assert isinstance(out, Tensor)
        return out

    def mixed() -> AbstractContextManager[Any]:
        return torch.autocast(case.device, torch.bfloat16) if case.against == "bf16" else nullcontext()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with mixed():
            loss = flow_loss_B(predict, drawn.latent, drawn.text, drawn.pooled, drawn.noise, drawn.t).mean()
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip, foreach=True)
        optimizer.step()
        return float(loss.item())

    return step


def _weights(config: MMDiTConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return MMDiT(config).state_dict()


def _reference(case: Case) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers and its imports warn about themselves
        diffusers: Any = importlib.import_module("diffusers")  # it has no types
        model = diffusers.SD3Transformer2DModel.from_config(case.config.to_diffusers())
    assert isinstance(model, nn.Module)
    model.load_state_dict(_weights(case.config), strict=True)
    return model.to(case.device).train()


def _serve(side: Side, case: Case) -> None:
    """Take a step for each line that comes in, and answer with its milliseconds and its loss."""
    step = _our_step(case) if side == "ours" else _their_step(case)
    clock = time.process_time if case.device == "cpu" else time.perf_counter
    for _ in sys.stdin:
        start = clock()
        loss = step()  # the loss is a number, so a GPU has finished all but the optimiser
        if case.device == "cuda":
            torch.cuda.synchronize()
        sys.stdout.write(f"{1e3 * (clock() - start)!r} {loss!r}\n")
        sys.stdout.flush()


# --- the process that measures ---------------------------------------------------------------------------------


class _Peer:
    """One side's process."""

    def __init__(self, side: Side, number: int, *, quick: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.train_step", "--serve", side, "--case", str(number)]
        root = Path(__file__).parent.parent
        self._process = subprocess.Popen(
            command + (["--quick"] if quick else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def step(self) -> tuple[float, float]:
        """Milliseconds and loss of the next step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if len(answer) != 2:
            raise RuntimeError(f"a process of the benchmark ended with status {self._process.wait()}")
        return float(answer[0]), float(answer[1])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Median milliseconds of both, the median of the ratios of neighbours, and how far the first losses are apart."""

    ours: float
    theirs: float
    speed: float
    loss_difference: float


def _measure(number: int, case: Case, *, quick: bool) -> Measured:
    sides: tuple[Side, Side] = ("ours", "theirs")
    peers = {side: _Peer(side, number, quick=quick) for side in sides}
    try:
        losses = [peers[side].step()[1] for side in sides]
        for _ in range(min(_MOST_WARM_UP, case.steps // 2) - 1):
            for side in sides:
                peers[side].step()
        times: dict[Side, list[float]] = {"ours": [], "theirs": []}
        for i in range(case.steps):
            for side in sides if i % 2 else reversed(sides):
                times[side].append(peers[side].step()[0])
    finally:
        for peer in peers.values():
            peer.close()
    return Measured(
        ours=statistics.median(times["ours"]),
        theirs=statistics.median(times["theirs"]),
        speed=statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True)),
        loss_difference=abs(losses[0] - losses[1]) / losses[1],
    )


def _add(report: Report, case: Case, measured: Measured) -> None:
    report.add_row(
        case=case.name,
        device=case.device,
        precision=case.precision,
        diffusers_in=case.against,
        batch=case.batch,
        steps=case.steps,
        ours_ms=round(measured.ours, 3),
        diffusers_ms=round(measured.theirs, 3),
        speed=round(measured.speed, 4),
        first_losses_differ_by=float(f"{measured.loss_difference:.2g}"),
    )
    if case.target is not None:
        report.add_target(
            f"{case.name} ({case.device}, {case.precision}): our samples/s over diffusers'",
            target=f"at least {case.target:.2f}",
            value=round(measured.speed, 4),
            met=measured.speed >= case.target,
        )


def main() -> int:
    """Measure every case; exit status 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Our training step against diffusers' in a plain loop.")
    parser.add_argument("--quick", action="store_true", help="fewer steps; writes nothing")
    parser.add_argument("--serve", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    cases = list(_cases(quick=quick))
    if arguments.serve is not None:
        _serve(arguments.serve, cases[arguments.case])
        return 0
    report = Report(name="train_step")
    for number, case in enumerate(cases):
        _add(report, case, _measure(number, case, quick=quick))
    return 0 if report.finish(quick=quick) else 1


if __name__ == "__main__":
    sys.exit(main())
