"""A worker takes the quickest way that fits, and says in a sentence what it is."""

import dataclasses

import pytest

from diloco.execution import PLAIN
from diloco.memory import Work
from mmdit.presets import PRESETS, of_depth
from protocol.errors import MemoryTooSmall
from tests.protocol.examples import run_config
from tests.worker.small_config import small_config
from worker.doctor import LARGEST_BATCH, diagnose
from worker.plan import Plan, Room, fits, plan_unit, planned, room_of, work_of
from worker.trainer import plan_for

D18 = Work(config=of_depth(18), image_tokens=1024, text_tokens=154, batch=8, precision="bf16", optimizer="adamw")
D24 = dataclasses.replace(D18, config=of_depth(24))
GB = 10**9


def card(gb: float, ram: float = 64) -> Room:
    return Room(kind="cuda", device=int(gb * GB), host=int(ram * GB))


def test_where_there_is_room_everything_is_done_at_once() -> None:
    plan = plan_unit(D18, card(80))
    assert plan.execution == PLAIN
    assert plan.sentence() == f"A training step takes {plan.device_bytes / GB:.2f} GB."


@pytest.mark.parametrize(("work", "gb"), [(D18, 12), (D24, 24)])
def test_what_does_not_fit_goes_to_main_memory_and_the_volunteer_is_told(work: Work, gb: int) -> None:
    plan = plan_unit(work, card(gb))
    assert plan.execution.keeping == "host"
    assert plan.device_bytes < 0.95 * gb * GB
    assert "weights and moments in main memory" in plan.sentence()


@pytest.mark.parametrize("gb", [80, 40, 24, 18, 16, 12, 8, 4])
def test_a_plan_fits_the_card_that_it_is_for(gb: int) -> None:
    assert fits(plan_unit(D18, card(gb)), card(gb))


def test_a_sentence_names_every_means() -> None:
    execution = dataclasses.replace(PLAIN, parts=4, checkpointing=True, keeping="narrow")
    said = planned(D18, execution, "cuda").sentence()
    assert said.endswith(
        "GB, with each batch in 4 parts, activations computed twice and weights updated one tensor at a time."
    )


@pytest.mark.parametrize("room", [card(1.5), card(12, ram=8), Room(kind="cpu", device=8 * GB, host=8 * GB)])
def test_what_fits_in_no_way_is_refused_with_what_it_would_take(room: Room) -> None:
    with pytest.raises(MemoryTooSmall, match=r"at least \d+\.\d\d GB .* worker doctor") as caught:
        plan_unit(D18, room)
    assert f"{room.device / GB:.2f} GB free" in caught.value.message


def test_a_run_is_planned_from_its_signed_config() -> None:
    config = run_config()
    small = small_config(config.data.shards, units=1, steps=1)
    work = work_of(small)
    largest = max(shard.height * shard.width for shard in small.data.shards)
    assert work.image_tokens == largest // work.config.patch_size**2
    assert (work.batch, work.precision) == (small.training.batch, small.training.precision)
    event = plan_for(small, None, "cpu")
    assert (event.parts, event.checkpointing, event.keeping) == (1, False, "whole")
    assert event.line() == event.sentence


def test_this_machine_has_some_memory() -> None:
    room = room_of("cpu")
    assert room.device == room.host > GB // 10


def test_a_diagnosis_finds_the_largest_batch_and_what_is_missing_for_one() -> None:
    room = card(12, ram=32)
    found = {each.model: each for each in diagnose(PRESETS, room, pixels=512, precision="bf16", optimizer="adamw")}
    assert list(found) == sorted(found, key=lambda name: found[name].parameters)
    largest = found["d18"].fits["host"].samples

    def plan(batch: int) -> Plan:
        way = dataclasses.replace(PLAIN, checkpointing=True, keeping="host")
        return planned(dataclasses.replace(D18, batch=batch), way, "cuda")

    assert fits(plan(largest), room)
    assert not fits(plan(largest + 1), room)
    assert found["digits"].fits["plain"].samples == LARGEST_BATCH
    plain = found["d18"].fits["plain"]
    assert (plain.samples, plain.host_short) == (0, 0)
    assert plain.device_short == plain.device_bytes - int(0.95 * room.device)
    assert found["d24"].fits["host"].host_short > 0
    assert not any(fit.samples for fit in found["d38"].fits.values())


def test_a_processor_has_one_memory_so_nothing_is_moved_out_of_it() -> None:
    room = Room(kind="cpu", device=32 * GB, host=32 * GB)
    found = next(iter(diagnose(PRESETS, room, pixels=256, precision="fp32", optimizer="adamw")))
    assert set(found.fits) == {"plain", "recomputed", "narrow"}
    assert plan_unit(dataclasses.replace(D18, batch=1), room).execution.keeping != "host"
