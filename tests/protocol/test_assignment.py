import hashlib
from dataclasses import replace

import pytest

from protocol.assignment import (
    is_short,
    lr_scale,
    most_samples,
    short_below,
    stage_shards,
    unit_id,
    unit_samples,
    unit_seed,
    unit_shards,
    unit_steps,
)
from protocol.documents import Digest, Stage, UnitId
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


def test_every_shard_is_in_one_unit_of_an_epoch_and_the_next_epoch_deals_anew() -> None:
    # Five shards, two a unit: three units make an epoch, one of them with a single shard.
    units = [unit_shards(CONFIG, 1 + number // 4, number % 4) for number in range(12)]
    epochs = [units[start : start + 3] for start in range(0, 12, 3)]
    for epoch in epochs:
        assert sorted(len(unit) for unit in epoch) == [1, 2, 2]
        assert sorted(shard for unit in epoch for shard in unit) == [shard.sha256 for shard in CONFIG.data.shards]
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_units_shards_hold_pictures_of_one_size() -> None:
    shards = tuple(
        replace(shard, height=8 if k % 3 else 16) for k, shard in enumerate(run_config(shards=9).data.shards)
    )
    config = replace(CONFIG, data=replace(CONFIG.data, shards=shards), rounds=replace(CONFIG.rounds, stages=()))
    tall = {shard.sha256 for shard in shards if shard.height == 16}
    units = [unit_shards(config, 1, index) for index in range(5)]
    assert all(set(unit) <= tall or not set(unit) & tall for unit in units)
    assert sorted(shard for unit in units for shard in unit) == sorted(shard.sha256 for shard in shards)


def test_a_stage_trains_on_pictures_of_about_its_side_and_begins_its_epochs_anew() -> None:
    sizes = [(8, 8), (4, 12), (16, 16), (8, 24), (8, 8), (24, 12), (64, 64)]
    shards = tuple(
        replace(shard, height=height, width=width)
        for shard, (height, width) in zip(run_config(shards=7).data.shards, sizes, strict=True)
    )
    stages = (Stage(first_round=1, side=8), Stage(first_round=3, side=16))
    config = replace(
        CONFIG, data=replace(CONFIG.data, shards=shards), rounds=replace(CONFIG.rounds, units=4, stages=stages)
    )
    names = [shard.sha256 for shard in shards]
    small, large = [{names[k] for k in numbers} for numbers in ((0, 1, 4), (2, 3, 5))]
    for round_number, expected in ((1, small), (2, small), (3, large), (9, large)):
        units = [unit_shards(config, round_number, index) for index in range(4)]
        assert {shard for unit in units for shard in unit} == expected
    assert stage_shards(config, 2)[0] == 1
    first, of_it = stage_shards(config, 5)
    assert first == 3
    # An epoch of the second stage is three units: every shard is in one of the first three.
    assert sorted(s for index in range(3) for s in unit_shards(config, 3, index)) == sorted(s.sha256 for s in of_it)


def test_another_run_deals_otherwise() -> None:
    other = replace(CONFIG, seed="00" * 32)
    assert [unit_shards(CONFIG, 1, index) for index in range(4)] != [unit_shards(other, 1, index) for index in range(4)]


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
