"""`commonweight coordinator`: make a run, check its settings, serve it, look at it, back it up."""

import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from commonweight.cli.networks import Components, networks_in
from commonweight.cli.takedown import takedown
from protocol.errors import DirectoryNotEmpty, NetworksMissing, UsageError
from protocol.printing import counted, printable

if TYPE_CHECKING:
    from commonweight.data.dataset import Dataset
    from coordinator.directory import RunDirectory, RunIdentity
    from coordinator.settings import Settings
    from protocol.documents import DataSet, RunConfig

HELDOUT: Final = "heldout.safetensors"
_HEX_SEED: Final = 64

app = typer.Typer(
    help="Run a coordinator: the server that hands out units and publishes checkpoints.", no_args_is_help=True
)
config_app = typer.Typer(help="Look at a run's settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.command()(takedown)

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The run's directory.")]


@app.command()
def init(
    directory: Dir,
    data: Annotated[
        str,
        typer.Option(
            help='"digits", a data set that `commonweight data prepare` has made, or a folder of shards '
            f"(*.safetensors) with {HELDOUT} among them."
        ),
    ] = "digits",
    curator: Annotated[
        str | None, typer.Option(help="The public key, 64 hex digits, that must have signed for a prepared data set.")
    ] = None,
    shards: Annotated[
        int, typer.Option(min=1, help="Training shards to cut the digits into; other data has its own.")
    ] = 8,
    root_key: Annotated[
        Path | None, typer.Option(help="Where the run's root key goes; default: beside DIR, as DIR-root.pem.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting that wins over run.toml, such as training.steps=40; repeatable.",
        ),
    ] = None,
    seed: Annotated[
        str | None, typer.Option(help="64 hex digits that the first weights come from; default: drawn.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="What `commonweight verify calibrate` wrote; sets the tolerances and publishes the evidence."
        ),
    ] = None,
    template_only: Annotated[
        bool,
        typer.Option(
            "--template-only", help="Only write run.toml, every setting explained, to be edited before the run is made."
        ),
    ] = False,
) -> None:
    """Make a run in DIR: run.toml (if there is none), keys, the signed run config, data and checkpoint 0."""
    from coordinator.clock import WallClock
    from coordinator.directory import RunDirectory
    from coordinator.founding import found, write_settings
    from coordinator.prepared_data import suggested_settings
    from coordinator.settings import Settings

    run = RunDirectory(directory)
    if run.holds_run:
        raise DirectoryNotEmpty(f"{run.root} holds a run already; nothing was changed.")
    dataset = _dataset(data, curator)
    overrides = [*_calibrated(calibration), *_described(dataset), *(settings or [])]
    suggested = {} if dataset is None else suggested_settings(dataset.manifest)
    if run.settings_file.exists():
        chosen = Settings.load(run.settings_file, overrides, suggested)
    else:
        chosen = Settings.parse("", overrides, suggested)
    if template_only:
        run.root.mkdir(parents=True, exist_ok=True)
        before = run.settings_file.read_bytes() if run.settings_file.exists() else None
        write_settings(run, chosen)
        kept = before is not None and run.settings_file.read_bytes() == before
        what = "was there already and is left as it is" if kept else "is written"
        more = "" if data == "digits" else f" --data {shlex.quote(data)}"
        typer.echo(f"{run.settings_file} {what}; edit it, then: commonweight coordinator init {directory}{more}")
        return
    words = run.settings_file.read_bytes() if run.settings_file.exists() else None
    key_file = (root_key or run.root.with_name(f"{run.root.name}-root.pem")).absolute()
    # Beside DIR, wherever DIR is to be; a place that somebody names must be there.
    place = _folder_made(key_file.parent) if root_key is None else nullcontext()
    with _shards(data, shards, dataset) as (training, heldout), place:
        identity = found(
            run,
            chosen,
            shards=training,
            heldout=heldout,
            root_key_out=key_file,
            seed=None if seed is None else _seed(seed),
            calibration=None if calibration is None else calibration.read_bytes(),
            dataset=None if dataset is None else dataset.signed,
            now_ms=WallClock().now_ms(),
        )
    rewritten = words is not None and words != run.settings_file.read_bytes()
    _show_new_run(directory, run, identity, chosen, key_file, rewritten=rewritten)


@config_app.command("check")
def config_check(directory: Dir) -> None:
    """Check run.toml, and, once the run is made, whether the signed settings are still the same."""
    from coordinator.directory import RunDirectory
    from coordinator.settings import Settings, describe_settings
    from coordinator.signed import differences
    from protocol.errors import ConfigInvalid

    run = RunDirectory(directory)
    settings = Settings.load(run.settings_file)
    typer.echo(f"{run.settings_file}: {len(describe_settings())} settings, all valid")
    if not run.holds_run:
        typer.echo(f"no run yet; `commonweight coordinator init {directory}` makes one with these settings")
        return
    trust = run.trust()
    found = differences(settings, trust.config)
    if found:
        what = "1 setting" if len(found) == 1 else f"{len(found)} settings"
        opening = (
            f"run.toml differs in {what} from the run config that the root key signed. "
            "The signed one holds; only [server] and [storage] may change:"
        )
        raise ConfigInvalid("\n  ".join([opening, *map(str, found)]))
    typer.echo(f"run {trust.run[:12]}: run.json says the same, and its signatures hold")


@app.command()
def serve(
    directory: Dir,
    auditor: Annotated[
        bool, typer.Option(help="Start the run's own auditor too; without it newcomers' work waits for another one.")
    ] = True,
    auditor_threads: Annotated[
        int | None, typer.Option(help="CPU threads of that auditor; all if not given.", min=1)
    ] = None,
    components: Components = None,
) -> int:
    """Serve the run until Ctrl-C or SIGTERM."""
    from coordinator.directory import RunDirectory
    from coordinator.serve import serve as serve_run

    run = RunDirectory(directory)
    networks = networks_in(components)

    def command(join: str) -> list[str]:
        keys = ["--key", str(run.auditor_key), "--delegation", str(run.auditor_delegation)]
        threads = [] if auditor_threads is None else ["--threads", str(auditor_threads)]
        heard = [] if networks is None else ["--components", str(networks)]
        start = [sys.executable, "-P", "-m", "commonweight", "auditor", "start", "--join", join, "--json"]
        return [*start, *keys, "--home", str(run.auditor_home), *threads, *heard]

    wanted = auditor and run.config().verification.mode == "replay" and run.auditor_key.exists()
    if wanted:
        _check_auditor_s_networks(run.config(), networks)
    return serve_run(run, auditor=command if wanted else None)


@app.command()
def delegate(
    directory: Dir,
    root_key: Annotated[Path, typer.Option(help="The run's root key, for a moment only.")],
    auditor: Annotated[str, typer.Option(help="The auditor's public key, as `commonweight auditor init` prints it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the delegation goes.")] = Path("delegation.json"),
) -> None:
    """Let another auditor judge claims: appeals need a second one."""
    from coordinator.clock import WallClock
    from coordinator.directory import RunDirectory, write_file
    from coordinator.founding import delegate_auditor
    from protocol.keys import PrivateKey

    signed = delegate_auditor(RunDirectory(directory), PrivateKey.load(root_key), auditor, now_ms=WallClock().now_ms())
    write_file(out.absolute(), signed)
    typer.echo(
        f"wrote {out}; give it to the auditor as HOME/delegation.json, and move {root_key} off this machine again"
    )


@app.command()
def status(
    directory: Dir, as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False
) -> None:
    """Say where the run stands: round, units, members, validation loss. Works whether it is served or not."""
    from coordinator.directory import RunDirectory
    from coordinator.status import read_status

    now = read_status(RunDirectory(directory))
    typer.echo(json.dumps(now.to_json(), sort_keys=True) if as_json else "\n".join(now.lines()))


@app.command()
def backup(
    directory: Dir, target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new directory outside of DIR.")]
) -> None:
    """Copy the run to TARGET, also while it is served. TARGET holds secret keys: keep it as safe as DIR."""
    from coordinator.backup import backup as back_up
    from coordinator.directory import RunDirectory
    from coordinator.forecast import show_bytes

    report = back_up(RunDirectory(directory), target)
    typer.echo(f"backed up run {report.run[:12]} to {target}: {report.files:,} files, {show_bytes(report.size)}")
    typer.echo("it holds the coordinator's secret keys (not the root key): keep it as safe as the run itself")


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="What `backup` wrote.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
) -> None:
    """Copy a backup to DIR, after checking every file's SHA-256."""
    from coordinator.backup import restore as bring_back
    from coordinator.directory import RunDirectory

    report = bring_back(source, RunDirectory(directory))
    typer.echo(f"restored run {report.run[:12]} to {directory}: {report.files:,} files, every checksum right")
    typer.echo("serve it only if the old coordinator is gone: two of one run would contradict each other")


