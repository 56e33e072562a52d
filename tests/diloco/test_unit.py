import dataclasses
import hashlib
import subprocess
import sys
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diloco.codec import encode
from diloco.container import Container
from diloco.draws import Draws, in_turn
from diloco.execution import Execution
from diloco.genesis import initial_state
from diloco.schema import schema_of
from diloco.shards import Shard, ShardSet, pack_shard, write_shard
from diloco.streams import Stream
from diloco.tables import Floats, logit_normal_table
from diloco.texts import StoredTexts
from diloco.unit import DROPOUT_ONE, StepReport, TrainingSpec, UnitResult, UnitSpec, run_unit
from mmdit.conditioning import Encoded, TextLayout, TextPart
from mmdit.flow import shift_for, shift_timestep
from mmdit.products import bf16_products
from protocol.errors import ShardCorrupt, TrainingDiverged
from tests.diloco import golden
from tests.diloco.examples import FINE, INFO, OTHER_SEED, SEED, TINY, TRAINING, UNIT, UNIT_ID, shard_bytes, shard_set

BASE = initial_state(TINY, SEED)


def run(unit: UnitSpec = UNIT, shards: ShardSet | None = None) -> UnitResult:
    return run_unit(unit, TINY, BASE, shards or shard_set(), device="cpu", on_step=None)


def with_training(**changes: object) -> UnitSpec:
    return dataclasses.replace(UNIT, training=dataclasses.replace(TRAINING, **changes))  # type: ignore[arg-type]


def relative_squared_difference(a: dict[str, Floats], b: dict[str, Floats]) -> float:
    """D of the decoded deltas: |Q(a) - Q(b)|^2 / |Q(b)|^2."""
    over = sum(float(np.sum((a[name].astype(np.float64) - b[name]) ** 2)) for name in b)
    return over / sum(float(np.sum(b[name].astype(np.float64) ** 2)) for name in b)


def decoded(result: UnitResult, unit: UnitSpec = UNIT) -> dict[str, Floats]:
    return encode(result.delta, schema_of(TINY), FINE, unit.seed).decoded()


def test_a_unit_gives_the_same_bytes_in_two_processes() -> None:
    raw = b"".join(values.tobytes() for values in run().delta.values())
    command = [sys.executable, "-m", "tests.diloco.golden", "--unit"]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert hashlib.sha256(raw).hexdigest() == other


def test_a_unit_stays_within_tolerance_of_the_one_recorded_on_another_machine() -> None:
    recorded = Container.open(golden.UNIT_DELTA, schema_of(TINY), FINE, UNIT_ID)
    recorded.check_finite()
    expected = {name: recorded.tensor(name) for name in recorded.schema.names}
    # Training bits differ between machines: instruction sets and library versions add in another order. Honest
    # differences of 1e-4 make about 1e-4 here; skipping one step in eight makes 0.06 and more.
    assert relative_squared_difference(decoded(run()), expected) < 5e-3
    lazy = with_training(steps=TRAINING.steps - 2)
    assert relative_squared_difference(decoded(run(lazy)), expected) > 0.02


