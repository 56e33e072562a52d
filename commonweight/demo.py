"""The demo: a whole run on one machine, every process, socket, signature and file real.

A coordinator with its auditor and a few volunteers, each a process of its own, train a small MMDiT on scanned digits
over TLS on loopback, while hostile volunteers try to spoil it; then the newest published checkpoint draws, a classifier
says how well, and the public log says what became of the hostile.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Final

from commonweight.demo_story import Hostile
from commonweight.demo_view import DemoState, DemoView
from coordinator.directory import RunDirectory
from coordinator.serve import Serving, read_serving
from protocol import layout
from protocol.errors import DirectoryNotEmpty, LocalProblem, TryLater

START_SECONDS: Final = 120.0
MEASURE_SECONDS: Final = 60.0
MARKER: Final = ".commonweight-demo"
HONEST_UNITS: Final = 4
"""What a hostile volunteer of the demo does honestly first: its probation, and one unit more."""
PORTS: Final = ("server.port=0", "server.public_port=0")
"""Any free ports: another coordinator, or another demo, may be running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the demo is asked to do. Hostile volunteers come beside the honest ones and are numbered after them."""

    folder: Path
    volunteers: int
    hostile: int
    attack: str
    rounds: int
    seed: int
    limit_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """What the demo's training left behind."""

    directory: RunDirectory
    checkpoint: Path
    state: DemoState
    hostile: tuple[Hostile, ...]
    seconds: float


def prepare_folder(folder: Path) -> None:
    """Make an empty folder for the demo; throw away an earlier demo's, but nothing else.

    Raises:
        DirectoryNotEmpty: the folder is not a demo's.
        DirectoryInUse: the earlier demo's run is being served.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise DirectoryNotEmpty(
                f"{folder} is not empty and was not made by the demo; name another folder with --out."
            )
        with RunDirectory(folder / "run").lock() if (folder / "run").is_dir() else nullcontext():
            shutil.rmtree(folder)  # an earlier demo that nobody serves
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "commonweight", *arguments]


def _environment() -> dict[str, str]:
    # Five processes share the cores; each must use one.
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def found_run(options: DemoOptions, settings: Sequence[str]) -> RunDirectory:
    """Make the run's directory with `commonweight coordinator init`, as an operator would."""
    directory = RunDirectory(options.folder / "run")
    arguments = ["coordinator", "init", str(directory.root), "--root-key", str(options.folder / "root-key.pem")]
    for setting in (
        *settings,
        f"rounds.planned={options.rounds}",
        f"rounds.units={options.volunteers + options.hostile}",
        f"rounds.min_units={options.volunteers}",
        *PORTS,
    ):
        arguments += ["--set", setting]
    done = subprocess.run(_command(*arguments), env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).removeprefix("error: ")
        raise LocalProblem(f"The demo's run could not be made: {words}")
    return directory


