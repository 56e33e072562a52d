import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from diloco.streams import Stream
from diloco.tables import Floats
from diloco.weigh import ROW, gram
from verify.robust import near_duplicates, robust_shares

RULES = ("mean", "geometric-median", "multi-krum", "nnm-clip")
FORTY = 2**24 * 2 // 5
QUARTER = 2**22


def normals(name: str, count: int) -> Floats:
    return Stream(bytes(32), f"init/{name}").normal(0, 0, count * ROW).reshape(count, ROW)


def honest(count: int) -> Floats:
    """Sketches of deltas that share a direction and have noise of their own: cosines of about 1/3 between them."""
    return np.float32(0.7) * normals("shared", 1) + normals("own", count)


def dithered(sketches: Floats, name: str) -> Floats:
    """Sketches of the same deltas after each had its own dither."""
    return sketches + np.float32(0.15) * normals(name, len(sketches))


def hostile_shapes(of: Floats, count: int) -> dict[str, Floats]:
    mean, deviation = np.mean(of, axis=0), np.std(of, axis=0)
    return {
        "sign flip": dithered(np.tile(-mean, (count, 1)), "flip"),
        "ten sign flips": dithered(np.tile(-10 * mean, (count, 1)), "flips"),
        "inner product": dithered(np.tile(np.float32(-0.5) * mean, (count, 1)), "ipm"),
        "a little is enough": dithered(np.tile(mean - deviation, (count, 1)), "alie"),
        "zero": np.zeros((count, ROW), dtype=np.float32),
        "noise": normals("noise", count),
    }


def weighed(rule: str, sketches: Floats, *, shares: Sequence[int] | None = None, hostile: int = FORTY) -> Floats:
    weights = robust_shares(rule, gram(list(sketches)), shares or [1000] * len(sketches), hostile_share=hostile)
    assert min(weights) >= 0.0
    assert sum(weights) == pytest.approx(1.0)
    return np.array(weights, dtype=np.float32)


def error(rule: str, good: Floats, bad: Floats) -> float:
    """How far the weighted mean lies from that of the honest, relative to its norm."""
    everything = np.concatenate([good, bad])
    result = np.sum(weighed(rule, everything)[:, None] * everything, axis=0)
    mean = np.mean(good, axis=0)
    return float(np.linalg.norm(result - mean) / np.linalg.norm(mean))


WITHSTOOD = {
    "sign flip": 0.2,
    "ten sign flips": 0.2,
    "inner product": 0.2,
    "noise": 0.25,
    # Copies count once, but lie so near the honest that this one is kept; audits and the norm are against those.
    "a little is enough": 0.5,
    "zero": 0.5,
}


@pytest.mark.parametrize(("good", "bad"), [(5, 3), (12, 8)])
@pytest.mark.parametrize("shape", list(WITHSTOOD))
def test_mixing_with_clipping_keeps_to_the_honest_mean_against_nearly_two_fifths(
    shape: str, good: int, bad: int
) -> None:
    sketches = honest(good)
    attack = hostile_shapes(sketches, bad)[shape]
    assert error("nnm-clip", sketches, attack) < WITHSTOOD[shape]
    assert error("mean", sketches, attack) > 0.35


def test_no_single_loud_delta_moves_a_robust_rule() -> None:
    sketches = honest(9)
    loud = -1000 * sketches[:1]
    assert error("mean", sketches, loud) > 10
    for rule in RULES[1:]:
        assert error(rule, sketches, loud) < 0.4


@pytest.mark.parametrize("rule", RULES[1:])
def test_among_the_honest_alone_a_robust_mean_is_nearly_the_mean(rule: str) -> None:
    assert error(rule, honest(16), honest(16)[:0]) < 0.3


