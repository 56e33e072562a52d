from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from diloco.evaluate import TripleLoss
from diloco.streams import Stream
from diloco.tables import Floats
from diloco.weigh import ROW, gram
from protocol.canonical import sha256_hex
from protocol.documents import Digest
from tests.verify.examples import REPLAY
from verify.screen import STRATA, loss_changes, outliers

COUNT = 10
TRIPLES = 64
BASE_LOSS = 1.0
CLAIMS = [Digest(sha256_hex(b"%d" % number)) for number in range(COUNT)]


def normals(name: str, count: int, width: int = ROW) -> Floats:
    return Stream(bytes(32), f"init/{name}").normal(0, 0, count * width).reshape(count, width)


def honest(count: int = COUNT, name: str = "own") -> list[Floats]:
    return list(np.float32(0.7) * normals("shared", 1) + normals(name, count))


def changes(seed: int = 0) -> list[Floats]:
    """Losses that fall by 0.1 on average, each triple for all deltas alike and a little for each."""
    name = f"changes{seed}"
    common = np.float32(-0.1) + np.float32(0.05) * normals(f"{name}/all", 1, TRIPLES)
    return list(common + np.float32(0.02) * normals(name, COUNT, TRIPLES) + np.float32(0.005) * normals(name, COUNT, 1))


def screened(
    sketches: Sequence[Floats],
    *,
    norms: Sequence[float] | None = None,
    losses: Sequence[Floats] | None = None,
    audited: frozenset[str] = frozenset(),
    members: Sequence[str] | None = None,
    samples: Sequence[int] | None = None,
) -> dict[Digest, str]:
    claims = CLAIMS[: len(sketches)]
    found = outliers(
        claims,
        members=[str(number) for number in range(len(claims))] if members is None else members,
        norms2=[norm**2 for norm in norms or [1.0] * len(claims)],
        samples=samples or [100] * len(claims),
        gram=gram(sketches),
        audited=audited,
        changes=None if losses is None else {c: loss.tolist() for c, loss in zip(claims, losses, strict=True)},
        base_loss=BASE_LOSS,
        verification=REPLAY,
    )
    return dict(found)


def test_honest_deltas_are_left_alone() -> None:
    flagged = 0
    for seed in range(30):
        flagged += len(screened(honest(name=f"own{seed}"), losses=changes(seed)))
    assert flagged == 0


@pytest.mark.parametrize("norm", [3.1, 0.3, 0.0, 1e6])
def test_a_delta_of_another_size_stands_out(norm: float) -> None:
    assert screened(honest(), norms=[1.0] * 9 + [norm]) == {CLAIMS[9]: "norm"}
    assert screened(honest(3), norms=[1.0, 1.0, norm]) == {CLAIMS[2]: "norm"}


def test_a_norm_is_far_by_the_spread_of_the_others_and_by_a_fifth_at_least() -> None:
    alike = [1.0, 0.99, 1.01, 1.02, 0.98]
    assert screened(honest(6), norms=[*alike, 1.2]) == {}
    assert screened(honest(6), norms=[*alike, 1.25]) == {CLAIMS[5]: "norm"}
    assert screened(honest(6), norms=[*alike, 0.8]) == {CLAIMS[5]: "norm"}
    unlike = [1.0, 0.8, 1.25, 0.7, 1.4]
    assert screened(honest(6), norms=[*unlike, 1.6]) == {}


def test_three_of_eight_who_skip_half_their_steps_stand_out_by_their_norm_alone() -> None:
    assert screened(honest(8), norms=[1.0, 0.97, 1.03, 1.01, 0.96, 0.64, 0.61, 0.67]) == dict.fromkeys(
        CLAIMS[5:8], "norm"
    )


def test_three_of_eight_who_make_the_loss_worse_by_a_tenth_of_it_stand_out_together() -> None:
    losses = changes()[:8]
    for number in (5, 6, 7):
        losses[number] = losses[number] + np.float32(0.15)
    assert screened(honest(8), losses=losses) == dict.fromkeys(CLAIMS[5:8], "loss")
    for number in (5, 6, 7):
        losses[number] = losses[number] - np.float32(0.12)
    assert screened(honest(8), losses=losses) == {}


def test_a_delta_that_points_against_the_others_stands_out() -> None:
    sketches = honest()
    sketches[4] = -sketches[4]
    assert screened(sketches) == {CLAIMS[4]: "direction"}


def test_both_of_two_copies_stand_out() -> None:
    sketches = honest()
    sketches[2] = sketches[7] + np.float32(0.15) * normals("dither", 1)[0]
    assert screened(sketches) == {CLAIMS[2]: "duplicate", CLAIMS[7]: "duplicate"}


