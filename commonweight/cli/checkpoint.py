"""`commonweight checkpoint`: is a checkpoint what its run published, and does it follow from the deltas?"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commonweight.locate import checkpoint_directory, public_directory
from protocol.documents import RunId
from protocol.errors import UsageError
from protocol.join import JoinString
from protocol.printing import printable
from worker.durable import trouble_with

if TYPE_CHECKING:  # torch is loaded only once a rebuild really begins
    from verify.rebuild import RebuiltRound

app = typer.Typer(help="Check published checkpoints.", no_args_is_help=True)

RunOption = Annotated[
    str | None,
    typer.Option("--run", metavar="RUNID", help="Run id, or join string, that must stand behind it. Recommended."),
]
_RUN_ID = re.compile(r"[0-9a-f]{64}")


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
    report = verify_checkpoint(place, _run_id(run))
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
) -> None:
    """Merge all of a run's deltas again, from checkpoint 0 to the newest one, and compare every round's bytes.

    Ends with exit code 1 and says where, if one byte differs from what the run published.
    """
    from verify.rebuild import rebuild as rebuild_run

    public, expected = public_directory(directory), _run_id(run)
    with _kept_or_temporary(out) as target:
        try:
            report = rebuild_run(public, target, _show_round, run=expected, start=start)
        except BrokenPipeError:
            raise
        except OSError as error:  # a write that fails does not say where
            raise trouble_with(error.filename or target, error) from None
    typer.echo(
        f"Checkpoint {report.checkpoint} follows from {report.deltas} deltas, byte for byte: "
        f"weights SHA-256 {report.weights_sha256}" + (f" (taking checkpoint {start} as published)" if start else "")
    )
    if out is not None:
        typer.echo(f"It lies in {out}: weights and description, without the run's signatures that `verify` looks for.")


def _show_round(rebuilt: "RebuiltRound") -> None:
    typer.echo(
        f"checkpoint {rebuilt.checkpoint} of {rebuilt.last}: {rebuilt.deltas} deltas merged again, "
        f"weights {rebuilt.weights_sha256[:16]} as published"
    )


@contextmanager
def _kept_or_temporary(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="commonweight-rebuild-") as folder:
        yield Path(folder)


def _run_id(text: str | None) -> RunId | None:
    if text is None or _RUN_ID.fullmatch(text):
        return None if text is None else RunId(text)
    if text.startswith("cw1:"):
        return JoinString.parse(text).run
    raise UsageError(f"--run {text[:80]!r} is no run id: it has 64 hex digits, and is the last part of a join string.")
