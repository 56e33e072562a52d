import numpy as np
import pytest

from diloco.tables import TABLE_SIZE, Floats, _load, generate, logit_normal_table, normal_table
from protocol.errors import SelfTestFailed


@pytest.mark.parametrize(
    ("shipped", "generated"),
    [
        (normal_table(), generate.normal_quantiles()),
        (logit_normal_table(), generate.logit_normal_quantiles()),
    ],
    ids=["normal", "logit-normal"],
)
def test_the_shipped_tables_are_what_the_generator_makes_to_one_unit_in_the_last_place(
    shipped: Floats, generated: Floats
) -> None:
    assert shipped.shape == generated.shape == (TABLE_SIZE,)
    # Away from zero the bit patterns of fp32 numbers of one sign are ordered as the numbers are.
    apart = np.abs(shipped.view(np.int32).astype(np.int64) - generated.view(np.int32).astype(np.int64))
    assert apart.max() <= 1


def test_the_normal_table_has_mean_zero_and_almost_unit_variance() -> None:
    table = normal_table().astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    assert abs(table.var() - 1.0) < 1e-3
    assert np.all(np.diff(table) > 0)


def test_logit_normal_timesteps_lie_strictly_between_picture_and_noise() -> None:
    table = logit_normal_table()
    assert table.min() > 0.0
    assert table.max() < 1.0
    assert np.all(np.diff(table) >= 0)
    assert abs(float(np.median(table)) - 0.5) < 1e-4


def test_nobody_can_write_into_a_table_that_all_streams_share() -> None:
    with pytest.raises(ValueError, match="read-only"):
        normal_table()[0] = 0.0


def test_a_damaged_table_is_refused() -> None:
    with pytest.raises(SelfTestFailed, match=r"normal\.f32 is damaged"):
        _load("normal.f32", "00" * 32)
