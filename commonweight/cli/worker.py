"""`commonweight worker`: lend this computer's time to a run."""

import math
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from commonweight.cli import doctor
from commonweight.cli.homes import Home, default_home
from commonweight.cli.networks import Components, networks_in
from commonweight.locate import run_id
from protocol.errors import UsageError
from protocol.printing import printable, printable_text

if TYPE_CHECKING:
    from worker.daemon import WorkerSettings
    from worker.receipts import Receipt
    from worker.reporters import Reporter

app = typer.Typer(help="Lend this computer's time to a run.", no_args_is_help=True)


app.command()(doctor.doctor)


@app.callback()
def worker() -> None:
    """Lend this computer's time to a run."""


@app.command()
def start(
    join: Annotated[str, typer.Option(help="The run's join string, cw1:HOST:PORT:RUNID.", metavar="TOKEN")],
    home: Home = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What to train on; auto takes a CUDA GPU if there is one.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads for training; all if not given.", min=1)] = None,
    units: Annotated[int | None, typer.Option(help="Stop after so many units.", min=1)] = None,
    cache_gib: Annotated[float, typer.Option(help="Cap on the run's files kept on this disk, in GiB.")] = 20.0,
    components: Components = None,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the run's terms and licence without being asked.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Tell progress as JSON lines, for programs.")] = False,
) -> None:
    """Train units of a run until it is finished. Ctrl-C ends it cleanly; twice, at once."""
    import asyncio

    from commonweight.cli.telling import make_reporter
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
        networks=networks_in(components),
        accept_terms=accept_terms,
    )
    reporter = make_reporter(json=json)
    try:
        asyncio.run(_start(settings, reporter))
    finally:
        reporter.close()


@app.command()
def receipts(
    home: Home = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUNID", help="Run id, or join string; all runs if not given.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
) -> None:
    """Show what became of every unit that this home has finished: accepted or not, why, its weight, its checkpoint."""
    from json import dumps

    from worker.receipts import HEADING, read_receipts, runs_of

    place = (home or default_home()).absolute()
    wanted = run_id(run)
    if not (place / "spool").is_dir():
        raise UsageError(f"No worker has finished a unit in {place}; name its folder with --home.")
    for number, name in enumerate(runs_of(place) if wanted is None else (wanted,)):
        found = read_receipts(place, name)
        if json:
            for receipt in found:
                typer.echo(dumps(receipt.to_json(), sort_keys=True))
            continue
        typer.echo(f"{'' if not number else chr(10)}run {name[:12]}: {_counted(found)}")
        for line in (HEADING, *(receipt.line() for receipt in found)) if found else ():
            typer.echo(printable(line).rstrip())


@app.command()
def appeal(
    claim: Annotated[str, typer.Argument(metavar="CLAIM|UNIT", help="The rejected unit: 8 or more of its hex digits.")],
    join: Annotated[
        str | None,
        typer.Option(help="The run's join string; default: of the run that was last worked for.", metavar="TOKEN"),
    ] = None,
    home: Home = None,
) -> None:
    """Ask for a second referee on a rejected unit, within 14 days of its verdict."""
    import asyncio

    from protocol.join import JoinString
    from worker.appeals import send_appeal
    from worker.home import WorkerHome
    from worker.receipts import read_receipts, runs_of, select, the_one

    place = WorkerHome((home or default_home()).absolute())
    runs = runs_of(place.root) if join is None else (JoinString.parse(join).run,)
    candidates = [receipt for name in runs for receipt in select(read_receipts(place.root, name), claim)]
    rejected = [receipt for receipt in candidates if receipt.outcome == "rejected"]
    receipt = the_one(rejected or candidates, claim)
    known = place.joins()
    if join is None and receipt.run not in known:
        raise UsageError(f"It is not known any more where run {receipt.run[:12]} is; give its join string with --join.")
    asyncio.run(send_appeal(known[receipt.run] if join is None else JoinString.parse(join), place, receipt))
    typer.echo(f"Unit {receipt.unit[:12]} (claim {receipt.claim[:12]}) waits for a second referee.")
    typer.echo(
        "The run may have to find one first. The verdict comes when `commonweight worker start` runs again; "
        "`commonweight worker receipts` shows it."
    )


def _counted(receipts: "Sequence[Receipt]") -> str:
    outcomes = [receipt.outcome for receipt in receipts]
    counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in ("accepted", "rejected", "waiting", "refused")]
    told = ", ".join(count for count in counts if not count.startswith("0 "))
    return f"{len(receipts)} unit{'' if len(receipts) == 1 else 's'} finished{'; ' if told else ''}{told}"


async def _start(settings: "WorkerSettings", reporter: "Reporter") -> None:
    from worker.daemon import run_worker
    from worker.stop import Stop

    stop = Stop()
    stop.listen()
    await run_worker(settings, reporter, ask=_ask, stop=stop)


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
