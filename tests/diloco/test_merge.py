import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.checkpoint import TensorFile, write_checkpoint
from diloco.container import Container, write_container
from diloco.merge import (
    WEIGHT_ONE,
    MergeFiles,
    MergeInput,
    MergeResult,
    MergeRules,
    OuterConfig,
    OuterState,
    UnmergeInput,
    merge_round,
    normalise_weights,
)
from diloco.patch import PatchConfig, apply_patches, open_patch, round_step
from diloco.schema import Schema, TensorSpec
from diloco.tables import Floats
from protocol.errors import CheckpointCorrupt, DeltaNotFinite, DeltaSchemaMismatch
from tests.diloco.examples import CODEC, container, encoded, normals

# Longer than one chunk of the merge, so that chunk boundaries are crossed.
SCHEMA = Schema(tensors=(TensorSpec(name="long", shape=(600, 601)), TensorSpec(name="short", shape=(33,))))
BUFFER = "pos_embed.pos_embed"
OUTER = OuterConfig(lr=0.7, momentum=0.9)
PATCH = PatchConfig(block=1024, threshold=256)
RULES = MergeRules(outer=OUTER, patch=PATCH, schema=SCHEMA)
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


def files(directory: Path, name: str) -> MergeFiles:
    return MergeFiles(
        weights=directory / f"{name}.weights",
        momentum=directory / f"{name}.momentum",
        residual=directory / f"{name}.residual",
        patch=directory / f"{name}.patch",
    )


def state(directory: Path, name: str | None = None) -> OuterState:
    """The base before the first round, or what the merge of that name made."""
    if name is None:
        path = directory / "base"
        return OuterState(weights=path, weights_sha256=digest(path), momentum=None, residual=None)
    made = files(directory, name)
    return OuterState(
        weights=made.weights, weights_sha256=digest(made.weights), momentum=made.momentum, residual=made.residual
    )


def digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a merge wrote, loaded."""

    weights: dict[str, Floats]
    momentum: dict[str, Floats]
    residual: dict[str, Floats]

    def due(self, name: str) -> Floats:
        """Where a tensor stands once all that waits has been delivered."""
        return np.subtract(self.weights[name], self.residual[name])


def merged(directory: Path, items: list[MergeInput], after: str | None = None, out: str = "out") -> Made:
    merge(directory, items, after, out)
    return load(directory, out)


def merge(
    directory: Path,
    items: list[MergeInput],
    after: str | None = None,
    out: str = "out",
    unmerge: Sequence[UnmergeInput] = (),
) -> MergeResult:
    return merge_round(state(directory, after), items, RULES, files(directory, out), unmerge=unmerge)


def load(directory: Path, name: str) -> Made:
    made = files(directory, name)
    return Made(
        weights=TensorFile.open(made.weights).load(),
        momentum=TensorFile.open(made.momentum).load(),
        residual=TensorFile.open(made.residual).load(),
    )


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A tensor's state in a run that is computed as the formulas say it, for whole tensors."""

    theta: Floats
    v: Floats
    e: Floats

    def round(self, deltas: list[tuple[bytes, int, Floats]], name: str) -> "Plain":
        f = np.float32
        g: Floats = np.zeros(self.theta.shape, dtype=f)
        for _, weight, delta in sorted(deltas, key=lambda item: item[0]):
            g = g + (f(weight) * f(2.0**-24)) * delta
        v = f(0.9) * self.v + g
        step = f(0.7) * (g + f(0.9) * v)
        rounded = round_step((self.e + step).reshape(-1), PATCH, name)
        shape = self.theta.shape
        return Plain(theta=self.theta - rounded.patch.reshape(shape), v=v, e=rounded.residual.reshape(shape))


def test_two_rounds_equal_the_formulas_written_out_in_plain_numpy(tmp_path: Path, base: dict[str, Floats]) -> None:
    items = inputs(tmp_path)
    first = merged(tmp_path, items, out="first")
    second = merged(tmp_path, items, "first", out="second")
    for spec in SCHEMA.tensors:
        deltas = [(CLAIMS[n], WEIGHTS[n], encoded(n, SCHEMA).decoded()[spec.name]) for n in range(3)]
        zeros = np.zeros(spec.shape, dtype=np.float32)
        expected = Plain(theta=base[spec.name], v=zeros, e=zeros)
        for made in (first, second):
            expected = expected.round(deltas, spec.name)
            assert np.array_equal(made.weights[spec.name], expected.theta)
            assert np.array_equal(made.momentum[spec.name], expected.v)
            assert np.array_equal(made.residual[spec.name], expected.e)


@pytest.mark.usefixtures("base")
def test_who_has_the_weights_before_and_the_patches_has_the_weights_after(tmp_path: Path) -> None:
    items = inputs(tmp_path)
    merge(tmp_path, items, out="first")
    merge(tmp_path, items[:2], "first", out="second")
    before = [state(tmp_path), state(tmp_path, "first")]
    patches = [
        open_patch(files(tmp_path, name).patch, SCHEMA, PATCH, base.weights_sha256)
        for name, base in zip(("first", "second"), before, strict=True)
    ]
    found = apply_patches(tmp_path / "base", patches, tmp_path / "patched")
    assert found.sha256 == state(tmp_path, "second").weights_sha256