@app.command()
def renew(
    directory: Dir,
    root_key: Annotated[Path, typer.Option(help="The run's root key, for a moment only.")],
) -> None:
    """Let the root key delegate the coordinator key for another two years; restart `serve` afterwards."""
    from coordinator.clock import WallClock
    from coordinator.directory import RunDirectory
    from coordinator.founding import renew as renew_delegation
    from protocol.keys import PrivateKey

    delegation = renew_delegation(RunDirectory(directory), PrivateKey.load(root_key), now_ms=WallClock().now_ms())
    until = datetime.fromtimestamp(delegation.not_after_ms / 1000, UTC).date()
    typer.echo(f"the coordinator key may act until {until}; move {root_key} off this machine again")


def _check_auditor_s_networks(config: "RunConfig", networks: Path | None) -> None:
    """Refuse what the run's own auditor would refuse, over and over, in a log that nobody reads."""
    from verify.hearing import heard_by_trainers

    if not heard_by_trainers(config):
        return  # torch takes seconds to load
    from verify.networks import check_networks

    try:
        check_networks(config, networks)
    except NetworksMissing as error:
        raise NetworksMissing(
            f"{error.message} This is about the run's own auditor; with --no-auditor, none is started here."
        ) from None


def _calibrated(path: Path | None) -> list[str]:
    """Return the settings that a calibration brings."""
    if path is None:
        return []
    from protocol.canonical import sha256_hex
    from verify.calibration import read_calibration

    raw = path.read_bytes()
    found = read_calibration(raw)
    return [
        f"verification.tolerance={found.tolerance!r}",
        f"verification.code_tolerance={found.code_tolerance!r}",
        f"verification.evidence_sha256={sha256_hex(raw)}",
    ]


