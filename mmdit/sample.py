"""Drawing pictures: Euler steps along the flow, with guidance, from noise or from a picture."""

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mmdit.flow import VelocityModel, interpolate, shift_timestep

_SMALLEST_SIGMA: Final = 0.001  # the last of the 1000 training timesteps of diffusers' scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What the model hears: tokens [B, L, D] and pooled vectors [B, P]."""

    tokens: Tensor
    pooled: Tensor

    def silent(self) -> "Text":
        """Return no text at all, as training has it: zeros."""
        return Text(tokens=torch.zeros_like(self.tokens), pooled=torch.zeros_like(self.pooled))


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How much of the text is exaggerated, and during which part of the way.

    Args:
        scale: 1 follows the text as learnt; larger numbers exaggerate the difference to what is to be avoided
            (classifier-free guidance, arXiv 2207.12598), which in excess gives glaring, overdrawn pictures.
        low, high: guidance is applied at times t from `low` to `high` only, 1 being noise (arXiv 2404.07724): without
            it in the first and the last steps a larger scale does less harm, and those steps take half the time.

    Raises:
        ValueError: not 0 <= low <= high <= 1.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(f"guidance from {self.low} to {self.high}; both must lie in 0..1, the lower one first")

    def applies(self, t: float) -> bool:
        """Whether the velocity at time t is guided."""
        return self.scale != 1.0 and self.low <= t <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A picture to start from, as latents [B, C, H, W], and how much of the way to noise it is taken back, 0 to 1."""

    latent: Tensor
    strength: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength is {self.strength}; it must lie in 0..1")


def euler_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Times from 1 down to 0, `steps` + 1 of them, as `FlowMatchEulerDiscreteScheduler.set_timesteps` gives them.

    Raises:
        ValueError: `steps` is not positive, or `shift` is not.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least one is needed")
    if not 0.0 < shift < float("inf"):
        raise ValueError(f"shift is {shift}; it must be a positive number")
    # diffusers shifts the end of its table when it is made, and everything once more here.
    times = np.linspace(1.0, shift_timestep(_SMALLEST_SIGMA, shift), steps)
    return (*(shift_timestep(float(t), shift) for t in times), 0.0)


@torch.no_grad()
def sample(
    model: VelocityModel,
    text: Text,
    noise_BCHW: Tensor,
    *,
    steps: int,
    shift: float,
    guidance: Guidance,
    avoid: Text | None = None,
    guide: VelocityModel | None = None,
    start: Start | None = None,
) -> Tensor:
    """Turn noise into latents [B, C, H, W] that follow the text.

    Args:
        model: gives the velocity; called once per step, on a doubled batch where guidance applies.
        text: what to draw.
        noise_BCHW: standard normal numbers; it is not changed.
        steps: Euler steps from noise, at least one; a start takes its strength's share of them.
        shift: the timestep shift that the model was trained with.
        guidance: how much, and when.
        avoid: what to lead away from, shaped as `text`; no text if left out.
        guide: a worse model of the same kind, to lead away from instead (autoguidance, arXiv 2406.02507): an older
            checkpoint of the run, for instance.
        start: a picture to begin with instead of pure noise.

    Raises:
        ValueError: `steps` or `shift` is out of range, or both `avoid` and `guide` are given.
    """
    if avoid is not None and guide is not None:
        raise ValueError("there is a text to avoid and a model to lead away from; only one can be")
    field = _Field(model, text, text.silent() if avoid is None else avoid, guide, guidance)
    sigmas = euler_sigmas(steps, shift)
    x_BCHW = noise_BCHW
    if start is not None:
        sigmas = sigmas[steps - int(steps * start.strength) :]
        x_BCHW = interpolate(start.latent, noise_BCHW, noise_BCHW.new_full((len(noise_BCHW),), sigmas[0]))
    for now, after in itertools.pairwise(sigmas):
        x_BCHW = x_BCHW + (after - now) * field.velocity(x_BCHW, now)
    return x_BCHW


@dataclass(frozen=True, slots=True)
class _Field:
    """The velocity that pictures follow: the model's, led away from something."""

    model: VelocityModel
    text: Text
    avoid: Text
    guide: VelocityModel | None
    guidance: Guidance

    def velocity(self, x_BCHW: Tensor, t: float) -> Tensor:
        timestep_B = torch.full((x_BCHW.shape[0],), 1000.0 * t, dtype=torch.float32, device=x_BCHW.device)
        if not self.guidance.applies(t):
            return self.model(x_BCHW, self.text.tokens, self.text.pooled, timestep_B)
        if self.guide is not None:
            wanted = self.model(x_BCHW, self.text.tokens, self.text.pooled, timestep_B)
            other = self.guide(x_BCHW, self.text.tokens, self.text.pooled, timestep_B)
        else:
            tokens = torch.cat((self.text.tokens, self.avoid.tokens))
            pooled = torch.cat((self.text.pooled, self.avoid.pooled))
            both = self.model(torch.cat((x_BCHW, x_BCHW)), tokens, pooled, torch.cat((timestep_B, timestep_B)))
            wanted, other = both.chunk(2)
        return other + self.guidance.scale * (wanted - other)