@pytest.mark.usefixtures("base")
def test_a_patch_of_other_weights_is_refused_before_it_is_applied(tmp_path: Path) -> None:
    merge(tmp_path, inputs(tmp_path))
    with pytest.raises(DeltaSchemaMismatch):
        open_patch(files(tmp_path, "out").patch, SCHEMA, PATCH, bytes(32))


def test_tensors_that_are_not_trained_are_carried_through_and_have_no_momentum(
    tmp_path: Path, base: dict[str, Floats]
) -> None:
    made = merged(tmp_path, inputs(tmp_path))
    assert np.array_equal(made.weights[BUFFER], base[BUFFER])
    assert list(made.momentum) == list(made.residual) == list(SCHEMA.names)


@pytest.mark.usefixtures("base")
def test_the_order_in_which_deltas_are_given_does_not_matter_but_their_claims_do(tmp_path: Path) -> None:
    items = inputs(tmp_path)
    one, two = merged(tmp_path, items), merged(tmp_path, items[::-1])
    assert np.array_equal(one.residual["long"], two.residual["long"])
    relabelled = [
        MergeInput(claim_digest=claim, container=item.container, weight=item.weight)
        for claim, item in zip(CLAIMS[1:] + CLAIMS[:1], items, strict=True)
    ]
    assert not np.array_equal(one.residual["long"], merged(tmp_path, relabelled).residual["long"])


@pytest.mark.usefixtures("base")
def test_the_reported_digests_are_those_of_the_files_and_merging_again_gives_the_same(tmp_path: Path) -> None:
    results = [merge(tmp_path, inputs(tmp_path)) for _ in range(2)]
    assert results[0] == results[1]
    made = files(tmp_path, "out")
    for path, found in (
        (made.weights, results[0].weights),
        (made.momentum, results[0].momentum),
        (made.residual, results[0].residual),
    ):
        assert (found.sha256, found.size) == (digest(path), path.stat().st_size)


@pytest.mark.usefixtures("base")
def test_a_claim_cannot_be_merged_twice_and_weights_cannot_exceed_one(tmp_path: Path) -> None:
    items = inputs(tmp_path)
    with pytest.raises(ValueError, match="only once"):
        merged(tmp_path, [items[0], items[0]])
    heavy = MergeInput(claim_digest=CLAIMS[0], container=items[0].container, weight=WEIGHT_ONE)
    with pytest.raises(ValueError, match="sum to at most"):
        merged(tmp_path, [heavy, items[1]])


# --- taking a delta out again --------------------------------------------------------------------------------


def history(directory: Path, rounds: list[list[MergeInput]], name: str, unmerge: list[UnmergeInput]) -> Made:
    """Merge round after round from the base; take out in the last one."""
    last = None
    for number, items in enumerate(rounds):
        merge(directory, items, last, f"{name}{number}", unmerge if number + 1 == len(rounds) else [])
        last = f"{name}{number}"
    assert last is not None
    return load(directory, last)


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
        assert float(np.max(np.abs(mended.due(spec.name) - clean.due(spec.name)))) < 2e-6
        assert float(np.max(np.abs(mended.momentum[spec.name] - clean.momentum[spec.name]))) < 1e-9


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
    assert all(np.array_equal(one.residual[name], two.residual[name]) for name in one.residual)


@pytest.mark.usefixtures("base")
def test_a_round_without_deltas_lets_the_momentum_move_on(tmp_path: Path) -> None:
    first = history(tmp_path, [inputs(tmp_path)], "first", [])
    second = history(tmp_path, [inputs(tmp_path), []], "second", [])
    for spec in SCHEMA.tensors:
        before = Plain(theta=first.weights[spec.name], v=first.momentum[spec.name], e=first.residual[spec.name])
        expected = before.round([], spec.name)
        assert np.array_equal(second.momentum[spec.name], expected.v)
        assert np.array_equal(second.weights[spec.name], expected.theta)


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
    # No legal delta is beyond 2^67: only an absurd checkpoint can overflow, here by what earlier rounds left waiting.
    write_checkpoint(tmp_path / "momentum", {"x": np.zeros(256, dtype=np.float32)})
    write_checkpoint(tmp_path / "residual", {"x": np.full(256, 2.0**100, dtype=np.float32)})
    base = OuterState(
        weights=tmp_path / "base",
        weights_sha256=bytes(32),
        momentum=tmp_path / "momentum",
        residual=tmp_path / "residual",
    )
    rules = MergeRules(outer=OUTER, patch=PATCH, schema=schema)
    merge_round(base, [], rules, files(tmp_path, "fits"))
    write_checkpoint(tmp_path / "residual", {"x": np.full(256, 3e38, dtype=np.float32)})
    with pytest.raises(DeltaNotFinite, match="cannot be published"), np.errstate(over="ignore"):
        merge_round(base, [], rules, files(tmp_path, "out"))


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
