"""A work unit as a pure function: (spec, base checkpoint, shards) to (delta, trail).

No state is carried from one unit to the next: AdamW starts from zero moments, and every random number follows from the
unit's seed. Training bits may differ between machines (kernels, threads, instruction sets); who replays a unit judges
the decoded delta by tolerance. Within one process, device and thread count the same bits come out every time.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol

import numpy as np
import torch

from diloco.draws import Batch, Draws, in_turn
from diloco.execution import PLAIN, Execution
from diloco.narrow import NarrowTrainer
from diloco.optimizers import OPTIMIZERS, OptimizerName, OptimizerSettings, make_optimizer
from diloco.shards import ShardSet
from diloco.streams import SEED_BYTES
from diloco.tables import Floats
from diloco.trail import Segment, Trail
from mmdit.config import MMDiTConfig
from mmdit.flow import VelocityModel, flow_loss_B, shift_for
from mmdit.products import rounded_to_bf16
from mmdit.transformer import MMDiT, build
from protocol.errors import TrainingDiverged

DROPOUT_ONE: Final = 1 << 16
"""`text_dropout` of one: every caption dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """The inner loop of every unit of a run.

    Args:
        steps: AdamW steps of a unit.
        batch: samples of a step.
        lr: learning rate after the warm-up, before the unit's `lr_scale`.
        warmup_steps: steps over which the learning rate rises linearly, at the start of every unit; 0 is none.
        beta1, beta2, eps, weight_decay: AdamW's (arXiv 1711.05101).
        grad_clip: largest L2 norm of a step's gradient.
        text_dropout: probability, in units of 2^-16, that what a text encoder says of a sample is not heard; of each
            encoder by itself.
        shift: of the timesteps towards noise, for pictures of the model's size; larger ones shift more
            (`mmdit.flow.shift_for`).
        max_tokens: text tokens of every sample, zero padded; must be the conditioning's.
        segment_steps: steps between two entries of the trail.
        precision: "fp32", with TF32 off; or "bf16": weights and AdamW in fp32, forward and backward pass on bf16 copies
            of weights and inputs, timesteps and loss in fp32. One run has one precision; replays of bf16 agree less.
        optimizer: "adamw", or "adamw-factored" with half its memory; see `diloco.optimizers`.
    """

    steps: int
    batch: int
    lr: float
    warmup_steps: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip: float
    text_dropout: int
    shift: float
    max_tokens: int
    segment_steps: int
    precision: Literal["fp32", "bf16"]
    optimizer: OptimizerName

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "segment_steps", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "eps", "grad_clip", "shift"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must not be negative")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be from 0 to steps ({self.steps})")
        if not 0 <= self.text_dropout <= DROPOUT_ONE:
            raise ValueError(
                f"text_dropout is {self.text_dropout}; it must be from 0 to {DROPOUT_ONE} (units of 2^-16)"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}; this version trains in 'fp32' or 'bf16'")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; this version knows {' and '.join(OPTIMIZERS)}")

    def lr_at(self, step: int, lr_scale: float) -> float:
        """Return the learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * lr_scale * rise


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """One unit: the 32-byte seed of all its randomness, the run's inner loop, and the round's learning-rate factor."""

    seed: bytes
    training: TrainingSpec
    lr_scale: float

    def __post_init__(self) -> None:
        if len(self.seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, this one has {len(self.seed)}")
        if not 0.0 < self.lr_scale < math.inf:
            raise ValueError(f"lr_scale is {self.lr_scale}; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Progress after a step: `step` of `steps`, counted from 1, and the loss of its batch."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """What a unit gives: delta = base - trained weights (fp32, the pseudo-gradient), trail, losses, samples seen."""

    delta: dict[str, Floats]
    trail: Trail
    loss_first: float
    loss_last: float
    samples: int


def run_unit(
    spec: UnitSpec,
    config: MMDiTConfig,
    base: Mapping[str, Floats],
    shards: ShardSet,
    *,
    device: str,
    on_step: Callable[[StepReport], None] | None,
    execution: Execution = PLAIN,
) -> UnitResult:
    """Train one unit from a base checkpoint.

    Call `determinism.set_precision` once in the process before: precision and threads are settings of the process.

    Args:
        base: the checkpoint's tensors, fp32, by diffusers' names, with the position-embedding buffer.
        device: "cpu" or "cuda".
        on_step: called after each step; may raise to abandon the unit.
        execution: what the device does about its memory; it changes rounding, not what is computed.

    Raises:
        TrainingDiverged: a loss or a weight is not finite.
        ShardCorrupt: a sample has more text than the run allows.
        ValueError: `base` does not fit `config`, or the batch has no such number of equal parts.
    """
    training = spec.training
    if training.batch % execution.parts:
        raise ValueError(f"a batch of {training.batch} cannot be cut into {execution.parts} equal parts")
    trainer = make_trainer(training, config, base, device=device, execution=execution)
    parameters = trainer.masters
    draws = Draws(spec.seed)
    shift = shift_for(training.shift, config.sample_size, *shards.shards[0].size[1:])
    losses: list[float] = []
    segments: list[Segment] = []
    draw = partial(
        draws.batch,
        size=training.batch,
        shards=shards,
        max_tokens=training.max_tokens,
        text_dropout=training.text_dropout,
        shift=shift,
    )
    # A GPU works while the CPU draws; a CPU that trains has no core to spare.
    for step, drawn in enumerate(in_turn(draw, training.steps, ahead=device != "cpu")):
        lr = training.lr_at(step, spec.lr_scale)
        losses.append(math.fsum(float(loss.item()) for loss in trainer.step(drawn, lr)))
        if not math.isfinite(losses[-1]):
            raise TrainingDiverged(
                f"The loss became {losses[-1]} at step {step + 1} of {training.steps}; unit dropped."
            )
        if (step + 1) % training.segment_steps == 0 or step + 1 == training.steps:
            segments.append(_segment(parameters, losses[len(segments) * training.segment_steps :]))
        if on_step is not None:
            on_step(StepReport(step=step + 1, steps=training.steps, loss=losses[-1]))
    return UnitResult(
        delta=_delta(base, parameters),
        trail=Trail(segments=tuple(segments)),
        loss_first=losses[0],
        loss_last=losses[-1],
        samples=training.steps * training.batch,
    )


class StepTrainer(Protocol):
    """A model in training: its fp32 weights by name, in the schema's order, and one step of them."""

    masters: dict[str, torch.nn.Parameter]

    def step(self, drawn: Batch, lr: float) -> list[torch.Tensor]:
        """Make one step on a batch (on the CPU); return the loss of each of its parts, which add up to the batch's."""
        ...


