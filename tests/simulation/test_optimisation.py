"""What compares ways of training must train as a unit does, send what it says, and give everybody the same samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.optimisation.combining import Late, Radial, Weighted
from benchmarks.optimisation.crowd import Batch, CrowdModel, Moments, adamw, train
from benchmarks.optimisation.methods import Ours, Sparse
from benchmarks.optimisation.muon import Muon, orthogonal
from benchmarks.optimisation.runs import CODEC, PATCH, RECIPES, Course, Name, play
from benchmarks.optimisation.samples import RoundSamples, Shape
from benchmarks.optimisation.states import First, Private, Public, Reset, Second
from benchmarks.procedural import MODEL, small_run
from diloco.draws import Draws
from diloco.merge import OuterConfig
from diloco.tables import Floats
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
    trained = train(model, model.first.repeat(VOLUNTEERS, 1), moments, batches, torch.tensor(rates)[:, None])
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


# --- combining -----------------------------------------------------------------------------------------------

PLAIN = OuterConfig(lr=1.0, momentum=0.0)


def vectors(count: int, seed: int = 4) -> list[Floats]:
    size = CrowdModel(SEED).first.numel()
    return list(np.random.default_rng(seed).standard_normal((count, size), dtype=np.float32))


def test_half_a_unit_counts_half_by_samples() -> None:
    long, short = vectors(2)
    fall, _ = Weighted([1.0, 0.5])([long.copy(), short.copy()], np.zeros_like(long), PLAIN)
    assert float(np.abs(fall - (2 * long + short) / 3).max()) < 1e-5


def test_a_radial_mean_points_as_the_mean_and_is_as_long_as_its_deltas_on_the_average() -> None:
    schema, deltas = CrowdModel(SEED).schema, vectors(4)
    fall, _ = Radial(schema)([delta.copy() for delta in deltas], np.zeros_like(deltas[0]), PLAIN)
    first = slice(0, schema.tensors[0].num_elements)
    lengths = [np.linalg.norm(delta[first]) for delta in deltas]
    assert np.linalg.norm(fall[first]) == pytest.approx(np.mean(lengths), rel=1e-4)
    directions = sum(delta[first] / length for delta, length in zip(deltas, lengths, strict=True))
    cosine = fall[first] @ directions / np.linalg.norm(fall[first]) / np.linalg.norm(directions)
    assert cosine == pytest.approx(1.0, abs=1e-5)
    of_one, _ = Radial(schema)([deltas[0].copy()] * 3, np.zeros_like(deltas[0]), PLAIN)
    assert float(np.abs(of_one - deltas[0]).max()) < 1e-5


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_late_deltas_are_merged_a_round_later_with_their_discount(discount: float) -> None:
    combine, (a, late, b, last) = Late(1, discount), vectors(4)
    zero = np.zeros_like(a)
    first, _ = combine([a.copy(), late.copy()], zero, PLAIN)
    second, _ = combine([b.copy(), last.copy()], zero, PLAIN)
    assert float(np.abs(first - a).max()) < 1e-5
    assert float(np.abs(second - (b + discount * late) / (1 + discount)).max()) < 1e-5


def test_delayed_late_deltas_move_the_weights_but_not_the_momentum() -> None:
    (a, late, b, last), outer = vectors(4), OuterConfig(lr=1.0, momentum=0.5)
    combine = Late(1, 1.0, delayed=True)
    _, v = combine([a.copy(), late.copy()], np.zeros_like(a), outer)
    fall, v = combine([b.copy(), last.copy()], v, outer)
    assert float(np.abs(v - (0.5 * a + b / 2)).max()) < 1e-5
    assert float(np.abs(fall - (b / 2 + 0.5 * v + late / 2)).max()) < 1e-5


# --- the inner state -----------------------------------------------------------------------------------------


def public(second: Second, first: First, outer: OuterConfig = PLAIN) -> tuple[Public, Moments]:
    """Return a state that has taken the moments of a round, and these."""
    model = CrowdModel(SEED)
    state = Public(model, 3, second=second, first=first, outer=outer, codec=CODEC, seed=1)
    m = torch.from_numpy(np.stack(vectors(3)))
    v = torch.ones_like(m) * torch.tensor([1.0, 2.0, 50.0])[:, None]
    moments = Moments(m=m, v=v, m_steps=30, v_steps=30)
    state.end(moments, torch.full_like(model.first, 0.3), 0.1, 1)
    return state, moments


def test_private_moments_are_carried_and_others_start_anew() -> None:
    private, reset = Private(2, 5), Reset(2, 5)
    assert (private.is_new, reset.is_new) == (True, True)
    for state in (private, reset):
        moments = state.begin()
        moments.m += 1.0
        moments.m_steps = 30
    assert float(private.begin().m.sum()) == 10.0
    assert float(reset.begin().m.sum()) == 0.0
    assert (private.is_new, reset.is_new) == (False, True)


def test_a_public_second_moment_is_the_median_so_that_one_volunteer_cannot_blow_it_up() -> None:
    state, _ = public("factored", "zero")
    begun = state.begin()
    assert torch.allclose(begun.v, torch.full_like(begun.v, 2.0))
    assert float(begun.m.abs().max()) == 0.0
    assert (begun.m_steps, begun.v_steps) == (0, 30)


def test_public_moments_in_8_bits_are_their_means() -> None:
    state, moments = public("full", "full")
    begun = state.begin()
    mean = moments.m.mean(0)
    assert float((begun.m[0] - mean).norm() / mean.norm()) < 0.02
    assert torch.equal(begun.m[0], begun.m[2])


def test_a_first_moment_from_the_outer_step_moves_on_as_the_volunteers_moved() -> None:
    state, _ = public("factored", "outer", OuterConfig(lr=0.5, momentum=0.5))
    begun = state.begin()
    spread = (begun.v / (1 - 0.99**begun.v_steps)).sqrt()
    # The weights fell by 0.3 where the outer step is as long as the volunteers' own, over rates that sum to 0.1.
    assert torch.allclose(begun.m / spread, torch.full_like(begun.m, 3.0), rtol=1e-4)


# --- the inner optimiser -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5)])
def test_a_matrix_is_turned_into_a_nearly_orthogonal_one_that_points_its_way(shape: tuple[int, ...]) -> None:
    matrices = torch.from_numpy(np.random.default_rng(6).standard_normal(shape))
    turned = orthogonal(matrices)
    values = torch.linalg.svdvals(turned)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert float((turned * (left @ right)).sum() / turned.norm() / (left @ right).norm()) > 0.95


def test_muon_moves_the_matrices_of_the_blocks_and_leaves_the_rest_to_adamw() -> None:
    model = CrowdModel(SEED)
    gradient = torch.from_numpy(np.stack(vectors(2)))
    ours, theirs = (model.first.repeat(2, 1) for _ in range(2))
    for flat, update in ((ours, Muon(model.schema)), (theirs, adamw)):
        update(flat, Moments(m=torch.zeros_like(flat), v=torch.zeros_like(flat), m_steps=1, v_steps=1), gradient,
               torch.tensor([[0.01], [0.0]]))  # fmt: skip
    assert torch.equal(ours[1], model.first)
    for spec, one, other, first in zip(model.schema.tensors, *map(model.split, (ours[0], theirs[0], model.first)),
                                       strict=True):  # fmt: skip
        if spec.name.startswith("transformer_blocks.") and len(spec.shape) == 2:
            rms = float((one - first * (1 - 0.01 * 0.01)).square().mean().sqrt()) / 0.01
            assert 0.1 < rms < 0.3
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_every_method_trains_and_says_what_it_sends(method: Name) -> None:
    shape = Shape(volunteers=8, steps=2, batch=1)
    outcome = play(replace(COURSE, method=method, shape=shape))
    assert [number for number, _ in outcome["losses"]] == [1, 2]
    assert outcome["up"] > 0.0
    assert outcome["down"] > 0.0
