"""`commonweight auditor`: judge claims for a run, as its operator's referee."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from commonweight.cli.networks import Components, networks_in
from protocol.errors import UsageError

if TYPE_CHECKING:
    from worker.auditor import AuditorSettings
    from worker.reporters import Reporter

app = typer.Typer(
    help="Judge claims by running their units again, as a run's referee. `coordinator serve` starts one by itself.",
    no_args_is_help=True,
)

Home = Annotated[
    Path | None,
    typer.Option(
        help="Where the key, the opinions and the cache are kept; default: the user's data folder.", file_okay=False
    ),
]


@app.callback()
def auditor() -> None:
    """Judge claims by running their units again, as a run's referee."""


@app.command()
def init(home: Home = None) -> None:
    """Make an auditor's key, and print its public half for `commonweight coordinator delegate`."""
    from worker.audit_home import DELEGATION, KEY, make_key

    place = (home or default_home()).absolute()
    public = make_key(place)
    typer.echo(f"public key: {public.hex}")
    typer.echo(f"the key itself is {place / KEY}: show it to nobody")
    typer.echo(
        f"next: the run's operator delegates it with `commonweight coordinator delegate`; put what that writes at "
        f"{place / DELEGATION}, then: commonweight auditor start --join TOKEN"
    )


@app.command()
def start(
    join: Annotated[str, typer.Option(help="The run's join string, cw1:HOST:PORT:RUNID.", metavar="TOKEN")],
    key: Annotated[
        Path | None, typer.Option(help="The auditor's key; default: HOME/auditor.pem.", dir_okay=False)
    ] = None,
    delegation: Annotated[
        Path | None,
        typer.Option(help="The root's delegation of that key; default: HOME/delegation.json.", dir_okay=False),
    ] = None,
    home: Home = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What to train on; auto takes a CUDA GPU if there is one.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads for training; all if not given.", min=1)] = None,
    audits: Annotated[int | None, typer.Option(help="Stop after so many audits.", min=1)] = None,
    cache_gib: Annotated[float, typer.Option(help="Cap on the run's files kept on this disk, in GiB.")] = 20.0,
    components: Components = None,
    json: Annotated[bool, typer.Option("--json", help="Tell progress as JSON lines, for programs.")] = False,
    lifeline: Annotated[
        int | None,
        typer.Option(min=0, metavar="FD", help="For programs that start one: end at once when this open pipe closes."),
    ] = None,
) -> None:
    """Judge what the coordinator asks about until stopped. Ctrl-C ends it cleanly; twice, at once."""
    import asyncio

    from commonweight.cli.telling import make_reporter
    from coordinator.lifeline import exit_with_parent
    from protocol.join import JoinString
    from protocol.limits import GIB
    from worker.audit_home import DELEGATION, KEY
    from worker.auditor import AuditorSettings

    if lifeline is not None:
        exit_with_parent(lifeline)
    if not 0 < cache_gib < math.inf:
        raise UsageError(f"--cache-gib is {cache_gib:g}; it must be a number above 0.")
    place = (home or default_home()).absolute()
    settings = AuditorSettings(
        join=JoinString.parse(join),
        home=place,
        key=key or place / KEY,
        delegation=delegation or place / DELEGATION,
        device=device,
        threads=threads,
        audits=audits,
        cache_bytes=int(cache_gib * GIB),
        networks=networks_in(components),
    )
    reporter = make_reporter(json=json)
    try:
        asyncio.run(_start(settings, reporter))
    finally:
        reporter.close()


async def _start(settings: "AuditorSettings", reporter: "Reporter") -> None:
    from worker.auditor import run_auditor
    from worker.stop import Stop

    stop = Stop()
    stop.listen()
    await run_auditor(settings, reporter, stop=stop)


def default_home() -> Path:
    """Return where the platform keeps what a program must not lose."""
    import platformdirs

    return Path(platformdirs.user_data_dir("commonweight", appauthor=False)) / "auditor"
