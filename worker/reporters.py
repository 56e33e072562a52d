"""The ways to show events: JSON lines for programs, plain lines for logs, a live bar for a terminal."""

import json
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from protocol.printing import printable
from worker.progress import (
    Event,
    Failed,
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
        """Write one line; steps and bytes under way are left out, and what is said twice in a row is said once."""
        line = event.line()
        if isinstance(event, (Step, Sending)):
            return
        repeated = event.reason if isinstance(event, Waiting) else line
        if repeated != self._last:
            self._stream.write(f"{self._clock()} {printable(line)}\n")
            self._stream.flush()
            self._last = repeated

    def close(self) -> None:
        """Nothing is held."""


class TerminalReporter:
    """Shows events with rich: a line each, and one bar that the steps of the present unit move."""

    def __init__(self, console: Console, clock: Callable[[], str]) -> None:
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar: TaskID | None = None
        self._last = ""
        self._progress.start()

    def report(self, event: Event) -> None:
        """Move the bar, or add a line."""
        if isinstance(event, Step):
            if self._bar is not None:
                self._progress.update(self._bar, completed=event.step, note=f"loss {event.loss:.4f}")
            return
        if isinstance(event, Sending):
            if self._bar is not None:
                self._progress.update(self._bar, note=f"up {readable_bytes(event.sent)}")
            return
        if isinstance(event, Leased):
            self._drop_bar()
            description = f"round {event.round} unit {event.index}"
            self._bar = self._progress.add_task(description, total=event.steps, note="")
        elif isinstance(event, Trained):
            self._drop_bar()
        self._line(event)

    def close(self) -> None:
        """Stop drawing."""
        self._drop_bar()
        self._progress.stop()

    def _line(self, event: Event) -> None:
        line = printable(event.line())
        repeated = event.reason if isinstance(event, Waiting) else line
        if repeated != self._last:
            self._last = repeated
            style = "red" if isinstance(event, (Failed, Refused)) else "yellow" if isinstance(event, Waiting) else ""
            # Text, not markup: a stranger's sentence may hold square brackets.
            self._progress.console.print(Text(f"{self._clock()} {line}", style=style))

    def _drop_bar(self) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None
