"""The count of a step's memory is held to what steps take, on tensors and on fake ones."""

import dataclasses
import gc
from itertools import product
from math import prod

import pytest
import torch

from benchmarks.allocations import Allocations
from benchmarks.memory_cases import measured_bytes
from diloco.execution import PLAIN, Execution
from diloco.memory import CUDA_OVERHEAD, Precision, Work, footprint, parameters
from diloco.optimizers import OptimizerName
from mmdit.config import MMDiTConfig
from mmdit.presets import PRESETS, of_depth
from mmdit.transformer import trainable_schema

SMALL = dataclasses.replace(
    of_depth(3), sample_size=16, pos_embed_max_size=8, joint_attention_dim=96, pooled_projection_dim=64
)
NO_NORM = dataclasses.replace(SMALL, qk_norm=None)
DUAL = dataclasses.replace(SMALL, dual_attention_layers=(0, 1))
AGAIN = Execution(checkpointing=True)
NARROW = Execution(checkpointing=True, keeping="narrow")
HOST = Execution(checkpointing=True, keeping="host")


def work(
    config: MMDiTConfig = SMALL,
    *,
    batch: int = 8,
    precision: Precision = "fp32",
    optimizer: OptimizerName = "adamw",
    image_tokens: int = 64,
) -> Work:
    return Work(
        config=config,
        image_tokens=image_tokens,
        text_tokens=20,
        batch=batch,
        precision=precision,
        optimizer=optimizer,
    )


def counted(step: Work, execution: Execution) -> int:
    found = footprint(step, execution, "cpu")
    return found.device + found.host


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_parameters_are_counted_as_the_model_has_them(config: MMDiTConfig) -> None:
    assert parameters(config) == sum(prod(shape) for _, shape in trainable_schema(config))


CASES = [
    *product((SMALL,), ("fp32", "bf16"), (PLAIN, AGAIN, HOST)),
    (SMALL, "bf16", NARROW),
    (SMALL, "bf16", Execution(parts=4)),
    (SMALL, "bf16", dataclasses.replace(HOST, parts=4)),
    (NO_NORM, "fp32", PLAIN),
    (DUAL, "bf16", PLAIN),
]


@pytest.mark.parametrize(("config", "precision", "execution"), CASES)
def test_the_count_is_within_a_tenth_of_what_a_step_takes(
    config: MMDiTConfig, precision: Precision, execution: Execution
) -> None:
    step = work(config, precision=precision)
    assert counted(step, execution) == pytest.approx(measured_bytes(step, execution, fake=False), rel=0.1)


@pytest.mark.parametrize("execution", [PLAIN, AGAIN, NARROW, HOST, Execution(parts=4)])
def test_so_it_is_where_bf16_numbers_are_held_in_fp32(execution: Execution) -> None:
    step = work(precision="bf16")
    found = footprint(step, execution, "cpu", widened=True)
    measured = measured_bytes(step, execution, fake=False, widened=True)
    assert found.device + found.host == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("precision", "execution"), [("fp32", PLAIN), ("bf16", NARROW)])
def test_so_it_is_with_factored_moments(precision: Precision, execution: Execution) -> None:
    step = work(precision=precision, optimizer="adamw-factored")
    assert counted(step, execution) == pytest.approx(measured_bytes(step, execution, fake=False), rel=0.1)


def test_fake_tensors_take_what_real_ones_take() -> None:
    step = work(precision="bf16")
    assert measured_bytes(step, AGAIN, fake=True) == measured_bytes(step, AGAIN, fake=False)


def test_each_means_saves_what_it_is_for() -> None:
    step = work(of_depth(12), image_tokens=1024, batch=4, precision="bf16")
    plain, again, narrow, host = (footprint(step, way, "cuda") for way in (PLAIN, AGAIN, NARROW, HOST))
    assert plain.device > again.device > narrow.device > host.device
    assert (plain.overhead, plain.host) == (CUDA_OVERHEAD, 0)
    assert host.weights < 50e6  # the position table
    assert host.host == (4 + 2 + 8) * parameters(step.config)


@pytest.mark.parametrize(("depth", "card"), [(18, 12e9), (24, 24e9)])
def test_the_middling_and_the_large_model_fit_the_cards_that_people_have(depth: int, card: float) -> None:
    step = Work(
        config=of_depth(depth), image_tokens=1024, text_tokens=154, batch=8, precision="bf16", optimizer="adamw"
    )
    for kind in ("cpu", "cuda"):  # a CPU's kernels keep more
        assert footprint(step, dataclasses.replace(HOST, parts=2), kind).device + CUDA_OVERHEAD < 0.95 * card
        factored = dataclasses.replace(step, batch=2, optimizer="adamw-factored")
        assert footprint(factored, NARROW, kind).device + CUDA_OVERHEAD < 0.95 * card


def test_live_tensors_are_counted_once_and_until_they_are_freed() -> None:
    with Allocations() as allocations:
        one = torch.zeros(1000)
        view = one[:10]
        two = one + 1
        assert (allocations.live, allocations.peak) == (8000, 8000)
        del one
        gc.collect()
        assert allocations.live == 8000  # the view holds it
        del view, two
        gc.collect()
        assert (allocations.live, allocations.peak) == (0, 8000)
        allocations.reset()
        assert allocations.peak == 0
