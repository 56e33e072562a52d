"""A real run for tests: founded, served by real processes, on free ports, small enough to train in a second."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from typer.testing import CliRunner

from commonweight.cli.main import app
from coordinator.directory import RunDirectory
from coordinator.serve import Serving, read_serving
from protocol.join import JoinString

SMALL = (
    "training.steps=3",
    "training.batch=4",
    "training.segment_steps=2",
    "training.warmup_steps=1",
    "rounds.shards_per_unit=1",
    "storage.reserve_mib=1",
    "verification.mode=none",
    "outer.ema_decay=0.9",
)
"""Settings of a run whose units train in a moment, and are taken as they come."""


def free_port() -> int:
    """Return a TCP port that nobody uses now.

    It is below those that the kernel gives to whoever connects to something: a coordinator that is killed and starts
    again must find its port free, however many other tests talk meanwhile.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def command(*arguments: str) -> list[str]:
    """Return the command line of `commonweight ARGUMENTS` in this environment."""
    return [sys.executable, "-P", "-m", "commonweight", *arguments]


def environment() -> dict[str, str]:
    """Return an environment in which every process uses one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "the condition") -> Any:
    """Wait until `condition()` is true and return its value; fail after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true within {seconds} s")


class LiveRun:
    """A run's directory and the processes that serve it."""

    def __init__(self, folder: Path, settings: Sequence[str] = (), *, data: Path | None = None) -> None:
        self.folder = folder
        self.directory = RunDirectory(folder / "run")
        ports = (f"server.port={free_port()}", f"server.public_port={free_port()}")
        arguments = ["coordinator", "init", str(self.directory.root), "--root-key", str(folder / "root.pem")]
        if data is not None:
            arguments += ["--data", str(data)]
        for setting in (*SMALL, *ports, "server.bind=127.0.0.1", "server.advertised_host=127.0.0.1", *settings):
            arguments += ["--set", setting]
        # In this process, which has torch loaded already: founding is not what these tests are about.
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.log = folder / "coordinator.log"

    def __enter__(self) -> "LiveRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *more: str, **extra_environment: str) -> "LiveRun":
        """Serve, with further options if need be, and wait until everything answers."""
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(
                command("coordinator", "serve", str(self.directory.root), *more),
                env={**environment(), **extra_environment},
                stdout=log,
                stderr=log,
            )
        until(lambda: self.serving is not None or self._ended(), 90, "serving")
        assert self.serving is not None, self.log.read_text()
        return self

    def _ended(self) -> bool:
        return self.supervisor is None or self.supervisor.poll() is not None

    @property
    def serving(self) -> Serving | None:
        """Where the run is served, if it is."""
        return read_serving(self.directory)

    @property
    def join(self) -> JoinString:
        """The join string."""
        serving = self.serving
        assert serving is not None
        return JoinString.parse(serving.join)

    @property
    def public_url(self) -> str:
        """The base of the public files."""
        serving = self.serving
        assert serving is not None
        return serving.public_url

    def pid(self, process: str) -> int:
        """Return the process id of `supervisor`, `control_process`, `settler` or `public`."""
        serving = self.serving
        assert serving is not None
        return serving.pids[process]

    def kill_all(self) -> None:
        """SIGKILL the supervisor; its children must notice and end by themselves."""
        assert self.supervisor is not None
        serving = self.serving
        self.supervisor.kill()
        self.supervisor.wait()
        if serving is not None:
            until(lambda: not any(_alive(pid) for pid in serving.pids.values()), 20, "the children's end")
        (self.directory.root / "serving.json").unlink(missing_ok=True)

    def stop(self) -> int:
        """Ask the coordinator to stop, and wait for its end."""
        if self.supervisor is None or self.supervisor.poll() is not None:
            return 0
        self.supervisor.send_signal(signal.SIGTERM)
        return self.supervisor.wait(60)

    def published(self, checkpoint: int) -> bool:
        """Whether a checkpoint's manifest is in its place."""
        return (self.directory.checkpoint(checkpoint) / "manifest.json").exists()

    def await_checkpoint(self, checkpoint: int, seconds: float = 120) -> Path:
        """Wait for a checkpoint and return its directory."""
        until(lambda: self.published(checkpoint), seconds, f"checkpoint {checkpoint}")
        return self.directory.checkpoint(checkpoint)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


class LiveWorker:
    """A real worker process."""

    def __init__(self, run: LiveRun, name: str, *more: str, **extra_environment: str) -> None:
        self.home = run.folder / name
        self.output = run.folder / f"{name}.jsonl"
        self.errors = run.folder / f"{name}.err"
        arguments = ["worker", "start", "--join", str(run.join), "--home", str(self.home), "--accept-terms", "--json"]
        arguments += ["--device", "cpu", "--threads", "1", *more]
        with self.output.open("ab") as output, self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                command(*arguments), env={**environment(), **extra_environment}, stdout=output, stderr=errors
            )

    def __enter__(self) -> "LiveWorker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the events that it has written so far."""
        found = [json.loads(line) for line in self.output.read_bytes().splitlines() if line.endswith(b"}")]
        return [event for event in found if name is None or event["event"] == name]

    def await_event(self, name: str, seconds: float = 90) -> dict[str, Any]:
        """Wait for the first event of a kind."""
        until(
            lambda: self.events(name) or self.process.poll() is not None,
            seconds,
            f"event {name} (so far {[event['event'] for event in self.events()]})",
        )
        found = self.events(name)
        assert found, f"the worker ended without {name}: {self.errors.read_text()}"
        return found[0]

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end; return its exit code."""
        return self.process.wait(seconds)
