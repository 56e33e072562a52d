"""What compares ways of training must train as a unit does, send what it says, and give everybody the same samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.optimisation.crowd import Batch, CrowdModel, Moments, train
from benchmarks.optimisation.methods import Ours, Sparse
from benchmarks.optimisation.runs import PATCH, Course, play
from benchmarks.optimisation.samples import RoundSamples, Shape
from benchmarks.procedural import MODEL, small_run
from diloco.draws import Draws
from diloco.merge import OuterConfig
from diloco.unit import run_unit

SEED = bytes(range(32))
STEPS, BATCH, VOLUNTEERS = 6, 4, 3
COURSE = Course(method="ours", seed=1, shape=Shape(volunteers=2, steps=3, batch=2), rounds=2, lr=0.004, momentum=0.6)


def test_a_crowd_trains_as_each_of_its_volunteers_would_alone() -> None:
    run = small_run(seed=SEED, units=VOLUNTEERS, rounds=1, shards=VOLUNTEERS, steps=STEPS, batch=BATCH)
    units = [run.unit(1, index) for index in range(VOLUNTEERS)]
    training = units[0].spec.training
    draws = [Draws(unit.spec.seed) for unit in units]

    def batches(step: int) -> Batch:
        drawn = [
            draw.batch(step, BATCH, unit.shards, max_tokens=training.max_tokens, text_dropout=training.text_dropout)
            for draw, unit in zip(draws, units, strict=True)
        ]
        latent, text, pooled, noise, t = (
            torch.stack([getattr(batch, part) for batch in drawn])
            for part in ("latent", "text", "pooled", "noise", "t")
        )
        return latent, text, pooled, noise, t

    model = CrowdModel(SEED)
    moments = Moments.zeros(VOLUNTEERS, model.first.numel())
    rates = [training.lr_at(step, units[0].spec.lr_scale) for step in range(STEPS)]
    trained = train(model, model.first.repeat(VOLUNTEERS, 1), moments, batches, rates)
    for unit, weights in zip(units, trained, strict=True):
        alone = run_unit(unit.spec, MODEL, run.genesis, unit.shards, device="cpu", on_step=None).delta
        together = model.first - weights
        expected = model.flat(alone)
        assert float((together - expected).norm() / expected.norm()) < 1e-4


def test_the_samples_of_a_round_are_the_same_for_every_way_of_training() -> None:
    shape = Shape(volunteers=2, steps=3, batch=4)
    samples, again = RoundSamples(5, 1, shape), RoundSamples(5, 1, shape)
    for step in range(shape.steps):
        for crowd, together in zip(samples.of_crowd(step), again.together(step), strict=True):
            assert torch.equal(crowd.flatten(0, 1), together[0])
    assert not torch.equal(RoundSamples(5, 2, shape).of_crowd(0)[0], samples.of_crowd(0)[0])


def test_a_run_is_the_same_every_time_and_another_seed_gives_another() -> None:
    first, again, other = play(COURSE), play(COURSE), play(replace(COURSE, seed=2))
    assert first == again
    assert first["losses"] != other["losses"]
    assert 0.5 < first["up"] < 1.6
    assert 0.5 < first["down"] < 1.6


def test_without_codecs_our_step_is_that_of_plain_averaging() -> None:
    model = CrowdModel(SEED)
    deltas = torch.from_numpy(np.random.default_rng(1).standard_normal((4, model.first.numel()), dtype=np.float32))
    fall, traffic = Ours(model, OuterConfig(lr=0.5, momentum=0.0), None, None, 1).step(deltas, 1)
    assert float((fall - 0.5 * deltas.mean(0)).abs().max()) < 1e-6
    assert (traffic.up, traffic.down) == (32.0, 32.0)


def test_what_a_patch_leaves_of_a_step_comes_with_later_ones() -> None:
    model = CrowdModel(SEED)
    exchange = Ours(model, OuterConfig(lr=1.0, momentum=0.0), None, PATCH, 1)
    direction = np.random.default_rng(2).standard_normal(model.first.numel(), dtype=np.float32)
    deltas = torch.from_numpy(np.repeat(direction[None], 4, axis=0))
    moved = torch.stack([exchange.step(deltas, number)[0] for number in range(40)]).mean(0)
    towards = torch.from_numpy(direction)
    assert float((moved - towards).norm() / towards.norm()) < 0.1


@pytest.mark.parametrize("keep", [8, 64])
def test_a_sparse_delta_moves_only_the_largest_values_and_keeps_the_rest(keep: int) -> None:
    deltas = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 5000), dtype=np.float32))
    exchange = Sparse(keep=keep, decay=1.0)
    fall, traffic = exchange.step(deltas, 1)
    assert int((fall != 0).sum()) <= 2 * keep  # of two chunks
    assert traffic.up == keep / 4096 * 14
    largest = deltas[0].abs().argmax()
    assert fall[largest] != 0
