"""While a unit trains, the worker fetches the checkpoint that the next one will start from."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from protocol.errors import Unreachable
from protocol.layout import WEIGHTS, checkpoint_directory
from tests.worker.recording import Recorder, work
from tests.worker.small_run import SmallRun
from worker.progress import Event, Leased, Step
from worker.trainer import TrainedUnit, train_unit

QUICKLY: Final = 0.02
NEXT: Final = f"{checkpoint_directory(1)}/{WEIGHTS}"


def train_until(enough: Callable[[], bool]) -> Callable[..., TrainedUnit]:
    """A trainer that pauses after its first step until something has happened, or for a few seconds."""

    def train(*unit: Any, device: str, on_step: Callable[[int, int, float], None]) -> TrainedUnit:
        def pausing(step: int, steps: int, loss: float) -> None:
            on_step(step, steps, loss)
            ends = time.monotonic() + 5.0
            while step == 1 and not enough() and time.monotonic() < ends:
                time.sleep(0.01)

        return train_unit(*unit, device=device, on_step=pausing)

    return train


def room_for_one(run: SmallRun) -> int:
    """A cache that holds a checkpoint and a shard, and no second checkpoint beside it."""
    return run.manifest.files[0].size + run.config.data.shards[0].size


def asked_for(run: SmallRun, path: str) -> int:
    return sum(asked == f"/{path}" for asked, _ in run.files.requests)


def test_a_checkpoint_that_is_published_during_training_is_there_before_the_unit_ends(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        run = SmallRun(tmp_path / "run", units=1)

        def publish(event: Event) -> None:
            if isinstance(event, Step) and not run.checkpoint:
                run.publish_another()

        recorder = Recorder(publish)
        async with run:
            here = lambda: any(event["file"] == NEXT for event in recorder.named("downloaded"))  # noqa: E731
            await work(
                run,
                tmp_path / "home",
                recorder,
                ahead_seconds=QUICKLY,
                cache_bytes=room_for_one(run),
                train=train_until(here),
            )
        return run, recorder

    run, recorder = asyncio.run(scenario())

    names = recorder.names()
    ahead = next(number for number, event in enumerate(recorder.events) if event.get("file") == NEXT)
    assert names.index("step") < ahead < names.index("trained")
    assert asked_for(run, NEXT) == 1
    assert len(run.received()) == 1


def test_a_base_that_is_read_slowly_does_not_make_room_for_a_newer_checkpoint(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, int]:
        run = SmallRun(tmp_path / "run", units=1)
        asked_early: list[int] = []

        def publish(event: Event) -> None:
            if isinstance(event, Leased):
                run.publish_another()

        def slow(*unit: Any, device: str, on_step: Callable[[int, int, float], None]) -> TrainedUnit:
            time.sleep(25 * QUICKLY)  # the disk turns
            asked_early.append(asked_for(run, NEXT))
            return train_unit(*unit, device=device, on_step=on_step)

        async with run:
            await work(
                run,
                tmp_path / "home",
                Recorder(publish),
                ahead_seconds=QUICKLY,
                cache_bytes=room_for_one(run),
                train=slow,
            )
        return run, sum(asked_early)

    run, asked_early = asyncio.run(scenario())

    assert asked_early == 0
    assert len(run.received()) == 1


def test_nothing_is_fetched_while_there_is_no_newer_checkpoint(tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            looked = lambda: run.log.count("GetStatus") >= 3  # noqa: E731
            await work(run, tmp_path / "home", Recorder(), ahead_seconds=QUICKLY, train=train_until(looked))
            return [path for path, _ in run.files.requests]

    asked = asyncio.run(scenario())

    assert len(asked) == 3  # manifest, weights, one shard


def test_training_does_not_mind_that_nothing_can_be_fetched_ahead(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        recorder = Recorder()
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.errors["GetStatus"] = [Unreachable()]
            run.checkpoint = 7  # which nobody has published
            looked = lambda: run.log.count("GetStatus") >= 3  # noqa: E731
            await work(run, tmp_path / "home", recorder, ahead_seconds=QUICKLY, train=train_until(looked))
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert len(run.received()) == 1
    assert not recorder.named("waiting")


def test_a_cache_without_room_for_two_checkpoints_keeps_what_the_unit_needs(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, list[str]]:
        run = SmallRun(tmp_path / "run", units=2)

        def publish(event: Event) -> None:
            if isinstance(event, Step) and not run.checkpoint:
                run.publish_another()

        recorder = Recorder(publish)
        async with run:
            # The newer checkpoint takes the place of the one in training, which was read before.
            looked = lambda: asked_for(run, NEXT) > 0 and run.log.count("GetStatus") >= 3  # noqa: E731
            await work(
                run,
                tmp_path / "home",
                recorder,
                ahead_seconds=QUICKLY,
                cache_bytes=room_for_one(run),
                train=train_until(looked),
            )
        return run, recorder.names()

    run, names = asyncio.run(scenario())

    assert len(run.received()) == 2
    assert "handed_back" not in names