def test_a_unit_is_told_by_its_seed_and_leaves_no_trace_in_the_process() -> None:
    before = {name: values.copy() for name, values in BASE.items()}
    state = torch.get_rng_state()
    one, other = run(), run(dataclasses.replace(UNIT, seed=OTHER_SEED))
    assert relative_squared_difference(decoded(one), decoded(other)) > 0.1
    assert all(np.array_equal(BASE[name], values) for name, values in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_delta_has_the_schemas_tensors_and_is_base_minus_trained() -> None:
    result = run(with_training(steps=1, lr=1e-2, warmup_steps=0, weight_decay=0.0))
    schema = schema_of(TINY)
    assert tuple(sorted(result.delta)) == schema.names
    # Adam's first step moves every weight with a gradient by lr times its sign.
    moved = np.abs(result.delta["proj_out.weight"])
    assert np.allclose(moved[moved > 1e-4], 1e-2, rtol=1e-2)
    assert "pos_embed.pos_embed" not in result.delta


def test_training_learns_what_the_shards_show() -> None:
    result = run(with_training(steps=60, segment_steps=20))
    first, *_, last = result.trail.segments
    assert last.mean_loss < 0.7 * first.mean_loss
    assert result.samples == 60 * TRAINING.batch


def test_the_trail_has_an_entry_for_every_segment_and_one_for_the_rest() -> None:
    reports: list[StepReport] = []
    result = run_unit(UNIT, TINY, BASE, shard_set(), device="cpu", on_step=reports.append)
    assert [report.step for report in reports] == list(range(1, 13))
    assert {report.steps for report in reports} == {12}
    assert (result.loss_first, result.loss_last) == (reports[0].loss, reports[-1].loss)
    assert len(result.trail.segments) == 3  # 12 steps in segments of 5
    assert result.trail.segments[2].mean_loss == pytest.approx((reports[10].loss + reports[11].loss) / 2)
    trained = [(BASE[name] - delta) for name, delta in result.delta.items()]
    assert len(result.trail.segments[2].weights_digest) == 32
    assert all(np.all(np.isfinite(values)) for values in trained)


def test_two_units_share_their_trail_until_they_part() -> None:
    long, short = run(), run(with_training(steps=10))
    assert long.trail.segments[:2] == short.trail.segments
    assert long.trail.root != short.trail.root


class Abandoned(Exception):
    pass


def test_whoever_watches_can_abandon_a_unit() -> None:
    def stop(report: StepReport) -> None:
        if report.step == 3:
            raise Abandoned

    with pytest.raises(Abandoned):
        run_unit(UNIT, TINY, BASE, shard_set(), device="cpu", on_step=stop)


def test_a_loss_that_is_not_finite_drops_the_unit() -> None:
    with pytest.raises(TrainingDiverged, match=r"step \d+ of 12|end of the unit"):
        run(with_training(lr=1e30, warmup_steps=0))


def test_with_every_caption_dropped_the_text_has_no_effect() -> None:
    unit = with_training(text_dropout=DROPOUT_ONE)
    shard = Shard.open(shard_bytes(0, 20))
    nothing = [np.zeros((0, 12), np.float16)] * 20
    silent = Shard.open(write_shard(shard.latent, nothing, np.zeros((20, 8), np.float16), shard.info))
    with_text, without = run(unit, ShardSet([shard])), run(unit, ShardSet([silent]))
    assert with_text.trail.root == without.trail.root


def test_a_step_draws_from_its_streams_by_step_and_place() -> None:
    shards = shard_set()
    batch = Draws(SEED).batch(3, 4, shards, max_tokens=4, text_dropout=0)
    place = 2
    index = Stream(SEED, "order").word(3, place) % shards.n
    shard, at = shards.place(index)
    assert np.array_equal(batch.latent[place].numpy(), shard.latent[at].astype(np.float32))
    assert np.array_equal(batch.noise[place].numpy().reshape(-1), Stream(SEED, "noise").normal(3, place, 16))
    assert batch.t[place].item() == logit_normal_table()[Stream(SEED, "timestep").u16(3, place, 1)[0]]


def test_captions_are_dropped_as_often_as_the_run_says() -> None:
    shards, draws = shard_set(), Draws(SEED)
    dropped = sum(
        int((draws.batch(step, 16, shards, max_tokens=4, text_dropout=1 << 14).pooled == 0).all(1).sum())
        for step in range(50)
    )
    assert abs(dropped / 800 - 0.25) < 0.05


def test_the_learning_rate_rises_linearly_and_follows_the_units_scale() -> None:
    rates = [TRAINING.lr_at(step, 0.5) for step in range(5)]
    assert rates == pytest.approx([5e-3 / 6, 5e-3 / 3, 2.5e-3, 2.5e-3, 2.5e-3])
    assert dataclasses.replace(TRAINING, warmup_steps=0).lr_at(0, 1.0) == TRAINING.lr


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("beta2", 1.0),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("grad_clip", 0.0),
        ("warmup_steps", 13),
        ("text_dropout", 65537),
        ("max_tokens", 0),
        ("segment_steps", 0),
        ("precision", "fp16"),
        ("optimizer", "sgd"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TRAINING, **{field: value})  # type: ignore[arg-type]


# With eps as runs in bf16 need it: AdamW from zero moments makes whole steps of tiny gradients, which are rounding.
IN_BF16 = with_training(precision="bf16", eps=1e-3)


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


class MatrixProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every matrix product and attention, forward and backward: their precision, and whether bf16 would do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[torch.dtype] = Counter()
        self.beyond_bf16 = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _PRODUCTS or "attention" in str(func):
            # The bias of `addmm` is a number of the net's as well; what `addmm_` adds to is a sum.
            factors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.seen[factors[0].dtype] += 1
            self.beyond_bf16 += not all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in factors[:3])
        return func(*args, **(kwargs or {}))


