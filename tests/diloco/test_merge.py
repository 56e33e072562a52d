import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.checkpoint import TensorFile, write_checkpoint
from diloco.codec import EncodedDelta
from diloco.container import Container, write_container
from diloco.merge import WEIGHT_ONE, MergeInput, OuterConfig, UnmergeInput, merge_round, normalise_weights
from diloco.schema import Schema, TensorSpec
from diloco.tables import Floats
from protocol.errors import CheckpointCorrupt, DeltaNotFinite
from tests.diloco.examples import CODEC, UNIT_ID, container, encoded, normals

# Longer than one chunk of the merge, so that chunk boundaries are crossed.
SCHEMA = Schema(tensors=(TensorSpec(name="long", shape=(600, 601)), TensorSpec(name="short", shape=(33,))))
BUFFER = "pos_embed.pos_embed"
OUTER = OuterConfig(lr=0.7, momentum=0.9)
CLAIMS = [hashlib.sha256(bytes([number])).digest() for number in range(3)]
WEIGHTS = (3_000_000, 5_592_405, WEIGHT_ONE - 3_000_000 - 5_592_405)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Floats]:
    tensors = {spec.name: normals(f"{spec.name}/base", spec.shape) for spec in SCHEMA.tensors}
    tensors[BUFFER] = normals("buffer", (1, 4, 6))
    write_checkpoint(tmp_path / "base", tensors)
    return tensors


def inputs(directory: Path) -> list[MergeInput]:
    return [
        MergeInput(claim_digest=CLAIMS[number], container=container(directory, number, SCHEMA), weight=WEIGHTS[number])
        for number in range(3)
    ]


