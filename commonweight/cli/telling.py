"""How a long-running command tells its progress: for a program, for a log, or at a terminal."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.reporters import Reporter


def make_reporter(*, json: bool) -> "Reporter":
    """Return JSON lines if asked for, a live display at a terminal, plain lines otherwise."""
    from worker.reporters import JsonReporter, PlainReporter, TerminalReporter

    if json:
        return JsonReporter(sys.stdout)
    if sys.stdout.isatty():
        from rich.console import Console

        return TerminalReporter(Console(), _time_of_day)
    return PlainReporter(sys.stdout, _time_of_day)


def _time_of_day() -> str:
    return time.strftime("%H:%M:%S")
