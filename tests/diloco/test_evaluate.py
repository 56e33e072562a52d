import math

import numpy as np
import pytest

from diloco.evaluate import heldout_loss, heldout_losses, validation_loss
from diloco.genesis import initial_state
from diloco.shards import ShardSet
from diloco.tables import Floats
from diloco.unit import run_unit
from tests.diloco.examples import OTHER_SEED, SEED, TINY, UNIT, shard_set

BASE = initial_state(TINY, SEED)


def loss(weights: dict[str, Floats], *, seed: bytes = SEED, batch: int = 16) -> float:
    return heldout_loss(TINY, weights, shard_set(), seed, count=50, batch=batch, max_tokens=4, device="cpu")


def test_the_loss_is_of_the_same_triples_each_time_however_they_are_batched() -> None:
    assert loss(BASE) == loss(BASE)
    assert loss(BASE, batch=7) == pytest.approx(loss(BASE), rel=1e-5)
    assert loss(BASE, seed=OTHER_SEED) != loss(BASE)


def test_training_lowers_the_held_out_loss() -> None:
    delta = run_unit(UNIT, TINY, BASE, shard_set(), device="cpu", on_step=None).delta
    trained = {name: values - delta.get(name, np.float32(0)) for name, values in BASE.items()}
    assert loss(trained) < loss(BASE)


def test_a_model_that_predicts_zero_has_the_loss_of_noise_minus_picture() -> None:
    # adaLN-zero starts with an output of zero: E (noise - x0)^2 = 1 + E x0^2.
    latents = np.concatenate([shard.latent for shard in shard_set().shards]).astype(np.float64)
    power = float(np.mean(latents**2))
    assert loss(BASE) == pytest.approx(1.0 + power, rel=0.1)


def test_the_losses_of_single_triples_make_up_the_mean_and_rise_in_time() -> None:
    triples = heldout_losses(TINY, BASE, shard_set(), SEED, count=50, batch=16, max_tokens=4, device="cpu")
    assert math.fsum(triple.loss for triple in triples) / 50 == loss(BASE)
    moments = [triple.t for triple in triples]
    assert moments == sorted(moments)
    assert 0.0 < moments[0] < 0.2 < 0.8 < moments[-1] < 1.0


def validation(weights: dict[str, Floats], *, count: int = 49, batch: int = 16) -> float:
    return validation_loss(TINY, weights, shard_set(), SEED, count=count, batch=batch, max_tokens=4, device="cpu")


def test_the_validation_loss_is_the_same_each_time_and_falls_with_training() -> None:
    delta = run_unit(UNIT, TINY, BASE, shard_set(), device="cpu", on_step=None).delta
    trained = {name: values - delta.get(name, np.float32(0)) for name, values in BASE.items()}
    assert validation(BASE) == validation(BASE) == pytest.approx(validation(BASE, batch=5), rel=1e-5)
    assert validation(trained) < validation(BASE)


def test_every_timestep_counts_alike_in_the_validation_loss() -> None:
    with pytest.raises(ValueError, match="multiple of 7"):
        validation(BASE, count=50)


def test_a_picture_that_is_taken_down_changes_its_own_triples_and_no_others() -> None:
    shards = shard_set().shards

    def losses(*without: int) -> list[float]:
        left = ShardSet(shards, None, [without, ()])
        triples = heldout_losses(TINY, BASE, left, SEED, count=60, batch=16, max_tokens=4, device="cpu")
        return [triple.loss for triple in triples]

    before = losses()
    for taken in (0, 7, 19):
        changed = [place for place, (old, new) in enumerate(zip(before, losses(taken), strict=True)) if old != new]
        first = changed[0]
        assert changed in ([first], [first, first + 33])  # 60 triples show 33 pictures once or twice
