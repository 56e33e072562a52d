"""The inner optimisers that a run can choose. A unit starts each from zero state."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

OptimizerName = Literal["adamw", "adamw-factored"]
OPTIMIZERS: Final[tuple[OptimizerName, ...]] = ("adamw", "adamw-factored")
_TINY: Final = 1e-38


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Which optimiser, and AdamW's numbers (arXiv 1711.05101); the learning rate is set before every step.

    `mean_dtype` is that of the factored optimiser's first moment: bf16 where gradients are too.
    """

    name: OptimizerName
    mean_dtype: torch.dtype
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def make_optimizer(settings: OptimizerSettings, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return an optimiser with zero state for fp32 parameters, on whatever device they are."""
    if settings.name == "adamw-factored":
        return FactoredAdamW(parameters, settings)
    # fused=True is fixed, not left to torch's choice of the day: it exists on CPU and CUDA in every torch that we
    # admit, does the same arithmetic on both, and is the quickest for models of many small tensors.
    return torch.optim.AdamW(
        list(parameters),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class FactoredAdamW(torch.optim.Optimizer):
    """AdamW whose second moment is kept as the means of each matrix's rows and columns (Adafactor, arXiv 1804.04235).

    Their outer product, over the mean of all, stands for the whole. Vectors keep theirs as it is. The moments take 4
    bytes a parameter instead of 8, and 2 in bf16, where gradients are no finer than that. Moments in 8 bits (arXiv
    2110.02861) would take 2 always and learn as well, but what rounds to another code on another machine moves far:
    honest replays in fp32 then differ by 6e-2 of the delta instead of 6e-6, and by 5e-3 with a first moment in bf16.
    """

    def __init__(self, parameters: Iterable[Tensor], settings: OptimizerSettings) -> None:
        super().__init__(parameters, {"lr": settings.lr})
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"])

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        settings, state = self._settings, self.state[parameter]
        if not state:
            state.update(_zero_state(parameter, settings.mean_dtype))
        state["step"] += 1
        first_bias, second_bias = (1.0 - beta ** state["step"] for beta in (settings.beta1, settings.beta2))
        parameter.mul_(1.0 - lr * settings.weight_decay)
        mean = state["mean"].float().lerp_(gradient, 1.0 - settings.beta1)
        state["mean"].copy_(mean)
        squares = gradient.square()
        if "rows" in state:
            flat = squares.flatten(1)
            rows, columns = state["rows"], state["columns"]
            rows.lerp_(flat.mean(1), 1.0 - settings.beta2)
            columns.lerp_(flat.mean(0), 1.0 - settings.beta2)
            # Roots before the product: the square of a small gradient's square would be lost below fp32.
            scale = (rows.mean().clamp_min_(_TINY) * second_bias).sqrt_()
            torch.outer(rows.sqrt(), columns.sqrt() / scale, out=flat)
        else:
            state["squares"].lerp_(squares, 1.0 - settings.beta2)
            torch.div(state["squares"], second_bias, out=squares).sqrt_()
        parameter.addcdiv_(mean, squares.add_(settings.eps), value=-lr / first_bias)


def _zero_state(parameter: Tensor, mean_dtype: torch.dtype) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 0, "mean": torch.zeros_like(parameter, dtype=mean_dtype)}
    if parameter.ndim < 2:
        state["squares"] = torch.zeros_like(parameter)
    else:
        state["rows"] = parameter.new_zeros(parameter.shape[0])
        state["columns"] = parameter.new_zeros(parameter[0].numel())
    return state
