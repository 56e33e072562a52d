"""The sampler, on flows whose end is known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit.flow import interpolate
from mmdit.sample import Guidance, Start, Text, euler_sigmas, sample

_TEXT = Text(tokens=torch.tensor([1.0, 2.0]).view(2, 1, 1), pooled=torch.tensor([[10.0], [20.0]]))


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32)


def _text() -> Text:
    return Text(tokens=_draw(2, 3, 5), pooled=_draw(2, 5))


def _speaks_its_text(x: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
    return (5.0 + text.sum((1, 2)) + pooled.sum(1)).view(-1, 1, 1, 1).expand_as(x)


def _spoken(guidance: Guidance, **more: Any) -> list[float]:
    """Draw from zeros with the model above; return one pixel of each picture."""
    noise = torch.zeros(2, 1, 2, 2)
    out = sample(_speaks_its_text, _TEXT, noise, steps=4, shift=1.0, guidance=guidance, **more)
    return [float(value) for value in out[:, 0, 0, 0]]


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sampler_recovers_a_picture_whose_flow_is_known(steps: int, shift: float) -> None:
    picture, noise = _draw(2, 1, 4, 4), _draw(2, 1, 4, 4) * 3

    def towards_the_picture(x: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        return (x - picture) / (timestep / 1000).view(-1, 1, 1, 1)

    before = noise.clone()
    out = sample(towards_the_picture, _text(), noise, steps=steps, guidance=Guidance(), shift=shift)
    assert torch.allclose(out, picture, atol=1e-5)
    assert torch.equal(noise, before)


def test_guidance_exaggerates_the_difference_to_no_text() -> None:
    plain = _spoken(Guidance())
    guided = _spoken(Guidance(scale=3.0))
    # The flow is constant, so the path from t = 1 to 0 is minus the velocity.
    assert plain == pytest.approx([-16.0, -27.0])
    assert guided == pytest.approx([-(5 + 3 * 11.0), -(5 + 3 * 22.0)])


def test_a_text_to_avoid_stands_in_the_place_of_no_text() -> None:
    avoid = Text(tokens=torch.full((2, 1, 1), 2.0), pooled=torch.zeros(2, 1))
    assert _spoken(Guidance(scale=3.0), avoid=avoid) == pytest.approx([-(7 + 3 * 9.0), -(7 + 3 * 20.0)])


def test_a_worse_model_can_be_led_away_from_with_the_same_text() -> None:
    def worse(x: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        return 0.5 * _speaks_its_text(x, text, pooled, timestep)

    assert _spoken(Guidance(scale=2.0), guide=worse) == pytest.approx([-(8 + 2 * 8.0), -(13.5 + 2 * 13.5)])
    with pytest.raises(ValueError, match="only one can be"):
        _spoken(Guidance(), guide=worse, avoid=_TEXT.silent())


def test_guidance_within_an_interval_leaves_the_other_steps_alone_and_undoubled() -> None:
    batches: list[int] = []

    def counted(x: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        batches.append(len(x))
        return _speaks_its_text(x, text, pooled, timestep)

    sigmas = euler_sigmas(4, 1.0)
    out = sample(
        counted, _TEXT, torch.zeros(2, 1, 2, 2), steps=4, shift=1.0, guidance=Guidance(scale=3.0, low=0.3, high=0.9)
    )
    assert batches == [2, 4, 4, 2]
    guided = sigmas[1] - sigmas[3]
    assert out[:, 0, 0, 0].tolist() == pytest.approx([-(16 + guided * 22), -(27 + guided * 44)])
    with pytest.raises(ValueError, match="the lower one first"):
        Guidance(low=0.9, high=0.3)


@pytest.mark.parametrize(("strength", "steps_taken"), [(0.0, 0), (0.5, 5), (1.0, 10)])
def test_a_start_is_taken_back_towards_noise_as_far_as_its_strength(strength: float, steps_taken: int) -> None:
    picture, noise = _draw(2, 1, 4, 4), _draw(2, 1, 4, 4) * 3
    seen: list[Tensor] = []

    def stands_still(x: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep[0] / 1000)
        return torch.zeros_like(x)

    start = Start(latent=picture, strength=strength)
    out = sample(stands_still, _text(), noise, steps=10, shift=1.0, guidance=Guidance(), start=start)
    assert len(seen) == steps_taken
    t = seen[0].expand(2) if seen else torch.zeros(2)
    assert torch.allclose(out, interpolate(picture, noise, t), atol=1e-6)
    with pytest.raises(ValueError, match=r"strength is 1\.5"):
        Start(latent=picture, strength=1.5)


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
