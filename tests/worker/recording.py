"""A reporter that remembers what it hears, and a way to run a worker with one."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tests.worker.small_run import SmallRun
from worker.backoff import Backoff
from worker.daemon import WorkerSettings, run_worker
from worker.progress import Event, to_json
from worker.stop import Stop

QUICK: Final = Backoff(base_ms=20, cap_ms=100)


class Recorder:
    """Remembers events as `--json` would write them, and may act on what it hears."""

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self._on_event = on_event

    def report(self, event: Event) -> None:
        self.events.append(to_json(event))
        if self._on_event is not None:
            self._on_event(event)

    def close(self) -> None:
        return

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    def waits(self) -> set[str]:
        return {event["code"] for event in self.named("waiting")}


def settings_for(run: SmallRun, home: Path, **changes: Any) -> WorkerSettings:
    settings = WorkerSettings(
        join=run.join,
        home=home,
        device="cpu",
        threads=1,
        units=None,
        cache_bytes=1 << 30,
        accept_terms=True,
        backoff=QUICK,
    )
    return replace(settings, **changes)


async def work(run: SmallRun, home: Path, recorder: Recorder, *, stop: Stop | None = None, **changes: Any) -> None:
    """Run a worker to its end."""
    async with asyncio.timeout(60):
        await run_worker(settings_for(run, home, **changes), recorder, ask=None, stop=stop or Stop())


def spooled(home: Path, area: str) -> list[Path]:
    """The directories of an area of the only spool in a home."""
    (spool,) = (home / "spool").iterdir()
    return sorted((spool / area).iterdir())
