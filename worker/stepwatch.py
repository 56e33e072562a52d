"""What happens between two steps of a unit: progress is told, and a request to stop is heard."""

import asyncio
import time

from protocol.errors import UnitAbandoned
from worker.progress import STEP_EVENTS_EVERY_SECONDS, Step
from worker.reporters import Reporter
from worker.stop import Stop, StopLevel

JUST_BEGUN = 4
"""A unit of which less than one part in so many is done counts as just begun, and is handed back on Ctrl-C."""


class StepWatch:
    """Called in the training thread after each step; raises `UnitAbandoned` to end the training.

    `begun` is set with the first step: from then on training has its base in memory.
    """

    def __init__(
        self, unit: str, round_number: int, stop: Stop, reporter: Reporter, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._unit = unit
        self._round = round_number
        self._stop = stop
        self._reporter = reporter
        self._loop = loop
        self.begun = asyncio.Event()
        self._told = 0.0
        self._finishing = False

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """Hear of a step."""
        self._obey(step, steps)
        if step == 1:
            self._loop.call_soon_threadsafe(self.begun.set)
        now = time.monotonic()
        if step == steps or now - self._told >= STEP_EVENTS_EVERY_SECONDS:
            self._told = now
            event = Step(unit=self._unit, round=self._round, step=step, steps=steps, loss=loss)
            self._loop.call_soon_threadsafe(self._reporter.report, event)

    def _obey(self, step: int, steps: int) -> None:
        level = self._stop.level
        if level is StopLevel.NOW:
            raise UnitAbandoned(f"asked to stop at once, at step {step} of {steps}")
        if level is StopLevel.SOON and not self._finishing:
            if step * JUST_BEGUN < steps:
                raise UnitAbandoned(f"asked to stop when it had just begun, at step {step} of {steps}")
            self._finishing = True  # decided once: what was more than begun is finished
