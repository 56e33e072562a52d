"""A person at a terminal, a real one: the question is seen, the cursor is there, and an error is said once."""

import asyncio
import os
import pty
import subprocess
import time
from pathlib import Path

from tests.worker.small_run import SmallRun
from tests.worker.test_processes import command, environment

HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"


def at_a_terminal(arguments: list[str], answer: bytes) -> tuple[int, bytes, bytes]:
    """Run a worker in a pseudo-terminal; return its exit code and the screen before and after the answer."""
    main, terminal = pty.openpty()
    with subprocess.Popen(
        arguments, stdin=terminal, stdout=terminal, stderr=terminal, env={**environment(), "TERM": "xterm"}
    ) as process:
        os.close(terminal)
        try:
            before = _read_until(main, b"[y/N]:")
            time.sleep(0.5)  # what would draw over the question has its chance
            os.set_blocking(main, False)
            before += _rest(main)
            os.set_blocking(main, True)
            os.write(main, answer)
            after = _read_until(main, None)
            return process.wait(30), before, after
        finally:
            process.kill()
            os.close(main)


def _read_until(main: int, wanted: bytes | None) -> bytes:
    seen = b""
    while wanted is None or wanted not in seen:
        try:
            chunk = os.read(main, 4096)
        except OSError:  # the other side is closed
            break
        seen += chunk
    return seen


def _rest(main: int) -> bytes:
    try:
        return os.read(main, 65536)
    except BlockingIOError:
        return b""


def without_consent(run: SmallRun, home: Path) -> list[str]:
    return [word for word in command(run, home, "--units", "1") if word not in ("--accept-terms", "--json")]


def test_the_question_is_seen_after_the_terms_and_yes_starts_the_work(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, int, bytes, bytes]:
        async with SmallRun(tmp_path / "run", units=1) as run, asyncio.timeout(90):
            call = without_consent(run, tmp_path / "home")
            return run, *await asyncio.to_thread(at_a_terminal, call, b"y\n")

    run, code, before, after = asyncio.run(scenario())

    assert code == 0
    assert len(run.received()) == 1
    assert 0 <= before.index(b"Be kind.") < before.index(b"Do you accept")
    assert HIDDEN not in before
    assert b"\x1b[" not in before[before.index(b"Do you accept") :]  # nothing erased it or moved away from it
    assert after.rindex(SHOWN) > after.rindex(HIDDEN)


def test_no_is_one_error_line_and_nothing_was_sent(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, int, bytes, bytes]:
        async with SmallRun(tmp_path / "run") as run, asyncio.timeout(90):
            call = without_consent(run, tmp_path / "home")
            return run, *await asyncio.to_thread(at_a_terminal, call, b"n\n")

    run, code, _, after = asyncio.run(scenario())

    assert code == 1
    assert run.log == []
    assert after.count(b"[CONSENT_NEEDED]") == 1


def test_without_a_terminal_the_terms_are_printed_once_and_then_one_error_line(tmp_path: Path) -> None:
    async def scenario() -> tuple[int, str, str]:
        async with SmallRun(tmp_path / "run") as run:
            done = await asyncio.to_thread(
                subprocess.run,
                without_consent(run, tmp_path / "home"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env=environment(),
            )
            return done.returncode, done.stdout, done.stderr

    code, out, errors = asyncio.run(scenario())

    assert (code, out) == (1, "")
    assert errors.count("Be kind.") == 1
    assert errors.rstrip().split("\n")[-1].startswith("error: The run's terms must be accepted first")
    assert errors.count("CONSENT_NEEDED") == 1
