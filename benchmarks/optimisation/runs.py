"""One whole training run by one method, in memory: held-out loss by round, and the bits that travelled."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from benchmarks.optimisation.combining import Combine, Late, Radial, Weighted
from benchmarks.optimisation.crowd import CrowdModel, Moments, Update, adamw, train
from benchmarks.optimisation.methods import Exchange, Ours, Plain, Sparse
from benchmarks.optimisation.muon import Muon
from benchmarks.optimisation.samples import RoundSamples, Shape, heldout
from benchmarks.optimisation.states import First, InnerState, Private, Public, Reset, Second
from diloco.codec import CodecConfig
from diloco.merge import OuterConfig
from diloco.patch import PatchConfig

Name = Literal[
    "data-parallel", "diloco-fp32", "diloco-int8", "sparseloco", "ours", "ours-fp32", "ours-codec", "ours-patch",
    "reset", "v", "v-outer-m", "v-ternary-m", "8-bit",
    "radial", "late-0", "late-0.5", "late-0.7", "late-1", "late-delayed", "short-by-samples", "short-equal",
    "muon", "muon-fp32",
]  # fmt: skip
GRADIENT_BITS: Final = 16.0
"""Data-parallel training sends and fetches gradients in bf16, as is usual."""
FINAL_SHARE: Final = 0.3
"""The learning rate falls in a straight line to this share of itself, round by round, if a course says nothing else."""
WARMUP: Final = 0.25
"""Share of a unit's steps over which the rate rises, if the unit starts from no moments."""
OUTER_LR: Final = 0.7
LATE: Final = 3
"""Of eight: two of five units are a round late in a simulated fleet (`benchmarks.fleet`)."""
CODEC: Final = CodecConfig(kind="dither", levels=1, block=1024, reach=704, width=64)
PATCH: Final = PatchConfig(block=1024, threshold=326)


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
    final_share: float = field(default=FINAL_SHARE, repr=False)
    """Not in `repr`, by which outcomes are found again that are older than this."""

    @property
    def outer(self) -> OuterConfig:
        """The outer optimiser's settings."""
        return OuterConfig(lr=OUTER_LR, momentum=self.momentum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What makes a method: where moments come from, how deltas travel, and how many volunteers do half a unit.

    `update` is the inner optimiser.
    """

    state: Callable[[Course, CrowdModel], InnerState]
    exchange: Callable[[Course, CrowdModel], Exchange]
    short: int = 0
    update: Callable[[CrowdModel], Update] = lambda _model: adamw


def play(course: Course) -> Mapping[str, Any]:
    """Run it. Returns `losses`: (round, held-out loss) pairs, and `up` and `down`, mean bits a parameter a round."""
    torch.set_num_threads(1)
    return _data_parallel(course) if course.method == "data-parallel" else _rounds(course, RECIPES[course.method])


def _rounds(course: Course, recipe: Recipe) -> Mapping[str, Any]:
    model = CrowdModel(_seed(course.seed))
    exchange, state = recipe.exchange(course, model), recipe.state(course, model)
    update = recipe.update(model)
    theta = model.first
    volunteers = course.shape.volunteers
    losses: list[tuple[int, float]] = []
    up = down = 0.0
    for number in range(1, course.rounds + 1):
        samples = RoundSamples(course.seed, number, course.shape)
        rates_SV = _rates(course, number, warm=state.is_new, short=recipe.short)
        moments = state.begin()
        trained = train(model, theta.repeat(volunteers, 1), moments, samples.of_crowd, rates_SV, update)
        fall, traffic = exchange.step(theta - trained, number)
        moved = state.end(moments, fall, float(rates_SV[:, 0].sum()), number)
        theta = theta - fall
        up, down = up + (traffic.up + moved.up) / course.rounds, down + (traffic.down + moved.down) / course.rounds
        if _is_measured(course, number):
            losses.append((number, model.loss(theta, heldout())))
    return {"losses": losses, "up": up, "down": down}


def _data_parallel(course: Course) -> Mapping[str, Any]:
    """The same samples, every step's gradients averaged over all volunteers; a round is only a way of counting."""
    model = CrowdModel(_seed(course.seed))
    theta = model.first.unsqueeze(0)
    moments = Moments.zeros(1, theta.numel())
    losses: list[tuple[int, float]] = []
    for number in range(1, course.rounds + 1):
        samples = RoundSamples(course.seed, number, course.shape)
        theta = train(model, theta, moments, samples.together, _rates(course, number, warm=number == 1))
        if _is_measured(course, number):
            losses.append((number, model.loss(theta[0], heldout())))
    bits = GRADIENT_BITS * course.shape.steps
    return {"losses": losses, "up": bits, "down": bits}


def _rates(course: Course, number: int, *, warm: bool, short: int = 0) -> Tensor:
    """Return a round's learning rates, [S, 1]; with volunteers that stop half way, [S, V]."""
    steps = course.shape.steps
    long = torch.tensor(_ramp(course, number, steps, warm=warm))
    if not short:
        return long[:, None]
    half = torch.zeros(steps)
    half[: steps // 2] = torch.tensor(_ramp(course, number, steps // 2, warm=warm))
    volunteers = course.shape.volunteers
    return torch.stack([long] * (volunteers - short) + [half] * short, dim=1)


def _ramp(course: Course, number: int, steps: int, *, warm: bool) -> list[float]:
    lr = course.lr * (1.0 - (1.0 - course.final_share) * (number - 1) / max(1, course.rounds - 1))
    rising = max(1, math.ceil(steps * WARMUP)) if warm else 1
    return [lr * min(1.0, (step + 1) / rising) for step in range(steps)]


def _is_measured(course: Course, number: int) -> bool:
    return number % max(1, course.rounds // course.points) == 0 or number == course.rounds


def _seed(number: int) -> bytes:
    return number.to_bytes(32, "little")


# --- the methods ---------------------------------------------------------------------------------------------


def _private(course: Course, model: CrowdModel) -> InnerState:
    return Private(course.shape.volunteers, model.first.numel())


def _reset(course: Course, model: CrowdModel) -> InnerState:
    return Reset(course.shape.volunteers, model.first.numel())


def _public(course: Course, model: CrowdModel, *, second: Second, first: First) -> InnerState:
    return Public(
        model,
        course.shape.volunteers,
        second=second,
        first=first,
        outer=course.outer,
        codec=CODEC,
        seed=course.seed + 1_000,
    )


def _plain(course: Course, _model: CrowdModel, *, bits: Literal[8, 32] = 32) -> Exchange:
    return Plain(course.outer, bits=bits)


def _sparse(_course: Course, _model: CrowdModel) -> Exchange:
    return Sparse()


def _ours(
    course: Course,
    model: CrowdModel,
    *,
    codec: CodecConfig | None = CODEC,
    patch: PatchConfig | None = PATCH,
    combine: Callable[[Course, CrowdModel], Combine] | None = None,
) -> Exchange:
    how = None if combine is None else combine(course, model)
    return Ours(model, course.outer, codec, patch, course.seed, how)


def _muon(model: CrowdModel) -> Update:
    return Muon(model.schema)


def _radial(_course: Course, model: CrowdModel) -> Combine:
    return Radial(model.schema)


def _late(_course: Course, _model: CrowdModel, *, discount: float, delayed: bool = False) -> Combine:
    return Late(LATE, discount, delayed=delayed)


def _by_samples(course: Course, _model: CrowdModel) -> Combine:
    half = course.shape.volunteers // 2
    return Weighted([1.0] * (course.shape.volunteers - half) + [0.5] * half)


def _late_recipe(discount: float, *, delayed: bool = False) -> Recipe:
    combine = partial(_late, discount=discount, delayed=delayed)
    return Recipe(state=_reset, exchange=partial(_ours, combine=combine))


RECIPES: Final[Mapping[Name, Recipe]] = {
    "diloco-fp32": Recipe(state=_private, exchange=_plain),
    "diloco-int8": Recipe(state=_private, exchange=partial(_plain, bits=8)),
    "sparseloco": Recipe(state=_private, exchange=_sparse),
    "ours": Recipe(state=_reset, exchange=_ours),
    "ours-fp32": Recipe(state=_reset, exchange=partial(_ours, codec=None, patch=None)),
    "ours-codec": Recipe(state=_reset, exchange=partial(_ours, patch=None)),
    "ours-patch": Recipe(state=_reset, exchange=partial(_ours, codec=None)),
    "reset": Recipe(state=_reset, exchange=_plain),
    "v": Recipe(state=partial(_public, second="factored", first="zero"), exchange=_plain),
    "v-outer-m": Recipe(state=partial(_public, second="factored", first="outer"), exchange=_plain),
    "v-ternary-m": Recipe(state=partial(_public, second="factored", first="ternary"), exchange=_plain),
    "8-bit": Recipe(state=partial(_public, second="full", first="full"), exchange=_plain),
    "radial": Recipe(state=_reset, exchange=partial(_ours, combine=_radial)),
    "late-0": _late_recipe(0.0),
    "late-0.5": _late_recipe(0.5),
    "late-0.7": _late_recipe(0.7),
    "late-1": _late_recipe(1.0),
    "late-delayed": _late_recipe(1.0, delayed=True),
    "short-by-samples": Recipe(state=_reset, exchange=partial(_ours, combine=_by_samples), short=4),
    "short-equal": Recipe(state=_reset, exchange=_ours, short=4),
    "muon": Recipe(state=_reset, exchange=_ours, update=_muon),
    "muon-fp32": Recipe(state=_reset, exchange=partial(_ours, codec=None, patch=None), update=_muon),
}
"""Every method but data-parallel training, which has no rounds."""