def merged(
    directory: Path, items: list[MergeInput], momentum: Path | None = None, out: str = "out"
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    weights, next_momentum = directory / f"{out}.weights", directory / f"{out}.momentum"
    merge_round(directory / "base", momentum, items, OUTER, weights, next_momentum)
    return TensorFile.open(weights).load(), TensorFile.open(next_momentum).load()


def plain(theta: Floats, v: Floats, deltas: list[tuple[bytes, int, Floats]]) -> tuple[Floats, Floats]:
    """The round as the formulas say it, written out for whole tensors."""
    f = np.float32
    g: Floats = np.zeros(theta.shape, dtype=f)
    for _, weight, delta in sorted(deltas, key=lambda item: item[0]):
        g = g + (f(weight) * f(2.0**-24)) * delta
    v = f(0.9) * v + g
    new_theta: Floats = np.subtract(theta, f(0.7) * (g + f(0.9) * v))
    return new_theta, v


def test_two_rounds_equal_the_formulas_written_out_in_plain_numpy(tmp_path: Path, base: dict[str, Floats]) -> None:
    items = inputs(tmp_path)
    first = merged(tmp_path, items, out="first")
    second_base = tmp_path / "base"
    (tmp_path / "first.weights").replace(second_base)
    second = merged(tmp_path, items, tmp_path / "first.momentum", out="second")
    for spec in SCHEMA.tensors:
        deltas = [(CLAIMS[n], WEIGHTS[n], encoded(n, SCHEMA).decoded()[spec.name]) for n in range(3)]
        theta, v = plain(base[spec.name], np.zeros(spec.shape, dtype=np.float32), deltas)
        assert np.array_equal(first[0][spec.name], theta)
        assert np.array_equal(first[1][spec.name], v)
        theta, v = plain(theta, v, deltas)
        assert np.array_equal(second[0][spec.name], theta)
        assert np.array_equal(second[1][spec.name], v)


def test_tensors_that_are_not_trained_are_carried_through_and_have_no_momentum(
    tmp_path: Path, base: dict[str, Floats]
) -> None:
    weights, momentum = merged(tmp_path, inputs(tmp_path))
    assert np.array_equal(weights[BUFFER], base[BUFFER])
    assert list(momentum) == list(SCHEMA.names)


@pytest.mark.usefixtures("base")
def test_the_order_in_which_deltas_are_given_does_not_matter_but_their_claims_do(tmp_path: Path) -> None:
    items = inputs(tmp_path)
    one, two = merged(tmp_path, items), merged(tmp_path, items[::-1])
    assert np.array_equal(one[0]["long"], two[0]["long"])
    relabelled = [
        MergeInput(claim_digest=claim, container=item.container, weight=item.weight)
        for claim, item in zip(CLAIMS[1:] + CLAIMS[:1], items, strict=True)
    ]
    assert not np.array_equal(one[0]["long"], merged(tmp_path, relabelled)[0]["long"])


@pytest.mark.usefixtures("base")
def test_the_reported_digests_are_those_of_the_files_and_merging_again_gives_the_same(tmp_path: Path) -> None:
    results = [
        merge_round(tmp_path / "base", None, inputs(tmp_path), OUTER, tmp_path / "w", tmp_path / "m") for _ in range(2)
    ]
    assert results[0] == results[1]
    assert results[0].weights.sha256 == hashlib.sha256((tmp_path / "w").read_bytes()).digest()
    assert results[0].momentum.size == (tmp_path / "m").stat().st_size


@pytest.mark.usefixtures("base")
def test_a_claim_cannot_be_merged_twice_and_weights_cannot_exceed_one(tmp_path: Path) -> None:
    items = inputs(tmp_path)
    with pytest.raises(ValueError, match="only once"):
        merged(tmp_path, [items[0], items[0]])
    heavy = MergeInput(claim_digest=CLAIMS[0], container=items[0].container, weight=WEIGHT_ONE)
    with pytest.raises(ValueError, match="sum to at most"):
        merged(tmp_path, [heavy, items[1]])
    with pytest.raises(ValueError, match="at least one delta"):
        merged(tmp_path, [])


# --- taking a delta out again --------------------------------------------------------------------------------


def history(
    directory: Path, rounds: list[list[MergeInput]], name: str, unmerge: list[UnmergeInput]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Merge round after round from the base; take out in the last one."""
    weights, momentum = directory / "base", None
    for number, items in enumerate(rounds):
        made = directory / f"{name}{number}.weights", directory / f"{name}{number}.momentum"
        out = unmerge if number + 1 == len(rounds) else []
        merge_round(weights, momentum, items, OUTER, *made, unmerge=out, schema=SCHEMA)
        weights, momentum = made
    assert momentum is not None
    return TensorFile.open(weights).load(), TensorFile.open(momentum).load()


def without(items: list[MergeInput], number: int) -> list[MergeInput]:
    return [item for item in items if item.claim_digest != CLAIMS[number]]


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("rounds_ago", [0, 1, 4])
def test_a_delta_taken_out_leaves_the_run_as_if_it_had_never_been_merged(tmp_path: Path, rounds_ago: int) -> None:
    items = inputs(tmp_path)
    later = [items[:1]] * rounds_ago + [items[2:]]
    poison = UnmergeInput(container=items[1].container, weight=WEIGHTS[1], rounds_ago=rounds_ago)
    mended = history(tmp_path, [items, *later], "mended", [poison])
    clean = history(tmp_path, [without(items, 1), *later], "clean", [])
    for spec in SCHEMA.tensors:
        # fp32 rounds each of the steps of a weight of up to 4; deltas are of 1e-3.
        assert float(np.max(np.abs(mended[0][spec.name] - clean[0][spec.name]))) < 2e-6
        assert float(np.max(np.abs(mended[1][spec.name] - clean[1][spec.name]))) < 1e-9


@pytest.mark.usefixtures("base")
def test_several_deltas_are_taken_out_in_one_order_however_they_are_given(tmp_path: Path) -> None:
    items = inputs(tmp_path)[:2]
    removals = []
    for number, item in enumerate(items):
        path = tmp_path / f"unit{number}"
        write_container(path, encoded(number, SCHEMA), bytes([number]) * 32)
        opened = Container.open(path, SCHEMA, CODEC, bytes([number]) * 32)
        removals.append(UnmergeInput(container=opened, weight=item.weight, rounds_ago=0))
    one = history(tmp_path, [items, []], "one", removals)
    two = history(tmp_path, [items, []], "two", removals[::-1])
    assert all(np.array_equal(one[0][name], two[0][name]) for name in one[0])


@pytest.mark.usefixtures("base")
def test_a_round_without_deltas_lets_the_momentum_move_on(tmp_path: Path, base: dict[str, Floats]) -> None:
    first = history(tmp_path, [inputs(tmp_path)], "first", [])
    weights, momentum = history(tmp_path, [inputs(tmp_path), []], "second", [])
    f = np.float32
    for spec in SCHEMA.tensors:
        v = f(0.9) * first[1][spec.name]
        assert np.array_equal(momentum[spec.name], v)
        assert np.array_equal(weights[spec.name], first[0][spec.name] - f(0.7) * (f(0) + f(0.9) * v))


@pytest.mark.usefixtures("base")
def test_what_cannot_have_been_merged_cannot_be_taken_out(tmp_path: Path) -> None:
    items = inputs(tmp_path)
    removal = UnmergeInput(container=items[0].container, weight=WEIGHTS[0], rounds_ago=0)
    for removals, said in (
        ([removal, removal], "only once"),
        ([UnmergeInput(container=items[0].container, weight=-1, rounds_ago=0)], "0 to 1"),
        ([UnmergeInput(container=items[0].container, weight=1, rounds_ago=-1)], "0 or more rounds"),
    ):
        with pytest.raises(ValueError, match=said):
            history(tmp_path, [items, items], "x", removals)
    with pytest.raises(ValueError, match="before the first round"):
        history(tmp_path, [items], "x", [removal])


def test_a_base_of_another_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", {"long": np.zeros((600, 600), dtype=np.float32)})
    with pytest.raises(CheckpointCorrupt, match="the run's model says"):
        merged(tmp_path, inputs(tmp_path))


def test_a_merge_that_would_overflow_is_not_published(tmp_path: Path) -> None:
    schema = Schema(tensors=(TensorSpec(name="x", shape=(256,)),))
    write_checkpoint(tmp_path / "base", {"x": np.full(256, -3.4028e38, dtype=np.float32)})
    # The largest legal scale times 7 is 2^100: only an absurd checkpoint can overflow, here by many rounds of momentum.
    write_checkpoint(tmp_path / "momentum", {"x": np.full(256, 3e38, dtype=np.float32)})
    huge = EncodedDelta(
        schema=schema,
        codec=CODEC,
        codes={"x": np.full(128, 0xFF, dtype=np.uint8)},
        scales={"x": np.array([0x7012], dtype=np.uint16)},
    )
    write_container(tmp_path / "huge", huge, UNIT_ID)
    opened = Container.open(tmp_path / "huge", schema, CODEC, UNIT_ID)
    item = MergeInput(claim_digest=CLAIMS[0], container=opened, weight=WEIGHT_ONE)
    with pytest.raises(DeltaNotFinite, match="cannot be published"), np.errstate(over="ignore"):
        merge_round(tmp_path / "base", tmp_path / "momentum", [item], OUTER, tmp_path / "w", tmp_path / "m")


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60))
def test_weights_sum_to_exactly_one_and_are_within_one_unit_of_the_share(shares: list[int]) -> None:
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(len(shares))]
    weights = normalise_weights(shares, digests)
    assert sum(weights) == WEIGHT_ONE
    for share, weight in zip(shares, weights, strict=True):
        assert abs(weight * sum(shares) - share * WEIGHT_ONE) < sum(shares)


def test_ties_for_the_last_unit_go_to_the_smaller_digest() -> None:
    assert normalise_weights([1, 1, 1], [b"c", b"a", b"b"]) == (5_592_405, 5_592_406, 5_592_405)


@pytest.mark.parametrize(("lr", "momentum"), [(0.0, 0.9), (11.0, 0.9), (0.7, 1.0), (0.7, -0.1), (float("nan"), 0.5)])
def test_outer_settings_out_of_range_are_refused(lr: float, momentum: float) -> None:
    with pytest.raises(ValueError, match="outer"):
        OuterConfig(lr=lr, momentum=momentum)
