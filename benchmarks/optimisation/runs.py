"""One whole training run by one method, in memory: held-out loss by round, and the bits that travelled."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from benchmarks.optimisation.crowd import CrowdModel, Moments, train
from benchmarks.optimisation.methods import Exchange, Inner, Ours, Plain, Sparse
from benchmarks.optimisation.samples import RoundSamples, Shape, heldout
from diloco.codec import CodecConfig
from diloco.merge import OuterConfig
from diloco.patch import PatchConfig

Name = Literal["data-parallel", "diloco-fp32", "diloco-int8", "sparseloco", "ours", "ours-fp32"]
GRADIENT_BITS: Final = 16.0
"""Data-parallel training sends and fetches gradients in bf16, as is usual."""
FINAL_SHARE: Final = 0.3
"""The learning rate falls in a straight line to this share of itself, round by round, with every method."""
CODEC: Final = CodecConfig(kind="dither", levels=1, block=1024, reach=704, width=128)
PATCH: Final = PatchConfig(block=1024, threshold=288)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A run: method, seed, shape of a round, and rounds; learning rate and outer momentum of the method's own."""

    method: Name
    seed: int
    shape: Shape
    rounds: int
    lr: float
    momentum: float = 0.0
    points: int = 20


def play(course: Course) -> Mapping[str, Any]:
    """Run it. Returns `losses`: (round, held-out loss) pairs, and `up` and `down`, mean bits a parameter a round."""
    torch.set_num_threads(1)
    return _data_parallel(course) if course.method == "data-parallel" else _rounds(course)


def _rounds(course: Course) -> Mapping[str, Any]:
    model = CrowdModel(_seed(course.seed))
    exchange, inner = _method(course, model)
    theta = model.first
    volunteers = course.shape.volunteers
    moments = Moments.zeros(volunteers, theta.numel())
    losses: list[tuple[int, float]] = []
    up = down = 0.0
    for number in range(1, course.rounds + 1):
        if inner.state == "reset":
            moments = Moments.zeros(volunteers, theta.numel())
        samples = RoundSamples(course.seed, number, course.shape)
        warm = inner.state == "reset" or number == 1
        rates = _rates(inner.lr * _decay(number, course.rounds), course.shape.steps, inner.warmup if warm else 0.0)
        trained = train(model, theta.repeat(volunteers, 1), moments, samples.of_crowd, rates)
        fall, traffic = exchange.step(theta - trained, number)
        theta = theta - fall
        up, down = up + traffic.up / course.rounds, down + traffic.down / course.rounds
        if _is_measured(course, number):
            losses.append((number, model.loss(theta, heldout())))
    return {"losses": losses, "up": up, "down": down}


def _data_parallel(course: Course) -> Mapping[str, Any]:
    """The same samples, every step's gradients averaged over all volunteers; a round is only a way of counting."""
    model = CrowdModel(_seed(course.seed))
    theta = model.first.unsqueeze(0)
    moments = Moments.zeros(1, theta.numel())
    losses: list[tuple[int, float]] = []
    steps = course.shape.steps
    for number in range(1, course.rounds + 1):
        samples = RoundSamples(course.seed, number, course.shape)
        rates = _rates(course.lr * _decay(number, course.rounds), steps, 0.25 if number == 1 else 0.0)
        theta = train(model, theta, moments, samples.together, rates)
        if _is_measured(course, number):
            losses.append((number, model.loss(theta[0], heldout())))
    bits = GRADIENT_BITS * steps
    return {"losses": losses, "up": bits, "down": bits}


def _method(course: Course, model: CrowdModel) -> tuple[Exchange, Inner]:
    outer = OuterConfig(lr=0.7, momentum=course.momentum)
    match course.method:
        case "diloco-fp32":
            return Plain(outer), Inner(lr=course.lr, state="private")
        case "diloco-int8":
            return Plain(outer, bits=8), Inner(lr=course.lr, state="private")
        case "sparseloco":
            return Sparse(), Inner(lr=course.lr, state="private")
        case "ours":
            return Ours(model, outer, CODEC, PATCH, course.seed), Inner(lr=course.lr, state="reset")
        case _:
            return Ours(model, outer, None, None, course.seed), Inner(lr=course.lr, state="reset")


def _rates(lr: float, steps: int, warmup: float) -> list[float]:
    rising = max(1, math.ceil(steps * warmup)) if warmup else 1
    return [lr * min(1.0, (step + 1) / rising) for step in range(steps)]


def _decay(number: int, rounds: int) -> float:
    return 1.0 - (1.0 - FINAL_SHARE) * (number - 1) / max(1, rounds - 1)


def _is_measured(course: Course, number: int) -> bool:
    return number % max(1, course.rounds // course.points) == 0 or number == course.rounds


def _seed(number: int) -> bytes:
    return number.to_bytes(32, "little")