def _seed(text: str) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(text) != _HEX_SEED or not raw:
        raise UsageError(f"--seed is {text[:80]!r}; it must be 64 hex digits.")
    return raw


def _dataset(data: str, curator: str | None) -> "Dataset | None":
    """Return the prepared data set that `--data` names, every byte checked; None for something else."""
    from commonweight.data.layout import MANIFEST

    if data == "digits" or not (Path(data) / MANIFEST).is_file():
        if curator is not None:
            raise UsageError(f"--curator is given, but nobody has signed for {data}: there is no {MANIFEST} in it.")
        return None
    from commonweight.data.dataset import check_shards, open_dataset
    from protocol.keys import PublicKey

    dataset = open_dataset(Path(data), None if curator is None else PublicKey.from_hex(curator))
    check_shards(dataset)
    return dataset


def _described(dataset: "Dataset | None") -> list[str]:
    """Return the settings that a prepared data set brings."""
    if dataset is None:
        return []
    signed = dataset.manifest
    return [f"data.name={signed.name}", f"data.source={signed.source}", f"data.licence={signed.licence}"]


@contextmanager
def _shards(data: str, count: int, dataset: "Dataset | None") -> "Iterator[tuple[list[Path], Path]]":
    """Give the training shards and the held-out one; digits are written to a temporary folder."""
    if dataset is not None:
        signed = dataset.manifest
        yield [dataset.path(shard) for shard in signed.shards], dataset.path(signed.heldout)
        return
    if data == "digits":
        from commonweight.digits import write_digits

        with tempfile.TemporaryDirectory(prefix="commonweight-") as folder:
            yield write_digits(Path(folder), shards=count)
        return
    folder_given = Path(data)
    heldout = folder_given / HELDOUT
    if not heldout.is_file():
        raise UsageError(
            f'--data is {data!r}; it must be "digits", a data set that `commonweight data prepare` has made, or a '
            f"folder of shards with {HELDOUT} among them."
        )
    yield sorted(path for path in folder_given.glob("*.safetensors") if path != heldout), heldout


@contextmanager
def _folder_made(folder: Path) -> Iterator[None]:
    """Make a folder if it is not there; take it away again, as long as it is empty, if what follows fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def _show_new_run(
    given: Path, run: "RunDirectory", identity: "RunIdentity", settings: "Settings", key_file: Path, *, rewritten: bool
) -> None:
    from coordinator.forecast import forecast, show_bytes
    from verify.hearing import components_option

    needed = components_option(identity.config)
    storage = settings.storage
    expected = forecast(identity.config, retain_rounds=storage.retain_rounds, snapshot_every=storage.snapshot_every)
    free = shutil.disk_usage(run.root).free
    until = datetime.fromtimestamp(identity.delegation.not_after_ms / 1000, UTC).date()
    join = settings.server.join_string(identity.run)
    hint = "" if join else "     (`serve` prints the token)"
    lines = [
        f'made run "{identity.config.name}" in {run.root}',
        f"run id: {identity.run}",
        f"data: {_show_data(identity.config.data)}",
        *expected.lines(),
    ]
    if rewritten:
        lines.append("run.toml says now what the run uses, every setting of it; your own words are in run.toml.old")
    if expected.disk_in_all > free:
        lines.append(
            f"WARNING: only {show_bytes(free)} are free in {run.root}; the run will need "
            f"{show_bytes(expected.disk_in_all)}. Set storage.retain_rounds, or use another disk."
        )
    lines += [
        "",
        f"ROOT KEY: {key_file}",
        "  Move this file off this machine now, to a place that is not connected, and keep a second copy. Nothing here",
        f"  needs it until {until}, when the coordinator's key must be renewed. Who has it controls the run; without",
        "  it the run ends then.",
        "",
        "next:",
        f"  commonweight coordinator serve {given}{needed}",
        f"  commonweight worker start --join {join or 'TOKEN'}{needed}{hint}",
    ]
    typer.echo("\n".join(printable(line) for line in lines))


def _show_data(data: "DataSet") -> str:
    samples = sum(shard.samples for shard in data.shards)
    curated = "" if data.curator is None else f", signed by the curator {data.curator}"
    told = f"{samples:,} samples in {counted(len(data.shards), 'shard')}, {data.heldout.samples:,} held out"
    return f"{data.name}, {told}{curated}"
