"""Drawing pictures: Euler steps along the flow, with classifier-free guidance."""

import itertools

import numpy as np
import torch
from torch import Tensor

from mmdit.flow import VelocityModel, shift_timestep

_SMALLEST_SIGMA = 0.001  # the last of the 1000 training timesteps of diffusers' scheduler


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
    text_BLD: Tensor,
    pooled_BP: Tensor,
    noise_BCHW: Tensor,
    *,
    steps: int,
    guidance: float,
    shift: float,
) -> Tensor:
    """Turn noise into latents [B, C, H, W] that follow the text.

    Args:
        model: gives the velocity; called once per step, on a doubled batch when `guidance` is not 1.
        text_BLD: text tokens.
        pooled_BP: pooled text.
        noise_BCHW: standard normal numbers; it is not changed.
        steps: Euler steps, at least one.
        guidance: 1 follows the text as learnt; larger numbers exaggerate the difference to no text, which is zeros as
            in training (classifier-free guidance, arXiv 2207.12598).
        shift: the timestep shift that the model was trained with.

    Raises:
        ValueError: `steps` or `shift` is out of range.
    """
    guided = guidance != 1.0
    if guided:
        text_BLD = torch.cat((text_BLD, torch.zeros_like(text_BLD)))
        pooled_BP = torch.cat((pooled_BP, torch.zeros_like(pooled_BP)))
    x_BCHW = noise_BCHW
    sigmas = euler_sigmas(steps, shift)
    for now, after in itertools.pairwise(sigmas):
        x_in = torch.cat((x_BCHW, x_BCHW)) if guided else x_BCHW
        timestep_B = torch.full((x_in.shape[0],), 1000.0 * now, dtype=torch.float32, device=x_in.device)
        velocity = model(x_in, text_BLD, pooled_BP, timestep_B)
        if guided:
            with_text, without_text = velocity.chunk(2)
            velocity = without_text + guidance * (with_text - without_text)
        x_BCHW = x_BCHW + (after - now) * velocity
    return x_BCHW
