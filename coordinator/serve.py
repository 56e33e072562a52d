"""`commonweight coordinator serve`: the supervisor of a run's processes.

    control    gRPC, the only writer of the database, the only holder of the coordinator's key
    public     HTTP over public/: no database, no keys
    settler    reads what strangers sent, merges, measures: no database, no keys, no port
    auditor    the run's own referee: a client like any other, with its own key; the others do without it for a while

It takes the directory's lock, makes the sockets that join the processes, says where volunteers can join once all of
them answer, and stops or restarts all three together: half a coordinator never goes on.
"""

import errno
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from coordinator.auditor_log import last_words
from coordinator.clock import WallClock
from coordinator.directory import RunDirectory, write_file
from coordinator.signed import differences
from protocol.canonical import canonical_json
from protocol.errors import CommonweightError, ConfigInvalid, DelegationInvalid, DirectoryNotARun
from protocol.join import JoinString
from protocol.limits import DAY_MS
from verify.hearing import components_option

logger = logging.getLogger(__name__)

READY_SECONDS: Final = 120.0
STOP_SECONDS: Final = 20.0
QUIET_SECONDS: Final = 600.0
MAX_WAIT_SECONDS: Final = 60.0
AUDITOR_AGAIN_SECONDS: Final = 10.0
AUDITOR_STOP_SECONDS: Final = 5.0
DELEGATION_WARNING_MS: Final = 60 * DAY_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where a run is served, as it stands in DIR/serving.json while it is."""

    join: str
    public_url: str
    pids: dict[str, int]


class _Stop(Exception):
    """A signal asked for the end."""


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    raise _Stop


class Supervisor:
    """Starts, watches and stops the processes of one run."""

    def __init__(self, directory: RunDirectory, auditor: Callable[[str], Sequence[str]] | None) -> None:
        self._directory = directory
        self._auditor_command = auditor
        self._auditor: subprocess.Popen[bytes] | None = None
        self._auditor_started = 0.0
        self._auditor_log_began = 0
        self._settings = directory.settings()
        self._identity = directory.identity()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lifeline_read, self._lifeline_write = os.pipe()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; raise what keeps it from starting at all.

        What fails after it has served is started again, for ever, a little later each time: the next morning's
        volunteers must find a coordinator even if the disk was full for a night.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _on_signal)
        served, failures = False, 0
        try:
            while True:
                began = time.monotonic()
                try:
                    self._serve_once()
                    served = True
                except (CommonweightError, OSError) as error:
                    if not served:
                        raise
                    logger.error("it could not be served: %s", error)
                failures = 1 if time.monotonic() - began > QUIET_SECONDS else failures + 1
                wait = min(0.5 * 2.0**failures, MAX_WAIT_SECONDS)
                logger.warning("starting again in %.0f s", wait)
                time.sleep(wait)
        except _Stop:
            return 0
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            self._stop()

    def _serve_once(self) -> None:
        """Start all processes and return when one of them has ended and the others were stopped."""
        try:
            self._check_port()
            with self._public_socket() as public:
                url = self._settings.server.public_url or self._url(public.getsockname()[1])
                port = self._start(public, url)
            serving = self._serving(port, url)
            write_file(
                serving_file(self._directory),
                canonical_json({"join": serving.join, "pids": serving.pids, "public_url": serving.public_url}),
            )
            needed = components_option(self._identity.config)
            print(f"ready: volunteers join with\n  commonweight worker start --join {serving.join}{needed}", flush=True)
            print(f"public files: {serving.public_url}", flush=True)
            while all(child.poll() is None for child in self._children.values()):
                self._keep_auditor(serving.join)
                time.sleep(0.2)
        finally:
            self._stop()

    def _keep_auditor(self, join: str) -> None:
        """Start the run's own auditor, and again when it has ended: without a referee newcomers' work waits."""
        if self._auditor_command is None or (self._auditor is not None and self._auditor.poll() is None):
            return
        if time.monotonic() - self._auditor_started < AUDITOR_AGAIN_SECONDS and self._auditor_started:
            return
        log_file = self._directory.auditor_home / "auditor.log"
        if self._auditor is not None:
            why = last_words(log_file, self._auditor_log_began)
            logger.warning(
                "the auditor ended with %s and is started again%s", self._auditor.returncode, f": {why}" if why else ""
            )
        self._auditor_started = time.monotonic()
        self._directory.auditor_home.mkdir(mode=0o700, exist_ok=True)
        with log_file.open("ab") as log:
            self._auditor_log_began = log.tell()
            self._auditor = subprocess.Popen(
                [*self._auditor_command(join), "--lifeline", str(self._lifeline_read)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=(self._lifeline_read,),
                start_new_session=True,
            )

    def _stop_auditor(self) -> None:
        child, self._auditor, self._auditor_started = self._auditor, None, 0.0
        if child is None:
            return
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):  # twice: at once, a unit in work is dropped
            if child.poll() is not None:
                return
            child.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(AUDITOR_STOP_SECONDS)

    def _url(self, port: int) -> str:
        return f"http://{self._settings.server.advertised_host}:{port}"

    def _check_port(self) -> None:
        """Say in a sentence, before gRPC says it in many, that the port for volunteers is taken."""
        self._bound("port", self._settings.server.port).close()

    def _public_socket(self) -> socket.socket:
        listening = self._bound("public_port", self._settings.server.public_port)
        listening.listen(256)
        return listening

    def _bound(self, setting: str, port: int) -> socket.socket:
        bind = self._settings.server.bind
        bound = socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((bind.strip("[]"), port))
        except OSError as error:
            bound.close()
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigInvalid(f"server.bind is {bind}, which is no address of this machine.") from None
            raise ConfigInvalid(
                f"server.{setting} is {port}, but {bind}:{port} can't be used ({error.strerror}); choose a free port."
            ) from None
        return bound

    def _start(self, public: socket.socket, url: str) -> int:
        """Start the three processes; return the gRPC port once all of them answer."""
        ours, theirs = socket.socketpair()
        ready_read, ready_write = os.pipe()
        root, lifeline = str(self._directory.root), str(self._lifeline_read)
        self._spawn("settler", [root, str(theirs.fileno()), lifeline], (theirs.fileno(),))
        self._spawn("public", [root, str(public.fileno()), lifeline], (public.fileno(),))
        self._spawn(
            "control_process",
            [root, str(ours.fileno()), lifeline, str(ready_write), url],
            (ours.fileno(), ready_write),
        )
        ours.close()
        theirs.close()
        os.close(ready_write)
        with os.fdopen(ready_read, "rb") as ready:
            if not select.select([ready], [], [], READY_SECONDS)[0] or not (line := ready.readline()):
                raise ConfigInvalid(
                    f"The coordinator did not come up (see above). Is server.port {self._settings.server.port} free?"
                )
        self._await_public(public.getsockname()[1])
        return int(json.loads(line)["port"])

    def _spawn(self, module: str, arguments: list[str], descriptors: tuple[int, ...]) -> None:
        self._children[module] = subprocess.Popen(
            [sys.executable, "-P", "-m", f"coordinator.{module}", *arguments],
            pass_fds=(*descriptors, self._lifeline_read),
            start_new_session=True,  # Ctrl-C goes to the supervisor alone, which stops the others in order
        )

    def _await_public(self, port: int) -> None:
        host = self._settings.server.bind.strip("[]")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            try:
                with socket.create_connection((host, port), 2) as connection:
                    connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                    if connection.recv(15).startswith(b"HTTP/"):
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise ConfigInvalid(f"The public HTTP server on port {port} did not answer.")

    def _serving(self, port: int, url: str) -> Serving:
        join = JoinString(host=self._settings.server.advertised_host, port=port, run=self._identity.run)
        self._keep_auditor(str(join))
        pids = {name: child.pid for name, child in self._children.items()} | {"supervisor": os.getpid()}
        if self._auditor is not None:
            pids["auditor"] = self._auditor.pid
        return Serving(join=str(join), public_url=url, pids=pids)

    def _stop(self) -> None:
        """Stop control first (it ends its calls), then the others; what does not end in time is killed."""
        serving_file(self._directory).unlink(missing_ok=True)
        self._stop_auditor()
        for name in ("control_process", "settler", "public"):
            child = self._children.pop(name, None)
            if child is None:
                continue
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def serve(directory: RunDirectory, *, auditor: Callable[[str], Sequence[str]] | None) -> int:
    """Serve a run until asked to stop; return the exit code.

    Args:
        auditor: makes the command of the run's own auditor from the join string; None for a run that needs none, or
            whose referees are elsewhere.

    Raises:
        DirectoryInUse, DirectoryNotARun, ConfigInvalid: it can't be served as it is.
        DelegationInvalid: the root's delegation of the coordinator key has run out; every worker would refuse it.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s serve: %(message)s")
    with directory.lock():
        _look_over(directory)
        return Supervisor(directory, auditor).run()


