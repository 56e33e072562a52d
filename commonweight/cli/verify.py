"""`commonweight verify`: check for yourself what a run says of its audits, and repeat a verdict on your own machine."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from commonweight.cli.networks import Components, networks_in
from commonweight.locate import public_directory, run_id
from protocol.errors import UsageError
from protocol.printing import printable

if TYPE_CHECKING:  # torch and numpy take seconds to load; --help needs neither
    from protocol.documents import Verification
    from protocol.trust import RunTrust
    from verify.calibration import CalibrationProgress
    from verify.draws import DrawReport
    from verify.policy import PolicyReport
    from worker.evidence import Evidence, UnitPlace
    from worker.materials import Materials
    from worker.public_files import PublicFiles
    from worker.receipts import Receipt
    from worker.referee import Found, Replay

REFUTED: Final = 1
"""Exit code of `verify replay` for a delta that this machine's own run refutes."""

app = typer.Typer(help="Check audits, repeat verdicts, weigh a policy.", no_args_is_help=True)

Public = Annotated[
    str,
    typer.Argument(metavar="DIR|URL", help="A run's directory, a mirror of its public one, or its public address."),
]
RunOption = Annotated[
    str | None,
    typer.Option("--run", metavar="RUNID", help="Run id, or join string, that must stand behind it. Recommended."),
]


@app.callback()
def verify() -> None:
    """Check audits, repeat verdicts, weigh a policy."""


# --- draws -----------------------------------------------------------------------------------------------------


@app.command()
def draws(
    public: Public,
    run: RunOption = None,
    home: Annotated[
        Path | None,
        typer.Option(help="Compare a worker's own receipts too: its home.", file_okay=False),
    ] = None,
) -> None:
    """Check a run's public log: every audit that was drawn happened, none was invented, no secret was exchanged.

    Ends with exit code 1, and names the claim, if the log breaks the run's own rules.
    """
    import tempfile

    from verify.draws import check_draws
    from worker.public_files import believe, read_public_log
    from worker.receipts import claim_receipts

    with tempfile.TemporaryDirectory(prefix="commonweight-draws-") as folder:
        files = _public_files(public, Path(folder))
        trust = believe(files, run_id(run))
        entries, signed = read_public_log(files, trust)
    receipts = () if home is None else claim_receipts(home.absolute(), trust.run)
    report = check_draws(entries, trust.config.verification, trust.config.training, receipts)
    typer.echo(printable(f"run {trust.config.name!r} ({trust.run[:12]}): the log holds"))
    for line in _draw_lines(report, len(entries), signed, with_home=home is not None):
        typer.echo(line)
    if run is None:
        typer.echo("The run id was read from the files themselves; give the join string with --run to be sure of it.")


def _draw_lines(report: "DrawReport", entries: int, signed: int, *, with_home: bool) -> Sequence[str]:
    settled = report.drawn - report.audited
    early = f", {settled} settled before (replicas, too late for any merge, of a banned owner)" if settled else ""
    rows = {
        "log": f"{entries} entries, chained; {signed} of them under a signed manifest",
        "epochs": f"{report.epochs}, of which {report.revealed} are revealed: each secret is the promised one",
        "claims": f"{report.claims}, each with the probability of its owner's record; {report.delivered} with bytes",
        "drawn": f"{report.drawn} in revealed epochs, newcomers' included; {report.audited} of them audited{early}",
        "audits": ", ".join(f"{count} {reason}" for reason, count in report.audits.items()) or "none",
        "run again": f"{report.replicas} units by volunteers, {report.replays} by auditors: "
        f"{100 * report.overhead:.1f} % on top of the work itself",
        "refuted": str(report.refuted),
    }
    if with_home:
        later = f"; {report.unlogged} are of claims that the log does not reach yet" if report.unlogged else ""
        rows["own"] = f"{report.receipts} receipts agree with the log{later}"
    return [f"  {name:<10} {words}" for name, words in rows.items()]


# --- replay ----------------------------------------------------------------------------------------------------