def matrix_products(unit: UnitSpec) -> MatrixProducts:
    products = MatrixProducts()
    with products:
        run(dataclasses.replace(unit, training=dataclasses.replace(unit.training, steps=3)))
    assert products.seen.total() > 3 * 30
    return products


def test_every_matrix_product_of_a_unit_in_fp32_is_in_fp32() -> None:
    products = matrix_products(UNIT)
    assert set(products.seen) == {torch.float32}
    assert products.beyond_bf16 > 0.9 * products.seen.total()  # a zero, and many an input, is a bf16 number


def test_every_matrix_product_of_a_unit_in_bf16_is_in_bf16_or_of_bf16_numbers() -> None:
    with bf16_products(through_fp32=False):
        assert set(matrix_products(IN_BF16).seen) == {torch.bfloat16}
    with bf16_products(through_fp32=True):
        products = matrix_products(IN_BF16)
    assert set(products.seen) == {torch.float32}
    assert products.beyond_bf16 == 0


def test_bf16_through_fp32_replays_what_bf16_kernels_trained_and_the_other_way_round() -> None:
    with bf16_products(through_fp32=False):
        kernels = run(IN_BF16)
    with bf16_products(through_fp32=True):
        through_fp32 = run(IN_BF16)
    apart = relative_squared_difference(through_fp32.delta, kernels.delta) ** 0.5
    # The tolerance of a run in bf16 (`verify.tolerances.DEFAULT_TOLERANCES`).
    assert 0.0 < apart < 0.008
    assert through_fp32.loss_last == pytest.approx(kernels.loss_last, rel=1e-3)


def test_bf16_in_parts_of_a_batch_gives_the_same_gradients_but_for_rounding() -> None:
    with bf16_products(through_fp32=True):
        whole = run(IN_BF16)
        parts = run_unit(IN_BF16, TINY, BASE, shard_set(), device="cpu", on_step=None, execution=Execution(parts=2))
    assert 0.0 < relative_squared_difference(parts.delta, whole.delta) < 0.02**2


@pytest.mark.parametrize("unit", [UNIT, IN_BF16], ids=["fp32", "bf16"])
def test_a_unit_gives_the_same_bits_twice_in_one_process(unit: UnitSpec) -> None:
    one, other = run(unit), run(unit)
    assert all(np.array_equal(other.delta[name], values) for name, values in one.delta.items())
    assert one.trail.root == other.trail.root