class Cast:
    """The demo's processes: one coordinator, honest and hostile volunteers; all of them end with the demo."""

    def __init__(self, options: DemoOptions, directory: RunDirectory) -> None:
        self._options = options
        self._directory = directory
        self._logs = options.folder / "logs"
        self._logs.mkdir()
        self.events: Queue[tuple[int, dict[str, Any]]] = Queue()
        self.coordinator: subprocess.Popen[bytes] | None = None
        self.volunteers: list[subprocess.Popen[bytes]] = []

    def start_coordinator(self) -> Serving:
        """Start `commonweight coordinator serve` and wait until it answers."""
        with (self._logs / "coordinator.log").open("wb") as log:
            self.coordinator = subprocess.Popen(
                _command("coordinator", "serve", str(self._directory.root), "--auditor-threads", "1"),
                env=_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            serving = read_serving(self._directory)
            if serving is not None:
                return serving
            if self.coordinator.poll() is not None:
                break
            time.sleep(0.1)
        raise LocalProblem(f"The coordinator did not start; its words are in {self._logs / 'coordinator.log'}.")

    def start_volunteer(self, number: int, join: str) -> None:
        """Start `commonweight worker start` in a home of its own, and read its events."""
        arguments = ["--join", join, "--home", str(self._options.folder / "volunteers" / str(number))]
        arguments += ["--accept-terms", "--json", "--device", "cpu", "--threads", "1"]
        with (self._logs / f"volunteer-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                _command("worker", "start", *arguments), env=_environment(), stdout=subprocess.PIPE, stderr=log
            )
        self._attend(number, process)

    def start_hostile(self, number: int, join: str) -> None:
        """Start a volunteer that works honestly until it is trusted, and forges from then on."""
        arguments = ["--join", join, "--home", str(self._options.folder / "volunteers" / str(number))]
        arguments += ["--attack", self._options.attack, "--honest-units", str(HONEST_UNITS)]
        with (self._logs / f"volunteer-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "commonweight.hostile", *arguments],
                env=_environment(),
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._attend(number, process)

    def _attend(self, number: int, process: subprocess.Popen[bytes]) -> None:
        self.volunteers.append(process)
        threading.Thread(target=self._read, args=(number, process), daemon=True).start()

    def _read(self, number: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            self.events.put((number, event))
        self.events.put((number, {"event": "exited", "code": process.wait()}))

    def stop(self) -> None:
        """Ask everybody to stop; kill who does not."""
        everybody = [process for process in (*self.volunteers, self.coordinator) if process is not None]
        for process in everybody:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in everybody:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def train(options: DemoOptions, settings: Sequence[str], view: DemoView) -> DemoRun:
    """Run the coordinator and the volunteers until the last planned checkpoint is published.

    Raises `LocalProblem` when a process fails, and `TryLater` when the time limit is over first.
    """
    began = time.monotonic()
    prepare_folder(options.folder)
    view.say("founding the run")
    directory = found_run(options, settings)
    cast = Cast(options, directory)
    state = DemoState(rounds=options.rounds, volunteers=options.volunteers, hostile=options.hostile)
    try:
        view.say("starting the coordinator")
        serving = cast.start_coordinator()
        for number in range(1, options.volunteers + 1):
            cast.start_volunteer(number, serving.join)
        for number in range(options.volunteers + 1, options.volunteers + options.hostile + 1):
            cast.start_hostile(number, serving.join)
        view.say(f"{options.volunteers} volunteers join with {serving.join[:40]}…")
        if options.hostile:
            view.say(f"{options.hostile} more will turn hostile ({options.attack}) once they are trusted")
        _follow(cast, directory, state, view, options, until=began + options.limit_seconds)
        _await((directory.public / layout.metrics_path(options.rounds)).exists, MEASURE_SECONDS)
    finally:
        view.close()
        cast.stop()
    checkpoint = directory.public / layout.checkpoint_directory(options.rounds)
    return DemoRun(
        directory=directory,
        checkpoint=checkpoint,
        state=state,
        hostile=tuple(
            Hostile(number=number, attack=options.attack, claims=state.people[number].claims())
            for number in range(options.volunteers + 1, options.volunteers + options.hostile + 1)
        ),
        seconds=time.monotonic() - began,
    )


def _follow(
    cast: Cast, directory: RunDirectory, state: DemoState, view: DemoView, options: DemoOptions, *, until: float
) -> None:
    running = len(cast.volunteers)
    while running:
        try:
            number, event = cast.events.get(timeout=0.25)
        except Empty:
            pass
        else:
            state.take(number, event)
            if event.get("event") == "exited":
                running -= 1
                if event["code"] and number <= options.volunteers:  # a banned one may well end with an error
                    raise LocalProblem(
                        f"Volunteer {number} ended with code {event['code']}; see logs/volunteer-{number}.log."
                    )
        state.look(directory.public)
        view.show(state)
        if cast.coordinator is not None and cast.coordinator.poll() is not None:
            raise LocalProblem("The coordinator ended; see logs/coordinator.log.")
        if time.monotonic() > until:
            raise TryLater("The demo's time limit is over; a slower machine may need --limit-seconds.")


def _await(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
