import pytest
import torch
from torch import Tensor

from mmdit.flow import flow_loss_B, interpolate, shift_timestep, velocity_target


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32)


def test_the_path_runs_straight_from_the_picture_to_the_noise() -> None:
    x0, noise = _draw(3, 2, 4, 4), 2 + _draw(3, 2, 4, 4)
    t = torch.tensor([0.0, 0.25, 1.0])
    at = interpolate(x0, noise, t)
    assert torch.equal(at[0], x0[0])
    assert torch.allclose(at[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(at[2], noise[2])
    assert torch.allclose(interpolate(x0, noise, t + 0.5) - at, 0.5 * velocity_target(x0, noise), atol=1e-6)


def test_the_loss_is_the_mean_squared_error_of_the_velocity_of_each_sample() -> None:
    x0, noise, t = _draw(3, 2, 4, 4), _draw(3, 2, 4, 4) * 2, torch.tensor([0.1, 0.5, 0.9])
    seen: list[Tensor] = []

    def off_by_the_sample_number(latent: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        seen.extend((latent, timestep))
        return (noise - x0) + torch.arange(3.0).view(3, 1, 1, 1)

    loss = flow_loss_B(off_by_the_sample_number, x0, _draw(3, 1, 1), _draw(3, 1), noise, t)
    assert loss.tolist() == pytest.approx([0.0, 1.0, 4.0], abs=1e-6)
    assert torch.equal(seen[0], interpolate(x0, noise, t))
    assert seen[1].tolist() == pytest.approx([100.0, 500.0, 900.0])


def test_shift_moves_the_middle_towards_noise_and_keeps_the_ends() -> None:
    assert [shift_timestep(t, 3.0) for t in (0.0, 0.5, 1.0)] == [0.0, 0.75, 1.0]
    assert shift_timestep(0.3, 1.0) == 0.3
    assert torch.allclose(shift_timestep(torch.tensor([0.5]), 3.0), torch.tensor([0.75]))
