"""The ways to show events: JSON lines for programs, plain lines for logs, a live bar for a terminal."""

import json
import math
from collections.abc import Callable
from typing import Final, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from protocol.printing import printable
from worker.audit_progress import AuditDropped, AuditTaken, OpinionGiven
from worker.progress import (
    FILES,
    Downloaded,
    Event,
    Failed,
    HandedBack,
    Leased,
    Refused,
    Sending,
    Step,
    Trained,
    Waiting,
    readable_bytes,
    to_json,
)


class Reporter(Protocol):
    """Shows events as they happen. Called in the event loop's thread only."""

    def report(self, event: Event) -> None:
        """Show one event."""
        ...

    def close(self) -> None:
        """Give the terminal back."""
        ...


class JsonReporter:
    """One JSON object a line, for programs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._open = True

    def report(self, event: Event) -> None:
        """Write one line, at once; go silent when nobody reads any more, since the work matters more."""
        if self._open:
            try:
                self._stream.write(json.dumps(to_json(event), allow_nan=False) + "\n")
                self._stream.flush()
            except BrokenPipeError:
                self._open = False

    def close(self) -> None:
        """Nothing is held."""


class PlainReporter:
    """One sentence a line with the time in front, for logs and dumb terminals."""

    def __init__(self, stream: TextIO, clock: Callable[[], str]) -> None:
        self._stream = stream
        self._clock = clock
        self._last = ""

    def report(self, event: Event) -> None:
        """Write one line; steps and bytes under way are left out, and what is said twice in a row is said once.

        So is `Failed`: whoever ran the worker shows the error itself.
        """
        line = event.line()
        if isinstance(event, (Step, Sending, Failed)):
            return
        repeated = event.reason if isinstance(event, Waiting) else line
        if repeated != self._last:
            self._stream.write(f"{self._clock()} {printable(line)}\n")
            self._stream.flush()
            self._last = repeated

    def close(self) -> None:
        """Nothing is held."""


_WAITING: Final = "waiting for files"
_GETTING_READY: Final = "getting ready"


class _Steps(ProgressColumn):
    """How many steps are done, once there are any."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Note(ProgressColumn):
    """What else there is to say; while files are waited for, the seconds until the next try."""

    def render(self, task: Task) -> Text:
        note, left = str(task.fields["note"]), math.ceil(float(task.fields["until"]) - task.get_time())
        return Text(f"{note}, next try in {left} s" if left > 0 else note)


class TerminalReporter:
    """Shows events with rich: a line each, and from the first unit on one bar that its steps move.

    Not before: a live display would draw over the question whether the terms are accepted, and hide the cursor.
    """

    def __init__(self, console: Console, clock: Callable[[], str]) -> None:
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Steps(),
            _Note(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar: TaskID | None = None
        self._last = ""
        self._live = False

    def report(self, event: Event) -> None:
        """Move the bar, or add a line; `Failed` is left to whoever ran the worker."""
        if isinstance(event, Step):
            self._note(f"loss {event.loss:.4f}", total=event.steps, completed=event.step)
            return
        if isinstance(event, Sending):
            self._note(f"up {readable_bytes(event.sent)}")
            return
        if isinstance(event, Failed):
            return
        if isinstance(event, Leased):
            self._start_bar(f"round {event.round} unit {event.index}")
        elif isinstance(event, AuditTaken):
            self._start_bar(f"audit: round {event.round} unit {event.index}")
        elif isinstance(event, (Trained, HandedBack, OpinionGiven, AuditDropped)):
            self._drop_bar()
        elif isinstance(event, Waiting) and event.part == FILES:
            self._note(_WAITING, until=self._progress.get_time() + event.seconds)
        elif isinstance(event, Downloaded):
            self._note(_GETTING_READY)
        self._line(event)

    def close(self) -> None:
        """Stop drawing, and show the cursor again."""
        self._drop_bar()
        if self._live:
            self._progress.stop()
            self._live = False

    def _note(self, note: str, *, total: int | None = None, completed: int | None = None, until: float = 0.0) -> None:
        if self._bar is not None:
            self._progress.update(self._bar, total=total, completed=completed, note=note, until=until)

    def _start_bar(self, description: str) -> None:
        self._drop_bar()
        if not self._live:
            self._progress.start()
            self._live = True
        # Without a total until the first step: it is not known when that comes.
        self._bar = self._progress.add_task(description, total=None, note=_GETTING_READY, until=0.0)

    def _line(self, event: Event) -> None:
        line = printable(event.line())
        repeated = event.reason if isinstance(event, Waiting) else line
        if repeated != self._last:
            self._last = repeated
            style = "red" if isinstance(event, Refused) else "yellow" if isinstance(event, Waiting) else ""
            # Text, not markup: a stranger's sentence may hold square brackets.
            self._progress.console.print(Text(f"{self._clock()} {line}", style=style))

    def _drop_bar(self) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None
