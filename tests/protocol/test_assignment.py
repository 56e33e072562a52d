import hashlib
from collections import Counter
from dataclasses import replace

import pytest

from protocol.assignment import (
    is_short,
    lr_scale,
    most_samples,
    short_below,
    unit_id,
    unit_samples,
    unit_seed,
    unit_shards,
    unit_steps,
)
from protocol.documents import Digest, UnitId
from tests.protocol.examples import CONFIG, run_config

CONFIG_SHA256 = Digest("c0" * 32)


def test_unit_ids_and_seeds_have_golden_values() -> None:
    unit = unit_id(CONFIG_SHA256, 3, 12)
    assert unit == hashlib.sha256(b"commonweight/unit/v1\0" + b"\xc0" * 32 + b"3/12").hexdigest()
    assert unit == "044937f6871eb5271f7c8756b411f7ed060fbca66d070aadcbe3cb83d9042077"
    assert unit_seed(unit) == "5d61f502bb229f082f07cc1ea2f8ef52b3848018616526aff9397d7177463422"


def test_every_unit_of_a_run_has_its_own_id_and_seed() -> None:
    units = [unit_id(CONFIG_SHA256, number, index) for number in range(1, 30) for index in range(30)]
    seeds = {unit_seed(unit) for unit in units}
    assert len(set(units)) == len(seeds) == len(units)
    assert not seeds & set(units)
    assert unit_id(Digest("c1" * 32), 1, 0) not in units


def test_a_unit_gets_consecutive_shards_and_wraps_round() -> None:
    names = [shard.sha256 for shard in CONFIG.data.shards]
    assert unit_shards(CONFIG, 1, 0) == (names[0], names[1])
    assert unit_shards(CONFIG, 1, 2) == (names[4], names[0])
    assert unit_shards(CONFIG, 2, 0) == (names[3], names[4])


def test_rounds_visit_every_shard_equally_often() -> None:
    seen = Counter(shard for r in range(1, 6) for i in range(4) for shard in unit_shards(CONFIG, r, i))
    assert set(seen) == {shard.sha256 for shard in CONFIG.data.shards}
    assert set(seen.values()) == {8}


def test_a_unit_never_gets_a_shard_twice() -> None:
    greedy = run_config(shards=3, shards_per_unit=10)
    assert sorted(unit_shards(greedy, 5, 3)) == [shard.sha256 for shard in greedy.data.shards]


def test_the_learning_rate_falls_linearly_to_its_final_share_and_stays_there() -> None:
    assert [lr_scale(CONFIG, number) for number in (1, 6, 11)] == pytest.approx([1.0, 0.55, 0.1], abs=1e-15)
    assert lr_scale(CONFIG, 1) == 1.0
    assert lr_scale(CONFIG, 40) == lr_scale(CONFIG, 11)
    assert lr_scale(run_config(planned=1), 1) == 1.0
    constant = replace(CONFIG, training=replace(CONFIG.training, lr_final_share=1.0))
    assert {lr_scale(constant, number) for number in range(1, 12)} == {1.0}


SIZES = replace(CONFIG.training, steps=30, batch=4, short_steps=10, short_share=1 << 22)


def test_a_unit_is_short_if_its_id_is_below_the_share_of_short_units() -> None:
    config = replace(CONFIG, training=SIZES)
    short, long = UnitId("3fffff" + "f" * 58), UnitId("400000" + "0" * 58)
    assert (is_short(config, short), is_short(config, long)) == (True, False)
    assert (unit_steps(config, short), unit_steps(config, long)) == (10, 30)
    assert (unit_samples(config, short), unit_samples(config, long), most_samples(config)) == (40, 120, 120)


def test_about_as_many_units_are_short_as_the_run_says() -> None:
    config = replace(CONFIG, training=SIZES)
    units = [unit_id(CONFIG_SHA256, number, index) for number in range(1, 41) for index in range(50)]
    assert 0.22 < sum(is_short(config, unit) for unit in units) / len(units) < 0.28
    assert all(is_short(config, unit) == (unit < short_below(config)) for unit in units)


@pytest.mark.parametrize(("share", "short"), [(0, False), (1 << 24, True)])
def test_all_units_or_none_can_be_short(share: int, short: bool) -> None:
    config = replace(CONFIG, training=replace(SIZES, short_share=share))
    assert [is_short(config, UnitId(first * 64)) for first in "0f"] == [short, short]
