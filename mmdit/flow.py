"""Rectified flow (arXiv 2403.03206, sections 2 and 3): t = 0 is the picture, t = 1 noise, the path straight."""

import math
from typing import Protocol, TypeVar

from torch import Tensor

_Time = TypeVar("_Time", float, Tensor)


class VelocityModel(Protocol):
    """What training and sampling need of a model; `MMDiT` is one."""

    def __call__(self, latent_BCHW: Tensor, text_BLD: Tensor, pooled_BP: Tensor, timestep_B: Tensor, /) -> Tensor:
        """Velocity [B, C, H, W] at the timesteps 1000 t."""
        ...


def interpolate(x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """The point at time t on the line from picture to noise: (1 - t) x0 + t noise. `x0` and `noise` are [B, ...]."""
    t = t_B.view(-1, *(1 for _ in x0.shape[1:]))
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """The line's constant velocity: noise - x0."""
    return noise - x0


def flow_loss_B(
    model: VelocityModel, x0_BCHW: Tensor, text_BLD: Tensor, pooled_BP: Tensor, noise_BCHW: Tensor, t_B: Tensor
) -> Tensor:
    """Mean squared error of the velocity, one fp32 number per sample.

    The weighting of timesteps is in how `t_B` was drawn (logit-normal in the paper), not here.
    """
    noisy_BCHW = interpolate(x0_BCHW, noise_BCHW, t_B)
    velocity_BCHW = model(noisy_BCHW, text_BLD, pooled_BP, 1000.0 * t_B)
    error = velocity_BCHW.float() - velocity_target(x0_BCHW, noise_BCHW).float()
    return error.square().flatten(1).mean(1)


def shift_timestep(t: _Time, shift: float) -> _Time:
    """Move t towards noise for larger pictures: shift t / (1 + (shift - 1) t); 1 leaves t as it is (section 5.3.2)."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def shift_for(shift: float, side: int, height: int, width: int) -> float:
    """Return the shift for latents of another size than side x side, for which it is `shift`.

    A picture of four times as many pixels keeps its content under twice the noise (section 5.3.2), so the shift grows
    with the square root of the pixels.
    """
    return shift * math.sqrt(height * width / (side * side))