@app.command()
def replay(
    unit: Annotated[
        str, typer.Argument(metavar="UNIT", help="8 or more hex digits of a unit (or of an own claim), or ROUND/INDEX.")
    ],
    public: Annotated[
        str | None, typer.Option(metavar="DIR|URL", help="The run's directory, a mirror, or its public address.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(help="The run's join string; default: of the run that was last worked for.", metavar="TOKEN"),
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="The worker's home, for its own deltas and its cache.", file_okay=False)
    ] = None,
    delta: Annotated[
        Path | None, typer.Option(help="Judge this file instead of the unit's known delta.", dir_okay=False)
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What to train on; auto takes a CUDA GPU if there is one.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads for training; all if not given.", min=1)] = None,
    components: Components = None,
) -> int:
    """Repeat a verdict: run a unit again on this machine, and compare the delta that was claimed for it.

    Takes your own delta of the unit if it is kept, else the one that the run merged. Exit code 0 if it is confirmed, 1
    if it is refuted.
    """
    from commonweight.cli.homes import default_home
    from protocol.assignment import unit_steps
    from protocol.documents import UnitId
    from worker import evidence as finding
    from worker.library import Needs
    from worker.machine import trainer_version
    from worker.public_files import fetch_materials, newest_checkpoint
    from worker.receipts import read_receipts

    place_of_home = (home or default_home()).absolute()
    files, trust = _run_of(unit, public, join, place_of_home)
    receipts = read_receipts(place_of_home, trust.run)
    place = finding.find_unit(unit, receipts, trust, newest_checkpoint(files, trust) + 1)
    evidence = _evidence(place, receipts, files, trust, delta)
    finding.check_evidence(evidence)
    typer.echo(f"unit {place.unit[:12]}: round {place.round}, index {place.index}, of run {trust.run[:12]}")
    typer.echo(printable(f"delta: {evidence.source}"))
    for note in finding.missing_own(place, receipts, evidence):
        typer.echo(note)
    needs = Needs.of_unit(trust.config, place.round, place.index)
    materials = replace(fetch_materials(files, trust, needs), networks=networks_in(components))
    found, own = _judged(place, evidence, trust, materials, device, threads)
    if skipped := sum(map(len, materials.without)):
        typer.echo(f"without {skipped:,} samples of its shards, which were taken down before its round")
    steps = unit_steps(trust.config, UnitId(place.unit))
    typer.echo(f"ran {steps} steps in {own.seconds:.1f} s with {trainer_version()}")
    for line in _verdict_lines(found, own, evidence, trust.config.verification):
        typer.echo(printable(line))
    return 0 if found.finding == "confirmed" else REFUTED


def _run_of(unit: str, public: str | None, join: str | None, home: Path) -> "tuple[PublicFiles, RunTrust]":
    """Return the files and the trust of the run that is meant: as told, else the one that this home worked for."""
    import asyncio

    from protocol.join import JoinString
    from worker.home import WorkerHome
    from worker.public_files import believe, join_run
    from worker.receipts import LEAST_DIGITS, read_receipts

    if public is not None:
        files = _public_files(public, home)
        return files, believe(files, None if join is None else JoinString.parse(join).run)
    if join is not None:
        return asyncio.run(join_run(JoinString.parse(join), home))
    joins = WorkerHome(home).joins()
    if len(joins) > 1 and len(unit) >= LEAST_DIGITS:
        joins = {
            run: token
            for run, token in joins.items()
            if any(receipt.unit.startswith(unit.lower()) for receipt in read_receipts(home, run))
        }
    if len(joins) != 1:
        raise UsageError("Which run? Give its join string with --join, or its directory or address with --public.")
    return asyncio.run(join_run(next(iter(joins.values())), home))


def _evidence(
    place: "UnitPlace",
    receipts: "Sequence[Receipt]",
    files: "PublicFiles",
    trust: "RunTrust",
    delta: Path | None,
) -> "Evidence":
    from worker import evidence as finding

    own = finding.own_evidence(place, receipts)
    if delta is not None:
        return finding.given_evidence(place, delta, trust.config, own)
    found = own or finding.public_evidence(place, files, trust)
    if found is None:
        raise UsageError(
            f"No delta of unit {place.unit[:12]} is at hand: this home keeps none of it (any more), and none was "
            "merged. Give one with --delta."
        )
    return found


def _judged(
    place: "UnitPlace",
    evidence: "Evidence",
    trust: "RunTrust",
    materials: "Materials",
    device: str,
    threads: int | None,
) -> "tuple[Found, Replay]":
    from verify.hearing import heard_by_trainers, refuse_unnamed
    from worker import referee
    from worker.hardware import resolve_device, resolve_threads
    from worker.trainer import prepare

    config = trust.config
    refuse_unnamed(config, named=materials.networks is not None)
    typer.echo("starting torch")
    target = resolve_device("cpu" if device == "cpu" else "cuda" if device == "cuda" else "auto")
    prepare(target, resolve_threads(threads))
    if heard := heard_by_trainers(config):
        from verify.networks import encode_for

        typer.echo(printable(f"loading {', '.join(one.name for one in heard)} from {materials.networks}"))
        encode_for(config, materials.networks, target)  # kept, so that the time below is of the unit alone
    own = referee.replay(config, place.round, place.unit, materials, device=target, on_step=_show_step)
    return referee.judge_file(config, place.unit, evidence.claimed, evidence.path, own), own


def _show_step(step: int, steps: int, loss: float) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\rstep {step} of {steps}, loss {loss:.4f}", err=True, nl=step == steps)


def _verdict_lines(found: "Found", own: "Replay", evidence: "Evidence", rules: "Verification") -> Sequence[str]:
    from worker.referee import trail_agrees

    if found.problem:
        return [f"refuted: {found.problem}"]
    trail = "not known here"
    if evidence.trail_root is not None:
        same = trail_agrees(evidence.trail_root, own)
        trail = "the same, bit for bit" if same else "another, as on most other machines"
    confirmed = found.finding == "confirmed"
    words = (
        "confirmed: running the unit again gives this delta, within what honest machines differ by"
        if confirmed
        else "refuted: running the unit again does not give this delta"
    )
    return [
        f"  least raw difference  {found.raw_difference:<12.3g} at most {rules.tolerance:g}",
        f"  decoded difference    {found.code_difference:<12.3g} at most {rules.code_tolerance:g}",
        f"  trail                 {trail}",
        words,
    ]


# --- policy and calibration ------------------------------------------------------------------------------------


@app.command()
def policy(
    directory: Annotated[
        Path | None, typer.Argument(metavar="RUN_DIR", help="A run's directory; its signed rules are assessed.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A verification setting to try out; repeatable."),
    ] = None,
) -> None:
    """Say what an audit policy lets through: poisons merged before they are caught, and what auditing costs."""
    from verify.policy import assess

    rules = _rules(directory, settings or [])
    if rules.mode == "none":
        raise UsageError(
            "This run replays nothing (verification.mode is none): nothing limits what a poisoner gets in."
        )
    for line in _policy_lines(rules, assess(rules)):
        typer.echo(line)


def _rules(directory: Path | None, overrides: list[str]) -> "Verification":
    if directory is None:
        from coordinator.settings import Settings
        from coordinator.signed import verification_of

        return verification_of(Settings.parse("", overrides))
    if overrides:
        raise UsageError("A run's rules are signed and cannot be changed; give --set without a directory.")
    from worker.public_files import DirectoryFiles, believe

    return believe(DirectoryFiles(public_directory(directory)), None).config.verification


def _policy_lines(rules: "Verification", report: "PolicyReport") -> Sequence[str]:
    floor, sampled = (100 * share / 2**24 for share in (rules.floor, rules.referee_share))
    words = f"probation {rules.probation} audits, floor {floor:.3g} %, full influence after {rules.ramp} in a row"
    lines = [
        f"{words}, a referee for {sampled:.3g} % of agreements",
        "",
        f"{'a poisoner who starts':<34}  {'at once':>12}  {'as a sleeper':>12}",
    ]
    pair = (report.at_once, report.sleeper)
    for words, values in (
        ("after audits passed", [f"{who.starts_at:,}" for who in pair]),
        ("which takes honest units", [f"{who.honest_units:,.0f}" for who in pair]),
        ("is audited with probability", [f"{100 * who.audit_share:.1f} %" for who in pair]),
        ("and counts, unaudited", [f"{100 * who.influence:.0f} %" for who in pair]),
        ("gets merged until caught, expected", [f"{who.merged:.1f}" for who in pair]),
        ("  in 99 of 100 cases at most", [f"{who.merged_99:,}" for who in pair]),
        ("  expected, by its influence", [f"{who.influence_merged:.1f}" for who in pair]),
        ("  per honest unit that it costs", [f"{who.poison_per_honest_unit:.3f}" for who in pair]),
    ):
        lines.append(f"{words:<34}  {values[0]:>12}  {values[1]:>12}")
    lines += ["", f"{'an honest owner':<34}  {'audited':>12}  {'extra work':>12}  {'share of all':>12}"]
    for cost in report.overhead:
        words = "in the long run" if cost.units is None else f"in its first {cost.units:,} units"
        lines.append(
            f"{words:<34}  {100 * cost.audited:>10.1f} %  {100 * cost.extra_compute:>10.1f} %  "
            f"{100 * cost.share_of_compute:>10.1f} %"
        )
    lines += ["", "A new key starts again at probation. What a banned owner had merged is audited back and taken out."]
    return lines


@app.command()
def calibrate(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A run's directory, or a mirror of its public one.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Where the evidence goes.")] = Path(
        "calibration.json"
    ),
    units: Annotated[
        int, typer.Option(min=1, help="Units to measure; 3 show the magnitude, 40 make some thousand honest pairs.")
    ] = 3,
    components: Components = None,
) -> None:
    """Measure what honest machines and cheats differ by on a run's own units, and propose the run's tolerances.

    Trains each unit in every way that this machine has (threads, instruction sets, kernels, batch splits) and once for
    every cheat. `commonweight coordinator init --calibration FILE` takes what it writes.
    """
    from diloco.checkpoint import TensorFile
    from protocol import layout
    from protocol.documents import payload_of
    from verify.calibration import calibrate as measure
    from worker.durable import write_durably
    from worker.library import Needs
    from worker.public_files import DirectoryFiles, believe, fetch_materials, newest_checkpoint, taken_down_from

    public = public_directory(directory)
    files = DirectoryFiles(public)
    trust = believe(files, None)
    newest = newest_checkpoint(files, trust)
    round_number = min(newest + 1, trust.config.rounds.planned)
    base = fetch_materials(files, trust, Needs(round=round_number, shards=())).base
    shards = {shard.sha256: public / layout.shard_path(shard.sha256) for shard in trust.config.data.shards}
    typer.echo(f"measuring {units} units from checkpoint {round_number - 1}; each is trained in several ways")
    found = measure(
        trust.config,
        TensorFile.open(base).load(),
        shards,
        units,
        _show_unit,
        round_number=round_number,
        without=taken_down_from(files, trust, round_number),
        networks=networks_in(components),
    )
    write_durably(out.absolute(), payload_of(found))
    typer.echo(f"{found.pairs} honest pairs on {found.machine}, torch {found.torch}, {found.precision}")
    for name, spread, value, margins in (
        ("raw", found.least_raw, found.tolerance, found.raw_margins),
        ("decoded", found.code, found.code_tolerance, found.code_margins),
    ):
        typer.echo(
            f"{name:<8} honest at most {spread.largest:.2g}; tolerance {value:g}, {margins.honest:.3g} times that, and "
            f"{margins.cheat:.3g} times below the smallest cheat"
        )
    if not (found.raw_margins.clear and found.code_margins.clear):
        typer.echo("WARNING: honest work and cheats are too much alike here; longer units or fp32 pull them apart.")
    typer.echo(f"wrote {out}; use it with `commonweight coordinator init NEW_DIR --calibration {out}`")


def _show_unit(progress: "CalibrationProgress") -> None:
    typer.echo(
        f"unit {progress.unit} of {progress.units}: {progress.pairs} honest pairs, least raw difference at most "
        f"{progress.least_raw:.2g}; smallest cheat {progress.cheat_least_raw:.2g}"
    )


def _public_files(place: str, home: Path) -> "PublicFiles":
    """Return the files of a directory or a URL that a person named; `home` holds the cache of the latter."""
    from worker.home import WorkerHome
    from worker.public_files import DirectoryFiles, site_files

    if place.startswith(("http://", "https://")):
        # Whoever types an address means it, be it inside a private network.
        return site_files(place, home, allow_private=True)
    return DirectoryFiles(public_directory(Path(place)), made=WorkerHome(home).cache / "made")
