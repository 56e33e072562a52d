"""What a machine does about its memory changes rounding, and nothing else."""

import dataclasses
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from diloco.execution import PLAIN, Execution, Keeping
from diloco.genesis import initial_state
from diloco.optimizers import OptimizerName, OptimizerSettings, make_optimizer
from diloco.unit import UnitResult, UnitSpec, run_unit
from mmdit.transformer import Block
from tests.diloco.examples import SEED, TINY, TRAINING, UNIT, shard_set

DUAL = dataclasses.replace(TINY, num_layers=3, dual_attention_layers=(0,))
BASE = initial_state(DUAL, SEED)


def with_training(**changes: object) -> UnitSpec:
    return dataclasses.replace(UNIT, training=dataclasses.replace(TRAINING, **changes))  # type: ignore[arg-type]


# With eps as runs in bf16 need it: AdamW from zero moments makes whole steps of tiny gradients, which are rounding.
FP32, BF16 = with_training(), with_training(precision="bf16", eps=1e-3)
FACTORED = with_training(optimizer="adamw-factored")
FACTORED_BF16 = with_training(optimizer="adamw-factored", precision="bf16", eps=1e-3)


def run(unit: UnitSpec, execution: Execution) -> UnitResult:
    return run_unit(unit, DUAL, BASE, shard_set(), device="cpu", on_step=None, execution=execution)


def distance(a: UnitResult, b: UnitResult) -> float:
    """|a - b| / |b| of the deltas."""
    over = sum(float(np.sum((a.delta[name].astype(np.float64) - b.delta[name]) ** 2)) for name in b.delta)
    return float(np.sqrt(over / sum(float(np.sum(values.astype(np.float64) ** 2)) for values in b.delta.values())))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_same_gradients_but_for_rounding(parts: int) -> None:
    whole, cut = run(FP32, PLAIN), run(FP32, Execution(parts=parts))
    assert 0.0 < distance(cut, whole) < 1e-3
    assert cut.loss_last == pytest.approx(whole.loss_last, rel=1e-4)


def test_a_batch_that_has_no_such_number_of_equal_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 8 cannot be cut into 3"):
        run(FP32, Execution(parts=3))
    with pytest.raises(ValueError, match="parts is 0"):
        Execution(parts=0)


@pytest.mark.parametrize(
    ("unit", "checkpointing", "keeping"),
    [
        (unit, checkpointing, keeping)
        for unit, (checkpointing, keeping) in product(
            (FP32, BF16, FACTORED, FACTORED_BF16), product((False, True), ("whole", "narrow", "host"))
        )
        if checkpointing or keeping != "whole"
    ],
)
def test_a_unit_is_the_same_to_the_last_bit_with_little_memory(
    unit: UnitSpec, checkpointing: bool, keeping: Keeping
) -> None:
    plain = run(unit, PLAIN)
    frugal = run(unit, Execution(checkpointing=checkpointing, keeping=keeping))
    assert frugal.trail.root == plain.trail.root
    assert all(np.array_equal(frugal.delta[name], plain.delta[name]) for name in plain.delta)


@pytest.mark.parametrize("keeping", ["narrow", "host"])
@pytest.mark.parametrize("unit", [FP32, BF16])
def test_parts_add_up_in_fp32_wherever_the_gradients_are(unit: UnitSpec, keeping: Keeping) -> None:
    plain, frugal = run(unit, Execution(parts=2)), run(unit, Execution(parts=2, checkpointing=True, keeping=keeping))
    assert frugal.trail.root == plain.trail.root


def test_checkpointing_computes_each_block_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[bool] = Counter()
    forward = Block.forward

    def counted(self: Block, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls[checkpointing] += 1
        return forward(self, *args)

    monkeypatch.setattr(Block, "forward", counted)
    for checkpointing in (False, True):
        run(with_training(steps=1, warmup_steps=0), Execution(checkpointing=checkpointing))
    assert calls == {False: DUAL.num_layers, True: 2 * DUAL.num_layers}


def optimised(
    name: OptimizerName, steps: int = 30, mean_dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    settings = OptimizerSettings(
        name=name, mean_dtype=mean_dtype, lr=0.03, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0
    )
    parameter = torch.nn.Parameter(torch.ones(64, 32))
    # A gradient whose scale is a row's times a column's: what factors hold exactly.
    scale = torch.outer(torch.logspace(-3, 0, 64), torch.logspace(-2, 0, 32))
    optimizer = make_optimizer(settings, [parameter])
    for _ in range(steps):
        parameter.grad = scale * parameter.detach().sign()
        optimizer.step()
    return parameter, optimizer


def test_factored_moments_make_adamws_steps_where_the_gradients_factor() -> None:
    (plain, _), (factored, _) = optimised("adamw"), optimised("adamw-factored")
    assert torch.allclose(plain, factored, atol=1e-5)
    assert not torch.allclose(plain, torch.ones_like(plain), atol=0.1)


def test_factored_moments_take_half_the_bytes_and_a_quarter_in_bf16() -> None:
    def size(name: OptimizerName, mean_dtype: torch.dtype = torch.float32) -> int:
        parameter, optimizer = optimised(name, steps=1, mean_dtype=mean_dtype)
        state = optimizer.state[parameter].values()
        return sum(value.numel() * value.element_size() for value in state if isinstance(value, torch.Tensor))

    assert size("adamw") == 2 * 4 * 64 * 32 + 4  # and the step
    assert size("adamw-factored") == 4 * 64 * 32 + 4 * (64 + 32)
    assert size("adamw-factored", torch.bfloat16) == 2 * 64 * 32 + 4 * (64 + 32)


def test_factored_moments_learn_as_well_and_replays_agree_as_well() -> None:
    long = {"steps": 60, "segment_steps": 20}
    plain, factored = run(with_training(**long), PLAIN), run(with_training(optimizer="adamw-factored", **long), PLAIN)
    assert distance(factored, plain) > 0.1  # another optimiser it is
    assert factored.trail.segments[-1].mean_loss < 1.05 * plain.trail.segments[-1].mean_loss
    assert distance(run(FACTORED, Execution(parts=2)), run(FACTORED, PLAIN)) < 1e-3


def test_a_matrix_without_any_gradient_stays_where_it_is() -> None:
    settings = OptimizerSettings(
        name="adamw-factored", mean_dtype=torch.float32, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0
    )
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = make_optimizer(settings, [parameter])
    parameter.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3, 4))