def make_trainer(
    training: TrainingSpec, config: MMDiTConfig, base: Mapping[str, Floats], *, device: str, execution: Execution
) -> StepTrainer:
    """Return the model of a unit before its first step.

    Raises:
        ValueError: `base` does not fit `config`.
    """
    if execution.keeping == "whole":
        return WholeTrainer(training, config, base, device=device, execution=execution)
    return NarrowTrainer(
        config,
        base,
        device=device,
        dtype=_dtype(training),
        execution=execution,
        grad_clip=training.grad_clip,
        make_optimizer=partial(_optimizer, training),
    )


class WholeTrainer:
    """Everything on the device, all tensors updated in one call."""

    def __init__(
        self,
        training: TrainingSpec,
        config: MMDiTConfig,
        base: Mapping[str, Floats],
        *,
        device: str,
        execution: Execution,
    ) -> None:
        self._training = training
        self._parts = execution.parts
        self._model = build(config, base, device=device).train()
        self._model.checkpointing = execution.checkpointing
        # One order for optimiser, trail and delta: the schema's.
        self.masters = dict(sorted(self._model.named_parameters()))
        self._optimizer = _optimizer(training, list(self.masters.values()))

    def step(self, drawn: Batch, lr: float) -> list[torch.Tensor]:
        """See `StepTrainer`."""
        return _train_step(self._model, self.masters, self._optimizer, drawn, self._training, lr, self._parts)


def _dtype(training: TrainingSpec) -> torch.dtype:
    return torch.bfloat16 if training.precision == "bf16" else torch.float32


def _optimizer(training: TrainingSpec, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    settings = OptimizerSettings(
        name=training.optimizer,
        mean_dtype=_dtype(training),
        lr=training.lr,
        beta1=training.beta1,
        beta2=training.beta2,
        eps=training.eps,
        weight_decay=training.weight_decay,
    )
    return make_optimizer(settings, parameters)


def _train_step(
    model: MMDiT,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    drawn: Batch,
    training: TrainingSpec,
    lr: float,
    parts: int,
) -> list[torch.Tensor]:
    optimizer.zero_grad(set_to_none=True)
    losses: list[torch.Tensor] = []
    device = str(next(iter(parameters.values())).device)
    for part in (each.to(device) for each in drawn.parts(parts)):
        predict = _in_bf16(model, parameters) if training.precision == "bf16" else model
        loss = flow_loss_B(predict, part.latent, part.text, part.pooled, part.noise, part.t).mean()
        if parts > 1:
            loss = loss / parts
        torch.autograd.backward([loss])
        losses.append(loss.detach())
    torch.nn.utils.clip_grad_norm_(parameters.values(), training.grad_clip, foreach=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return losses


def _in_bf16(model: MMDiT, parameters: Mapping[str, torch.nn.Parameter]) -> VelocityModel:
    """Return the model with all its arithmetic in bf16: an explicit cast of every weight and input, and no autocast.

    Which operations autocast widens is the choice of each version of torch; a replay needs that choice fixed. Timesteps
    go in as fp32, since bf16 would merge neighbours, and are narrowed after they have become waves. The casts are part
    of the graph, so gradients arrive at the fp32 weights as fp32.
    """
    narrow = dict(zip(parameters, rounded_to_bf16(list(parameters.values())), strict=True))

    def predict(
        latent_BCHW: torch.Tensor, text_BLD: torch.Tensor, pooled_BP: torch.Tensor, timestep_B: torch.Tensor, /
    ) -> torch.Tensor:
        inputs = (*(x.to(torch.bfloat16) for x in (latent_BCHW, text_BLD, pooled_BP)), timestep_B)
        velocity_BCHW: torch.Tensor = torch.func.functional_call(model, narrow, inputs)
        return velocity_BCHW

    return predict


def _segment(parameters: Mapping[str, torch.nn.Parameter], losses: list[float]) -> Segment:
    hasher = hashlib.sha256()
    for parameter in parameters.values():
        hasher.update(_array(parameter).astype("<f4", copy=False).reshape(-1).data.cast("B"))
    return Segment(weights_digest=hasher.digest(), mean_loss=math.fsum(losses) / len(losses))


def _delta(base: Mapping[str, Floats], parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Floats]:
    delta = {name: np.subtract(base[name], _array(parameter)) for name, parameter in parameters.items()}
    for name, values in delta.items():
        if not np.all(np.isfinite(values)):
            raise TrainingDiverged(f"{name} is not finite at the end of the unit; the unit was dropped.")
    return delta


def _array(parameter: torch.nn.Parameter) -> Floats:
    array: Floats = parameter.detach().contiguous().cpu().numpy()
    return array