def test_an_audited_delta_is_part_of_the_cohort_and_no_outlier() -> None:
    sketches = honest()
    sketches[2] = sketches[7] + np.float32(0.15) * normals("dither", 1)[0]
    assert screened(sketches, audited=frozenset({CLAIMS[7]})) == {CLAIMS[2]: "duplicate"}
    assert screened(honest(), norms=[1.0] * 9 + [9.0], audited=frozenset({CLAIMS[9]})) == {}


def test_what_one_look_found_does_not_bend_the_next_ones_cohort() -> None:
    sketches = honest()
    mean = np.mean(sketches[4:], axis=0)
    for number in range(4):
        sketches[number] = np.float32(-10.0) * mean + np.float32(0.3) * normals(f"{number}", 1)[0]
    assert screened(sketches, norms=[10.0] * 4 + [1.0] * 6) == dict.fromkeys(CLAIMS[:4], "norm")


def test_a_delta_that_worsens_the_loss_stands_out() -> None:
    losses = changes()
    losses[3] = losses[3] + np.float32(0.3)
    assert screened(honest(), losses=losses) == {CLAIMS[3]: "loss"}


@pytest.mark.parametrize("quarter", range(STRATA))
def test_poison_in_a_quarter_of_the_timesteps_is_enough(quarter: int) -> None:
    losses = changes()
    width = TRIPLES // STRATA
    losses[3][quarter * width : (quarter + 1) * width] += np.float32(0.2)
    assert screened(honest(), losses=losses) == {CLAIMS[3]: "loss"}


def test_one_odd_triple_is_not_enough() -> None:
    losses = changes()
    losses[3][10] += np.float32(3.0)
    assert screened(honest(), losses=losses) == {}


@pytest.mark.parametrize("nothing", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stands_out_and_does_not_hide_a_bad_one(nothing: float) -> None:
    losses = changes()
    losses[2][5] = nothing
    losses[3] = losses[3] + np.float32(0.3)
    assert screened(honest(), losses=losses) == {CLAIMS[2]: "loss", CLAIMS[3]: "loss"}


def test_a_short_units_delta_is_compared_as_if_its_unit_were_a_long_one() -> None:
    sizes, norms = [100] * 6 + [50, 50], [1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 0.65, 0.67]
    assert screened(honest(8), norms=norms, samples=sizes) == {}
    assert set(screened(honest(8), norms=norms).values()) == {"norm"}
    norms[7] = 1.0  # as long as a long unit's
    assert screened(honest(8), norms=norms, samples=sizes) == {CLAIMS[7]: "norm"}


def test_a_small_cohort_is_not_judged_by_itself() -> None:
    sketches = honest(3)
    sketches[0] = -sketches[1]
    assert screened(sketches) == {}
    nothing = np.zeros((0, 0), int)
    found = outliers(
        [],
        members=[],
        norms2=[],
        samples=[],
        gram=nothing,
        audited=(),
        changes=None,
        base_loss=1.0,
        verification=REPLAY,
    )
    assert found == {}


def test_one_or_two_deltas_have_nothing_to_be_compared_with_and_are_audited() -> None:
    assert screened(honest(1)) == {CLAIMS[0]: "few"}
    assert screened(honest(2)) == {CLAIMS[0]: "few", CLAIMS[1]: "few"}
    assert screened(honest(2), audited=frozenset({CLAIMS[0]})) == {CLAIMS[1]: "few"}


def test_many_deltas_of_two_owners_are_no_cohort_either() -> None:
    assert screened(honest(4), members=["ada", "ada", "bob", "ada"]) == dict.fromkeys(CLAIMS[:4], "few")
    assert screened(honest(4), members=["ada", "ada", "bob", "cyd"]) == {}


def test_losses_are_compared_on_the_same_triples_only() -> None:
    before = [TripleLoss(t=0.1, loss=1.0), TripleLoss(t=0.9, loss=2.0)]
    after = [TripleLoss(t=0.1, loss=1.5), TripleLoss(t=0.9, loss=1.0)]
    assert loss_changes(before, after) == (0.5, -1.0)
    with pytest.raises(ValueError, match="same triples"):
        loss_changes(before, [replace(after[0], t=0.2), after[1]])
    with pytest.raises(ValueError, match="do not belong together"):
        outliers(
            CLAIMS[:2],
            members=["ada", "bob"],
            norms2=[1.0],
            samples=[100, 100],
            gram=np.eye(2, dtype=int),
            audited=(),
            changes=None,
            base_loss=1.0,
            verification=REPLAY,
        )
