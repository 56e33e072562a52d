"""`commonweight demo`: a whole run on this machine, in a few minutes."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from commonweight.extras import not_installed
from protocol.errors import TargetMissed, UsageError

if TYPE_CHECKING:  # torch is loaded only once the demo really draws
    from commonweight.demo import DemoOptions, DemoRun

SETTINGS: tuple[str, ...] = (
    # A few dozen units must show what a run of months does: a short probation, and audits often.
    "verification.probation=3",
    "verification.floor=0.2",
    "verification.ramp=5",
    "rounds.min_window_seconds=1",
    "rounds.lease_seconds=60",
)
"""Settings of the demo's run that differ from the template's."""

ROUNDS = 20


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-run"),
    volunteers: Annotated[int, typer.Option(min=1, max=16, help="Volunteers, each a process.")] = 4,
    hostile: Annotated[
        int, typer.Option(min=0, max=16, help="Volunteers that turn hostile once they are trusted, beside the others.")
    ] = 1,
    attack: Annotated[
        str, typer.Option(help="What the hostile ones send; `verify/attacks.py` names them.")
    ] = "sign-flip",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds to train.")] = ROUNDS,
    seed: Annotated[int, typer.Option(help="Seed of the pictures drawn at the end.")] = 1,
    limit_seconds: Annotated[float, typer.Option(help="Give up after this long.")] = 1200.0,
) -> None:
    """Train a small model on scanned digits with a coordinator and volunteers on this machine, and look at the result.

    Everything is real: separate processes, TLS, signatures, a database, audits. One volunteer turns hostile; the end
    says what it tried, when it was caught, and how. Ends with a published checkpoint, a sheet of generated digits, a
    plot of the validation loss, and a score; exit code 1 if the score is below 90 %.
    """
    from commonweight.demo import DemoOptions, train
    from commonweight.demo_view import DemoView

    _check_packages()
    console = Console()
    options = DemoOptions(
        folder=out.absolute(),
        volunteers=volunteers,
        hostile=hostile,
        attack=_known(attack),
        rounds=rounds,
        seed=seed,
        limit_seconds=limit_seconds,
    )
    run = train(options, SETTINGS, DemoView(console))
    console.print(f"trained {rounds} rounds in {run.seconds:.0f} s: {run.state.headline()}", soft_wrap=True)
    console.print("drawing 200 digits, and asking a classifier what it sees")
    _report(run, options)


def _known(attack: str) -> str:
    from verify.attacks import ATTACKS

    if attack not in ATTACKS:
        raise UsageError(f"--attack is {attack[:40]!r}; it must be one of {', '.join(sorted(ATTACKS))}.")
    return attack


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("sklearn", "PIL", "matplotlib") if find_spec(name) is None]
    if missing:
        raise not_installed(f"The demo needs {', '.join(missing)}", "demo")


def _shown(path: Path) -> Path:
    """Return a path as it is shown: from the working directory on, if it lies under that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _own_command() -> str:
    """Return what to type to call this very program again."""
    installed = shutil.which("commonweight")
    mine = Path(sys.executable).with_name("commonweight")
    if installed is not None and Path(installed).absolute() == mine.absolute():
        return "commonweight"
    return os.path.relpath(mine)


def _report(run: "DemoRun", options: "DemoOptions") -> None:
    """Draw, plot, score and say; raise `TargetMissed` if too few digits are recognised."""
    from commonweight import demo_report as report
    from commonweight import demo_story

    pictures = report.generate(run.checkpoint, seed=options.seed)
    sheet, plot = options.folder / "digits.png", options.folder / "validation_loss.png"
    report.draw_sheet(pictures, sheet)
    losses = report.validation_losses(run.directory.public)
    rules = run.directory.config().verification
    stories = [demo_story.tell(run.directory.public, hostile) for hostile in run.hostile]
    report.plot_losses(losses, plot)
    score = report.score(pictures)
    outcome = {
        "bytes_down": run.state.bytes_down,
        "bytes_up": run.state.bytes_up,
        "checkpoint": str(run.checkpoint),
        "classifier_accuracy": score.classifier_accuracy,
        "generated": score.generated,
        "validation_loss": losses,
        "hostile": [
            {
                "attack": story.hostile.attack,
                "banned_after_forged_units": story.banned_after,
                "forged": story.forged,
                "merged": len(story.merged),
                "unmerged": len(story.unmerged),
            }
            for story in stories
        ],
        "recognised": score.recognised,
        "rounds": options.rounds,
        "seconds": round(run.seconds, 1),
        "volunteers": options.volunteers,
    }
    (options.folder / "report.json").write_text(json.dumps(outcome, indent=2) + "\n")
    target = f"target {100 * report.TARGET:.0f} %"
    for line in (
        f"checkpoint:    {_shown(run.checkpoint)}",
        f"digits drawn:  {_shown(sheet)}",
        f"loss by round: {_shown(plot)}",
        f"score:         {100 * score.share:.1f} % of {score.generated} generated digits are recognised ({target})",
        f"               the classifier recognises {100 * score.classifier_accuracy:.1f} % of the real held-out digits",
        *(line for story in stories for line in demo_story.sentences(story, rules)),
        f"check it:      {_own_command()} checkpoint rebuild {_shown(run.directory.root)}",
        f"and the draws: {_own_command()} verify draws {_shown(run.directory.public)}",
    ):
        typer.echo(line)
    if score.share < report.TARGET:
        raise TargetMissed(
            f"Only {score.recognised} of {score.generated} generated digits were recognised; "
            f"{100 * report.TARGET:.0f} % are needed. More rounds help: --rounds {2 * options.rounds}."
        )
