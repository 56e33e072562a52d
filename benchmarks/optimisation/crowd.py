"""Many volunteers' inner loops at once, on one core: what `run_unit` does, for all units of a round in one batch.

A model of 0.08 million parameters keeps a processor busy with calls, not with numbers; eight of them side by side cost
three times one, not eight times. It is the run's own model and loss (`mmdit`), vectorised over the volunteers' weights;
a test holds it to `diloco.unit.run_unit` on the same draws, within rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.procedural import MODEL
from diloco.genesis import initial_state
from diloco.schema import Schema, schema_of
from diloco.tables import Floats
from mmdit.flow import flow_loss_B
from mmdit.transformer import build

BETA1: Final = 0.9
BETA2: Final = 0.99
EPS: Final = 1e-8
WEIGHT_DECAY: Final = 0.01
GRAD_CLIP: Final = 1.0
"""AdamW and the clipping of every method here; only the learning rates are each method's own."""

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Latent, text, pooled text, noise and timestep; of a crowd with the volunteers in front."""


@dataclass(slots=True, kw_only=True)
class Moments:
    """AdamW's state of each volunteer, [V, P]; the steps that each was built from, which the bias correction counts."""

    m: Tensor
    v: Tensor
    m_steps: int = 0
    v_steps: int = 0

    @classmethod
    def zeros(cls, volunteers: int, parameters: int) -> "Moments":
        """Return the state before any step."""
        return cls(m=torch.zeros(volunteers, parameters), v=torch.zeros(volunteers, parameters))


class CrowdModel:
    """The small run's model, its weights one flat vector, tensors in the schema's order."""

    def __init__(self, seed: bytes) -> None:
        self._genesis = initial_state(MODEL, seed)
        self._module = build(MODEL, self._genesis, device="cpu").train()
        self.schema: Schema = schema_of(MODEL)
        self._sizes = [spec.num_elements for spec in self.schema.tensors]
        gradient = torch.func.grad_and_value(self._loss)
        self._gradients: Callable[..., tuple[Tensor, Tensor]] = torch.func.vmap(gradient)

    @property
    def first(self) -> Tensor:
        """The weights before training, [P]."""
        return self.flat({name: self._genesis[name] for name in self.schema.names})

    def flat(self, tensors: dict[str, Floats]) -> Tensor:
        """Join tensors of the schema into one vector."""
        return torch.cat([torch.from_numpy(tensors[name].reshape(-1).copy()) for name in self.schema.names])

    def tensors(self, flat: Tensor) -> dict[str, Floats]:
        """Cut one vector into the schema's tensors; they share its memory."""
        parts = self.split(flat)
        return {
            spec.name: part.numpy().reshape(spec.shape) for spec, part in zip(self.schema.tensors, parts, strict=True)
        }

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Cut vectors, [..., P], into the tensors' parts."""
        return torch.split(flat, self._sizes, dim=-1)

    def gradients(self, flat_VP: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each volunteer's gradient [V, P] and loss [V]."""
        # `vmap` does not know the fused kernel of processors.
        with sdpa_kernel(SDPBackend.MATH):
            return self._gradients(flat_VP, *batch)

    def loss(self, flat: Tensor, batch: Batch) -> float:
        """Return the mean loss of one set of weights."""
        with torch.no_grad():
            return float(self._loss(flat, *batch))

    def _loss(self, flat: Tensor, latent: Tensor, text: Tensor, pooled: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        parts = self.split(flat)
        weights = {spec.name: part.view(spec.shape) for spec, part in zip(self.schema.tensors, parts, strict=True)}

        def predict(*inputs: Tensor) -> Tensor:
            velocity: Tensor = torch.func.functional_call(self._module, weights, inputs)
            return velocity

        return flow_loss_B(predict, latent, text, pooled, noise, t).mean()


Update = Callable[[Tensor, Moments, Tensor, Tensor], None]
"""Moves weights [V, P] in place by clipped gradients [V, P] at rates [V, 1]; the moments' counts stand at this step."""


def adamw(flat_VP: Tensor, moments: Moments, gradient_VP: Tensor, rate_V1: Tensor) -> None:
    """One step of AdamW (arXiv 1711.05101); see `Update`."""
    moments.m.lerp_(gradient_VP, 1 - BETA1)
    moments.v.mul_(BETA2).addcmul_(gradient_VP, gradient_VP, value=1 - BETA2)
    flat_VP.mul_(1 - rate_V1 * WEIGHT_DECAY)
    spread_VP = (moments.v / (1 - BETA2**moments.v_steps)).sqrt_().add_(EPS)
    flat_VP.addcdiv_(moments.m * rate_V1, spread_VP, value=-1 / (1 - BETA1**moments.m_steps))


def train(
    model: CrowdModel,
    flat_VP: Tensor,
    moments: Moments,
    batches: Callable[[int], Batch],
    rates_SV: Tensor,
    update: Update = adamw,
) -> Tensor:
    """Return each volunteer's weights after steps at these learning rates; `moments` move along.

    Rates are [S, V] or, for all volunteers the same, [S, 1]. At a rate of 0 a volunteer's weights stay.
    """
    flat_VP = flat_VP.clone()
    for step, rate_V1 in enumerate(rates_SV.unsqueeze(2)):
        gradient_VP, _ = model.gradients(flat_VP, batches(step))
        norm_V1 = gradient_VP.norm(dim=1, keepdim=True)
        gradient_VP = gradient_VP * (GRAD_CLIP / (norm_V1 + 1e-6)).clamp(max=1.0)
        moments.m_steps, moments.v_steps = moments.m_steps + 1, moments.v_steps + 1
        update(flat_VP, moments, gradient_VP, rate_V1)
    return flat_VP