def test_bf16_trains_fp32_weights_to_nearly_the_same_delta() -> None:
    rough, fine = run(IN_BF16), run(with_training(eps=1e-3))
    assert all(values.dtype == np.float32 for values in rough.delta.values())
    assert 0.0 < relative_squared_difference(rough.delta, fine.delta) < 0.1**2
    assert rough.loss_last == pytest.approx(fine.loss_last, rel=0.01)
    # Weights that were kept in bf16 would move by its coarse steps only, and small updates would be lost.
    moved = np.abs(rough.delta["proj_out.weight"])
    assert len(np.unique(moved)) > 0.9 * moved.size


def test_every_setting_of_the_inner_loop_must_be_given() -> None:
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(TrainingSpec))


def test_each_encoder_is_dropped_by_itself_and_half_of_the_samples_hear_the_empty_caption_instead() -> None:
    n, dropout = 40, 1 << 15
    text, empty = (
        Encoded(tokens=np.full((1, 4), value, np.float16), pooled=np.zeros(0, np.float16)) for value in (1, 2)
    )
    parts = {name: [text] * n + [empty] for name in ("clip_l", "t5")}
    shard = Shard.open(pack_shard(np.zeros((n, 1, 4, 4), np.float16), INFO, parts=parts))
    layout = TextLayout(
        parts=(
            TextPart(name="clip_l", row=0, rows=1, column=0, width=4, pooled_at=0, pooled=0),
            TextPart(name="t5", row=1, rows=1, column=0, width=4, pooled_at=0, pooled=0),
        ),
        rows=2,
        token_dim=4,
        pooled_dim=1,
    )
    shards = ShardSet([shard], StoredTexts(layout=layout))
    draws = Draws(SEED)
    heard = torch.cat(
        [draws.batch(step, 64, shards, max_tokens=2, text_dropout=dropout).text[:, :, 0] for step in range(16)]
    )
    pairs = Counter((int(a), int(b)) for a, b in heard)
    # 1 is the caption, 2 the empty one, 0 silence: never both of the latter in one sample.
    assert set(pairs) == {(1, 1), (0, 1), (1, 0), (0, 0), (2, 1), (1, 2), (2, 2)}
    total = sum(pairs.values())
    assert abs(pairs[1, 1] / total - 1 / 4) < 0.05
    assert abs((pairs[0, 0] + pairs[2, 2]) / total - 1 / 4) < 0.05
    assert abs(pairs[2, 2] / (pairs[2, 2] + pairs[0, 0]) - 1 / 2) < 0.1


def test_batches_that_are_drawn_ahead_are_the_same_and_in_the_same_order() -> None:
    draw = partial(Draws(SEED).batch, size=4, shards=shard_set(), max_tokens=4, text_dropout=1 << 14)
    plain, ahead = (list(in_turn(draw, 5, ahead=ahead)) for ahead in (False, True))
    assert len(plain) == len(ahead) == 5
    for one, other in zip(plain, ahead, strict=True):
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.text, other.text)
    assert not torch.equal(plain[0].noise, plain[1].noise)


def test_what_goes_wrong_while_drawing_ahead_comes_out() -> None:
    draw = partial(Draws(SEED).batch, size=4, shards=shard_set(), max_tokens=1, text_dropout=0)
    with pytest.raises(ShardCorrupt, match="text tokens; the run's limit is 1"):
        list(in_turn(draw, 5, ahead=True))


def test_a_shift_moves_timesteps_towards_noise_by_the_rule_of_the_sampler() -> None:
    plain, shifted = (
        Draws(SEED).batch(0, 64, shard_set(), max_tokens=4, text_dropout=0, shift=shift).t for shift in (1.0, 3.0)
    )
    assert torch.allclose(shifted, shift_timestep(plain, 3.0), atol=1e-6)
    assert (shifted > plain).all()
    assert shifted.max() < 1


def test_a_runs_shift_is_that_of_its_size_and_grows_with_the_side() -> None:
    assert shift_for(3.0, 128, 128, 128) == 3.0
    assert shift_for(1.0, 32, 64, 64) == 2.0
    assert run(with_training(shift=3.0)).trail.root != run().trail.root
