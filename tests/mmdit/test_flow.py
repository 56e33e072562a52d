import pytest
import torch
from torch import Tensor

from mmdit.flow import flow_loss_B, interpolate, shift_timestep, velocity_target
from mmdit.sample import euler_sigmas, sample


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


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sampler_recovers_a_picture_whose_flow_is_known(steps: int, shift: float) -> None:
    picture, noise = _draw(2, 1, 4, 4), _draw(2, 1, 4, 4) * 3

    def towards_the_picture(x: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        return (x - picture) / (timestep / 1000).view(-1, 1, 1, 1)

    before = noise.clone()
    out = sample(towards_the_picture, _draw(2, 3, 5), _draw(2, 5), noise, steps=steps, guidance=1.0, shift=shift)
    assert torch.allclose(out, picture, atol=1e-5)
    assert torch.equal(noise, before)


def test_guidance_exaggerates_the_difference_to_no_text() -> None:
    noise = torch.zeros(2, 1, 2, 2)
    text, pooled = torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.tensor([[10.0], [20.0]])

    def speaks_its_text(x: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        return (5.0 + text.sum((1, 2)) + pooled.sum(1)).view(-1, 1, 1, 1).expand_as(x)

    plain = sample(speaks_its_text, text, pooled, noise, steps=4, guidance=1.0, shift=1.0)
    guided = sample(speaks_its_text, text, pooled, noise, steps=4, guidance=3.0, shift=1.0)
    # The flow is constant, so the path from t = 1 to 0 is minus the velocity.
    assert plain[:, 0, 0, 0].tolist() == pytest.approx([-16.0, -27.0])
    assert guided[:, 0, 0, 0].tolist() == pytest.approx([-(5 + 3 * 11.0), -(5 + 3 * 22.0)])


def test_times_fall_from_one_to_zero() -> None:
    times = euler_sigmas(20, 1.0)
    assert len(times) == 21
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert sorted(times, reverse=True) == list(times)


@pytest.mark.parametrize(
    ("steps", "shift", "message"), [(0, 1.0, "steps is 0"), (4, 0.0, "shift is 0"), (4, float("nan"), "nan")]
)
def test_a_schedule_that_cannot_be_is_refused(steps: int, shift: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        euler_sigmas(steps, shift)
