"""`commonweight checkpoint`: is a checkpoint what its run published, and does it follow from the deltas?"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commonweight.locate import checkpoint_directory, public_directory, run_id
from protocol.printing import counted, printable
from worker.durable import trouble_with

if TYPE_CHECKING:  # torch is loaded only once a rebuild really begins
    from verify.rebuild import RebuildReport, RebuiltRound

app = typer.Typer(help="Check published checkpoints.", no_args_is_help=True)

RunOption = Annotated[
    str | None,
    typer.Option("--run", metavar="RUNID", help="Run id, or join string, that must stand behind it. Recommended."),
]


@app.command()
def verify(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A checkpoint directory, or a run's (its newest one)."),
    ],
    run: RunOption = None,
) -> None:
    """Verify that a checkpoint directory is what its run signed: every signature, and every file's SHA-256.

    Needs nothing but the directory, and no network.
    """
    from verify.checkpoint import verify_checkpoint

    place = checkpoint_directory(directory)
    report = verify_checkpoint(place, run_id(run))
    typer.echo(printable(f"checkpoint {report.checkpoint} of run {report.config.name!r}: {place}"))
    typer.echo("  signatures  root key, coordinator key, run config and manifest hold")
    typer.echo(f"  files       {report.files} files, {report.total_bytes:,} bytes, each as signed and no other")
    typer.echo(f"  merged      {report.merged} deltas")
    typer.echo(f"  weights     SHA-256 {report.weights_sha256}")
    typer.echo(printable(f"  licence     {report.config.weights_licence}"))
    typer.echo(f"  run id      {report.run}")
    if not report.run_given:
        typer.echo(
            "The run id was read from the directory itself. Compare it with the end of the run's join string, "
            "or give that with --run."
        )


@app.command()
def rebuild(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A run's directory, or a mirror of its public one."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep the rebuilt checkpoint here; must be empty.")
    ] = None,
    run: RunOption = None,
    start: Annotated[
        int, typer.Option("--from", min=0, help="Begin at this checkpoint as published, if older deltas are pruned.")
    ] = 0,
    without: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="What if this volunteer had never taken part? A pseudonym, an owner key's id or the public key.",
        ),
    ] = None,
) -> None:
    """Merge all of a run's deltas again, from checkpoint 0 to the newest one, and compare every round's bytes.

    Ends with exit code 1 and says where, if one byte differs from what the run published. With --without, one
    volunteer's deltas are left out and nothing is compared: the result is what the run would have become.
    """
    from verify.rebuild import rebuild as rebuild_run

    public, expected = public_directory(directory), run_id(run)
    with _kept_or_temporary(out) as target:
        try:
            show = _show_round if without is None else _show_what_if
            report = rebuild_run(public, target, show, run=expected, start=start, without=without)
        except BrokenPipeError:
            raise
        except OSError as error:  # a write that fails does not say where
            raise trouble_with(error.filename or target, error) from None
    if report.without is not None:
        typer.echo(
            f"Checkpoint {report.checkpoint} without member {report.without[:12]}: {report.deltas} deltas merged, "
            f"{report.left_out} left out; weights SHA-256 {report.weights_sha256}"
        )
    else:
        _show_rebuilt(report, start)
    if out is not None:
        typer.echo(f"It lies in {out}: weights and description, without the run's signatures that `verify` looks for.")


def _show_rebuilt(report: "RebuildReport", start: int) -> None:
    typer.echo(
        f"Checkpoint {report.checkpoint} follows from {counted(report.deltas, 'delta')}, byte for byte: "
        f"weights SHA-256 {report.weights_sha256}" + (f" (taking checkpoint {start} as published)" if start else "")
    )


def _show_round(rebuilt: "RebuiltRound") -> None:
    typer.echo(
        f"checkpoint {rebuilt.checkpoint} of {rebuilt.last}: {counted(rebuilt.deltas, 'delta')} merged again, "
        f"weights {rebuilt.weights_sha256[:16]} as published"
    )


def _show_what_if(rebuilt: "RebuiltRound") -> None:
    typer.echo(
        f"checkpoint {rebuilt.checkpoint} of {rebuilt.last}: {counted(rebuilt.deltas, 'delta')}, weights "
        f"{rebuilt.weights_sha256[:16]} (what if; not published)"
    )


@contextmanager
def _kept_or_temporary(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="commonweight-rebuild-") as folder:
        yield Path(folder)