def test_copies_count_as_one_delta() -> None:
    sketches = honest(9)
    copies = dithered(np.repeat(sketches[:1], 4, axis=0), "copies")
    near = near_duplicates(gram(list(np.concatenate([sketches[1:], copies]))), hostile_share=FORTY)
    assert np.array_equal(np.flatnonzero(near[-1]), [8, 9, 10, 11])
    assert np.array_equal(near[:8, :8], np.eye(8, dtype=bool))
    weights = weighed("nnm-clip", np.concatenate([sketches[1:], copies]))
    assert float(np.sum(weights[8:])) < 1.5 / 9


def test_honest_deltas_that_agree_well_are_not_taken_for_copies_beside_sign_flips() -> None:
    """Only 10 of these 28 pairs are honest; their cosines are near 0.9, those with the flips are negative."""
    good = 3 * normals("shared", 1) + normals("own", 5)
    bad = dithered(np.tile(-np.mean(good, axis=0), (3, 1)), "flip")
    near = near_duplicates(gram(list(np.concatenate([good, bad]))), hostile_share=FORTY)
    assert np.array_equal(near[:5, :5], np.eye(5, dtype=bool))
    assert near[5:, 5:].all()
    assert error("nnm-clip", good, bad) < 0.1


@pytest.mark.parametrize("rule", RULES)
def test_weights_do_not_depend_on_the_order_of_the_deltas(rule: str) -> None:
    sketches = np.concatenate([honest(8), hostile_shapes(honest(8), 3)["noise"]])
    shares = [100 + 17 * k for k in range(11)]
    order = list(range(11))
    random.Random(1).shuffle(order)
    plain = weighed(rule, sketches, shares=shares)
    shuffled = weighed(rule, sketches[order], shares=[shares[k] for k in order])
    assert shuffled == pytest.approx(plain[order], rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_what_a_delta_weighs_by_itself_carries_over(rule: str) -> None:
    sketches = honest(12)
    shares = [1] * 6 + [4] * 6
    weights = weighed(rule, sketches, shares=shares, hostile=QUARTER)
    assert float(np.sum(weights[6:])) > 0.65
    # However large the numbers are, only their proportions count.
    assert weighed(rule, sketches, shares=[share << 900 for share in shares], hostile=QUARTER) == pytest.approx(weights)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("shares", "expected"), [([3], [1.0]), ([3, 1], [0.75, 0.25]), ([2, 1, 1], [0.5, 0.25, 0.25])])
def test_up_to_three_deltas_are_weighed_by_their_shares(rule: str, shares: list[int], expected: list[float]) -> None:
    assert weighed(rule, honest(len(shares)), shares=shares) == pytest.approx(expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [4, 5, 6])
def test_few_deltas_are_weighed_somehow(rule: str, count: int) -> None:
    assert float(np.min(weighed(rule, honest(count)))) >= 0.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["zeros", "equal", "mostly equal"])
def test_degenerate_rounds_have_weights_too(rule: str, kind: str) -> None:
    sketches = np.zeros((6, ROW), dtype=np.float32) if kind == "zeros" else np.repeat(honest(1), 6, axis=0)
    if kind == "mostly equal":
        sketches[0] = -sketches[0]
    weights = weighed(rule, sketches)
    if kind != "mostly equal" and rule in {"mean", "geometric-median"}:
        assert weights == pytest.approx([1 / 6] * 6)
    if kind == "mostly equal" and rule in {"geometric-median", "multi-krum"}:
        assert float(weights[0]) < 0.01


def test_ties_go_to_the_delta_that_stands_first() -> None:
    corners = np.zeros((6, ROW), dtype=np.float32)
    corners[range(6), range(6)] = 1.0
    assert weighed("multi-krum", corners, hostile=FORTY)[-1] == 0.0


def test_what_cannot_be_weighed_is_a_value_error() -> None:
    products: npt.NDArray[np.int64] = gram(list(honest(3)))
    for rule, shares, said in (
        ("mean", [], "at least one delta"),
        ("mean", [1, 0, 1], "positive share"),
        ("mean", [1, 1], "Gram matrix of shape"),
        ("loudest", [1, 1, 1], "no weighting 'loudest'"),
    ):
        with pytest.raises(ValueError, match=said):
            robust_shares(rule, products, shares, hostile_share=FORTY)