def _look_over(directory: RunDirectory) -> None:
    """Say what an operator should know before volunteers come."""
    identity = directory.identity()
    left_ms = identity.delegation.not_after_ms - WallClock(0).now_ms()
    if left_ms <= 0:
        raise DelegationInvalid("The coordinator key's delegation by the root key has expired; workers refuse it.")
    if left_ms < DELEGATION_WARNING_MS:
        logger.warning("the coordinator key's delegation by the root key ends in %d days", left_ms // DAY_MS)
    server = directory.settings().server
    if server.bind in {"0.0.0.0", "::"} and server.advertised_host in {"127.0.0.1", "localhost", "[::1]"}:  # noqa: S104
        logger.warning("server.advertised_host is %s: only this machine can join", server.advertised_host)
    for difference in differences(directory.settings(), identity.config):
        logger.warning(
            "%s is %s in run.toml, but %s in the signed run config, which holds",
            difference.name,
            difference.in_settings,
            difference.in_run,
        )


def serving_file(directory: RunDirectory) -> Path:
    """Return the file that says where a run is served; it is there only while it is."""
    return directory.root / "serving.json"


def read_serving(directory: RunDirectory) -> Serving | None:
    """Return where a run is served, or None when it is not; raise `DirectoryNotARun` if the file is damaged."""
    try:
        return Serving(**json.loads(serving_file(directory).read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise DirectoryNotARun(f"{serving_file(directory)} is damaged; stop the coordinator and remove it.") from None
    except FileNotFoundError:
        return None
