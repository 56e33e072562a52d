"""`commonweight worker`: lend this computer's time to a run."""

import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from protocol.errors import UsageError
from protocol.printing import printable_text

if TYPE_CHECKING:
    from worker.daemon import WorkerSettings
    from worker.reporters import Reporter

app = typer.Typer(help="Lend this computer's time to a run.", no_args_is_help=True)


@app.callback()
def worker() -> None:
    """Lend this computer's time to a run."""


@app.command()
def start(
    join: Annotated[str, typer.Option(help="The run's join string, cw1:HOST:PORT:RUNID.", metavar="TOKEN")],
    home: Annotated[
        Path | None, typer.Option(help="Where keys, finished work and the cache are kept.", file_okay=False)
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What to train on; auto takes a CUDA GPU if there is one.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads for training; all if not given.", min=1)] = None,
    units: Annotated[int | None, typer.Option(help="Stop after so many units.", min=1)] = None,
    cache_gib: Annotated[float, typer.Option(help="Cap on the run's files kept on this disk, in GiB.")] = 20.0,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the run's terms and licence without being asked.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Tell progress as JSON lines, for programs.")] = False,
) -> None:
    """Train units of a run until it is finished. Ctrl-C ends it cleanly; twice, at once."""
    import asyncio

    from protocol.join import JoinString
    from protocol.limits import GIB
    from worker.daemon import WorkerSettings

    if not 0 < cache_gib < math.inf:
        raise UsageError(f"--cache-gib is {cache_gib:g}; it must be a number above 0.")
    settings = WorkerSettings(
        join=JoinString.parse(join),
        home=(home or default_home()).absolute(),
        device=device,
        threads=threads,
        units=units,
        cache_bytes=int(cache_gib * GIB),
        accept_terms=accept_terms,
    )
    reporter = _reporter(json=json)
    try:
        asyncio.run(_start(settings, reporter))
    finally:
        reporter.close()


async def _start(settings: "WorkerSettings", reporter: "Reporter") -> None:
    from worker.daemon import run_worker
    from worker.stop import Stop

    stop = Stop()
    stop.listen()
    await run_worker(settings, reporter, ask=_ask, stop=stop)


def default_home() -> Path:
    """Return where the platform keeps what a program must not lose."""
    import platformdirs

    return Path(platformdirs.user_data_dir("commonweight", appauthor=False)) / "worker"


def _reporter(*, json: bool) -> "Reporter":
    from worker.reporters import JsonReporter, PlainReporter, TerminalReporter

    if json:
        return JsonReporter(sys.stdout)
    if sys.stdout.isatty():
        from rich.console import Console

        return TerminalReporter(Console(), _time_of_day)
    return PlainReporter(sys.stdout, _time_of_day)


def _time_of_day() -> str:
    return time.strftime("%H:%M:%S")


def _ask(text: str) -> bool | None:
    """Show the terms; at a terminal, ask whether they are accepted. Ctrl-C there means no."""
    from worker.consent import WIDEST_TEXT, reflow

    width = min(shutil.get_terminal_size().columns - 1, WIDEST_TEXT)
    typer.echo(reflow(printable_text(text), width) + "\n", err=True)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    # The worker's own handler of Ctrl-C would wait for this very answer.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return typer.confirm("Do you accept these terms?", default=False, err=True)
    except (KeyboardInterrupt, typer.Abort):
        return False
    finally:
        signal.signal(signal.SIGINT, previous)
