"""Real workers against a real coordinator: killed, interrupted, left alone; the run ends as it should."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.live_run import LiveRun, LiveWorker, command, environment, until

ONE_UNIT = ("rounds.units=1", "rounds.min_units=1", "rounds.planned=1")
LONG_UNIT = ("training.steps=120", "training.batch=16")


def check(run: LiveRun, checkpoint: int) -> None:
    """Let the command line verify a checkpoint, and rebuild the newest one from the public files."""
    for arguments in (
        ("checkpoint", "verify", str(run.directory.checkpoint(checkpoint)), "--run", str(run.join.run)),
        ("checkpoint", "rebuild", str(run.directory.root)),
    ):
        done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_two_workers_finish_a_run_and_every_unit_gets_its_verdict(folder: Path) -> None:
    settings = ("rounds.units=3", "rounds.min_units=3", "rounds.planned=2")
    with LiveRun(folder, settings) as run, LiveWorker(run.start(), "a") as a, LiveWorker(run, "b") as b:
        assert (a.wait(), b.wait()) == (0, 0)
        check(run, 2)
        verdicts = [event for worker in (a, b) for event in worker.events("verdict")]
        assert len(verdicts) == 6
        assert {event["outcome"] for event in verdicts} == {"accepted"}
        assert sum(event["weight"] for event in verdicts) == 2 * 2**24
        assert {event["checkpoint"] for event in verdicts} == {1, 2}


def test_the_lease_of_a_killed_worker_expires_and_another_takes_the_unit(folder: Path) -> None:
    settings = (*ONE_UNIT, *LONG_UNIT, "rounds.lease_seconds=6")
    with LiveRun(folder, settings) as run, LiveWorker(run.start(), "killed") as killed:
        killed.await_event("step")
        killed.process.kill()
        killed.process.wait()
        with LiveWorker(run, "other") as other:
            assert other.wait() == 0
            # On a slow machine its own lease may run out as well, and its late claim be a replica of its next one.
            assert {event["outcome"] for event in other.events("verdict")} == {"accepted"}
            assert killed.events("lease")[0]["unit"] == other.events("lease")[0]["unit"]
        check(run, 1)


def test_a_killed_worker_that_starts_again_gets_its_unit_back(folder: Path) -> None:
    with LiveRun(folder, (*ONE_UNIT, *LONG_UNIT, "rounds.lease_seconds=600")) as run:
        with LiveWorker(run.start(), "home") as killed:
            killed.await_event("step")
            killed.process.kill()
            killed.process.wait()
        lease = killed.events("lease")[0]["lease"]
        with LiveWorker(run, "home") as again:
            assert again.wait() == 0
            assert again.events("lease")[-1]["lease"] == lease
        check(run, 1)


def test_a_worker_killed_before_its_receipt_delivers_from_its_disk(folder: Path) -> None:
    with LiveRun(folder, ONE_UNIT) as run:
        run.start()
        with LiveWorker(run, "home") as worker:
            worker.await_event("step")
            run.kill_all()  # nobody is there to take the unit
            worker.await_event("trained")
            worker.process.kill()
            worker.process.wait()
        run.start()
        with LiveWorker(run, "home") as again:
            assert again.wait() == 0
            assert len(again.events("trained")) == 1, "the finished unit was trained again instead of delivered"
            assert [event["outcome"] for event in again.events("verdict")] == ["accepted"]
        check(run, 1)


def test_workers_go_on_when_the_coordinator_comes_back(folder: Path) -> None:
    settings = ("rounds.units=2", "rounds.min_units=2", "rounds.planned=2")
    with LiveRun(folder, settings) as run, LiveWorker(run.start(), "worker") as worker:
        worker.await_event("step")
        run.kill_all()
        time.sleep(1)
        run.start()
        assert worker.wait() == 0
        check(run, 2)


def test_ctrl_c_hands_back_a_unit_that_has_just_begun_and_another_takes_it_at_once(folder: Path) -> None:
    settings = (*ONE_UNIT, "training.steps=1500", "training.batch=16", "rounds.lease_seconds=600")
    with LiveRun(folder, settings) as run, LiveWorker(run.start(), "first") as first:
        first.await_event("step")
        first.process.send_signal(signal.SIGINT)
        assert first.wait(60) == 0
        assert first.events("handed_back")
        with LiveWorker(run, "second") as second:
            assert second.await_event("lease", 30)["unit"] == first.events("lease")[0]["unit"]


def test_ctrl_c_near_the_end_finishes_and_delivers_the_unit(folder: Path) -> None:
    settings = (*ONE_UNIT, "training.steps=200", "training.batch=16")
    with LiveRun(folder, settings) as run, LiveWorker(run.start(), "worker") as worker:
        until(lambda: any(event["step"] >= 140 for event in worker.events("step")), 60, "step 140")
        worker.process.send_signal(signal.SIGINT)
        assert worker.wait(90) == 0
        assert worker.events("uploaded")
        run.await_checkpoint(1)


def test_a_worker_for_another_run_trusts_nothing(folder: Path) -> None:
    with LiveRun(folder, ONE_UNIT) as run:
        run.start()
        stranger = str(run.join).rpartition(":")[0] + ":" + "ab" * 32
        arguments = ("worker", "start", "--join", stranger, "--home", str(folder / "home"), "--accept-terms")
        done = subprocess.run(
            command(*arguments), env=environment(), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert "ENDPOINT_UNTRUSTED" in done.stderr


def test_without_accepted_terms_nothing_is_trained(folder: Path) -> None:
    with LiveRun(folder, ONE_UNIT) as run:
        run.start()
        arguments = ("worker", "start", "--join", str(run.join), "--home", str(folder / "home"))
        done = subprocess.run(
            command(*arguments),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 1
        assert "--accept-terms" in done.stderr
        assert "Apache-2.0" in done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_at_the_worker_loses_nothing(folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(home)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a file system")
    try:
        with LiveRun(folder, (*ONE_UNIT, *LONG_UNIT)) as run, LiveWorker(run.start(), "home") as worker:
            worker.await_event("step")
            ballast = home / "ballast"
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                except OSError:
                    pass
            until(lambda: any(event["code"] == "DISK_FULL" for event in worker.events("waiting")), 60, "its complaint")
            assert worker.process.poll() is None
            ballast.unlink()
            assert worker.wait() == 0
            assert [event["outcome"] for event in worker.events("verdict")] == ["accepted"]
    finally:
        subprocess.run(["umount", "-l", str(home)], check=False)
