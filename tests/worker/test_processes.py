"""`commonweight worker start` as a process of its own: killed, interrupted, started twice, and out of disk space."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.worker.dripping import BODY, HEADER, DrippingServer, dripping
from tests.worker.recording import spooled
from tests.worker.small_run import SmallRun

ROOT = Path(__file__).parents[2]


def command(run: SmallRun, home: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-P", "-m", "commonweight", "worker", "start", "--join", str(run.join),
        "--home", str(home), "--device", "cpu", "--threads", "1", "--accept-terms", "--json", *options,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


async def drive(
    arguments: list[str], on_event: Callable[[dict[str, Any], int], None] = lambda event, pid: None
) -> tuple[int, list[dict[str, Any]], str]:
    """Run a worker process to its end; return its exit code, its events and what it wrote to stderr."""
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    events = []
    async with asyncio.timeout(90):
        while line := await process.stdout.readline():
            events.append(json.loads(line))
            on_event(events[-1], process.pid)
        _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, events, errors.decode()


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def test_a_worker_killed_in_the_middle_of_a_unit_and_again_after_it_loses_nothing(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, list[dict[str, Any]]]:
        def kill_at(name: str) -> Callable[[dict[str, Any], int], None]:
            return lambda event, pid: os.kill(pid, signal.SIGKILL) if event["event"] == name else None

        async with SmallRun(tmp_path / "run", units=1, steps=60) as run:
            call = command(run, tmp_path / "home")
            code, _, _ = await drive(call, kill_at("step"))
            assert code == -signal.SIGKILL
            code, _, _ = await drive(call, kill_at("trained"))
            assert code == -signal.SIGKILL
            code, events, errors = await drive(call)
            assert (code, errors) == (0, "")
            return run, events

    run, events = asyncio.run(scenario())

    assert len(run.attempts) == len(run.received()) == 1
    assert "trained" not in names(events)  # the unit that was finished before the second kill was delivered as it was
    assert names(events)[-1] == "finished"
    assert len(spooled(tmp_path / "home", "settled")) == 1


def test_ctrl_c_twice_hands_the_unit_back_and_exits_well(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, int, list[dict[str, Any]]]:
        def interrupt(event: dict[str, Any], pid: int) -> None:
            if event["event"] in ("step", "stopping"):
                os.kill(pid, signal.SIGINT)

        async with SmallRun(tmp_path / "run", units=1, steps=100_000) as run:
            code, events, _ = await drive(command(run, tmp_path / "home"), interrupt)
            return run, code, events

    run, code, events = asyncio.run(scenario())

    assert code == 0
    assert [attempt.state for attempt in run.attempts] == ["back"]
    assert names(events)[-1] == "finished"


def test_sigterm_hands_the_unit_back_and_exits_well(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, int, list[dict[str, Any]]]:
        sent: list[int] = []

        def terminate(event: dict[str, Any], pid: int) -> None:
            if event["event"] == "step" and not sent:
                sent.append(pid)
                os.kill(pid, signal.SIGTERM)

        async with SmallRun(tmp_path / "run", units=1, steps=100_000) as run:
            code, events, _ = await drive(command(run, tmp_path / "home"), terminate)
            return run, code, events

    run, code, events = asyncio.run(scenario())

    assert code == 0
    assert [attempt.state for attempt in run.attempts] == ["back"]
    assert "handed_back" in names(events)


@pytest.mark.parametrize("opening", [HEADER, BODY], ids=["header", "body"])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_waits_for_a_dripping_file_server_can_be_stopped(
    tmp_path: Path, opening: bytes, signal_number: signal.Signals
) -> None:
    async def scenario(server: DrippingServer) -> tuple[SmallRun, int, list[dict[str, Any]], str]:
        stopping: list[asyncio.Task[None]] = []

        async def stop_when_dripping(pid: int) -> None:
            await asyncio.to_thread(server.asked.wait, 30)
            os.kill(pid, signal_number)

        def on_event(event: dict[str, Any], pid: int) -> None:
            if event["event"] == "lease":
                stopping.append(asyncio.create_task(stop_when_dripping(pid)))

        async with SmallRun(tmp_path / "run", units=1) as run:
            run.public_url = server.url
            return run, *await drive(command(run, tmp_path / "home"), on_event)

    with dripping(opening) as server:
        began = time.monotonic()
        run, code, events, errors = asyncio.run(scenario(server))

    assert time.monotonic() - began < 25  # most of it is the start of the process
    assert (code, errors) == (0, "")
    assert [attempt.state for attempt in run.attempts] == ["back"]
    assert names(events)[-1] == "finished"


def test_a_wrong_public_address_ends_the_worker_with_a_sentence(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, int, str]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.public_url = "http://127.0.0.1:99999"
            code, _, errors = await drive(command(run, tmp_path / "home"))
            return run, code, errors

    run, code, errors = asyncio.run(scenario())

    assert code == 1
    assert errors.startswith("error: The run's public address 'http://127.0.0.1:99999' is not a plain")
    assert errors.endswith("[ENDPOINT_UNTRUSTED]\n")
    assert [attempt.state for attempt in run.attempts] == ["back"]


def test_a_refused_worker_exits_1_with_the_sentence_and_a_wrong_join_string_exits_2(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with SmallRun(tmp_path / "run") as run:
            run.numerics = 9
            code, events, errors = await drive(command(run, tmp_path / "home"))
            assert code == 1
            assert "install version 9" in errors
            assert "NUMERICS_MISMATCH" in errors
            assert names(events) == ["failed"]
            code, _, errors = await drive([*command(run, tmp_path / "home"), "--join", "cw1:nonsense"])
            assert code in (1, 2)
            assert "JOIN_STRING_INVALID" in errors

    asyncio.run(scenario())


def _can_mount() -> bool:
    tried = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"], capture_output=True, check=False
    )
    return tried.returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="no user namespaces here to mount a small disk in")
def test_a_worker_whose_disk_is_full_waits_and_delivers_everything_when_there_is_space_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()

    async def scenario() -> tuple[SmallRun, int, list[dict[str, Any]]]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            # A disk of 3 MiB on which a file of somebody else leaves too little for the checkpoint.
            filler = f"head -c 2800000 /dev/zero > {home}/filler"
            mount = f"mount -t tmpfs -o size=3m none {home}"
            free = f"(while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; rm {home}/filler) &"
            script = f"{mount} && {filler}; {free} exec {shlex.join(command(run, home))}"

            def make_room(event: dict[str, Any], pid: int) -> None:
                if event["event"] == "waiting" and event["code"] == "DISK_FULL":
                    (tmp_path / "go").touch()

            code, events, _ = await drive(["unshare", "-rm", "sh", "-c", script], make_room)
            return run, code, events

    run, code, events = asyncio.run(scenario())

    assert code == 0
    assert "DISK_FULL" in {event["code"] for event in events if event["event"] == "waiting"}
    assert len(run.attempts) == len(run.received()) == 1
