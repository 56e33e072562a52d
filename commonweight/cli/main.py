"""The `commonweight` command: its groups, its version, and how its errors look.

An error is one sentence on stderr with its stable code, `error: SENTENCE [CODE]`; the exit code is 2 for a command or
a setting that is wrong, 1 for a failure. The groups import what they need when they run, so that help is quick.
"""

import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from commonweight.cli import auditor, checkpoint, coordinator, data, demo, export, models, sample, verify, worker
from protocol.errors import Bug, CommonweightError, UsageError
from protocol.printing import printable_text
from worker.durable import trouble_with

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

app = typer.Typer(
    name="commonweight",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(worker.app, name="worker")
app.add_typer(auditor.app, name="auditor")
app.add_typer(data.app, name="data")
app.add_typer(verify.app, name="verify")
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(export.export)
app.command()(models.models)
app.command()(sample.sample)
app.command()(demo.demo)


def version() -> str:
    """Return the installed version."""
    try:
        return metadata.version("commonweight")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _show_version(asked: bool) -> None:
    if asked:
        from diloco import NUMERICS

        typer.echo(f"commonweight {version()}, numerics {NUMERICS}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version, and the numerics that a run admits workers by.",
        ),
    ] = False,
) -> None:
    """Train one open text-to-image model together, and check the result.

    `demo` shows all of it on this machine. `worker start` lends this computer to a run; `coordinator init` makes one;
    `sample` draws with what came of it.
    """


def _unwrap(group: typer.Typer) -> None:
    """Docstrings are wrapped for their source; a terminal wraps their paragraphs anew."""
    if group.registered_callback is not None:
        group.registered_callback.help = _paragraphs(group.registered_callback.callback)
    for command in group.registered_commands:
        command.help = _paragraphs(command.callback)
    for below in group.registered_groups:
        if below.typer_instance is not None:
            _unwrap(below.typer_instance)


def _paragraphs(function: object) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (inspect.getdoc(function) or "").split("\n\n"))


_unwrap(app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default); return the exit code instead of ending the process."""
    try:
        # Without `standalone_mode` a command's result comes back: its exit code, or None.
        result: object = app(None if arguments is None else list(arguments), standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except CommonweightError as error:
        return _show(error)
    except BrokenPipeError:
        # Whoever read the output has left, as `head` does; what Python still wants to write at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CommonweightError.exit_code
    except OSError as error:
        return _show(trouble_with(error.filename or "a file that was being written", error))
    except Exception as error:
        if (wrong_use := _wrong_use(error)) is not None:
            return _show(wrong_use) if wrong_use.message else UsageError.exit_code
        traceback.print_exc()
        return _show(Bug())
    return result if isinstance(result, int) else 0


def _show(error: CommonweightError) -> int:
    # The sentence may quote a server or a file of somebody else.
    typer.echo(f"error: {printable_text(error.message)} [{error.code}]", err=True)
    return error.exit_code


def _wrong_use(error: Exception) -> UsageError | None:
    """Translate what the argument parser raises; its classes have no stable home, but all say themselves like this."""
    say = getattr(error, "format_message", None)
    if say is None:
        return None
    translated = UsageError("see --help")
    translated.message = str(say())
    return translated
