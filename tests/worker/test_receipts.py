"""What a volunteer can show and do afterwards: its receipts, the verdict repeated on its own machine, an appeal."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from commonweight.cli import main
from protocol.errors import AppealRefused, UsageError
from protocol.limits import APPEAL_MS
from tests.worker.recording import Recorder, work
from tests.worker.small_audits import Attempt
from tests.worker.small_run import SmallRun
from worker.appeals import check_appealable
from worker.receipts import claim_receipts, read_receipts, runs_of, select, the_one

OUTCOMES = ("accepted", "rejected", None)


def judged(attempt: Attempt) -> str | None:
    return OUTCOMES[attempt.lease.index]


def three_units(folder: Path) -> SmallRun:
    """A run whose three units were trained: one accepted, one rejected, one without a verdict."""
    run = SmallRun(folder / "run", units=3)
    run.verdict_for = judged

    async def scenario() -> None:
        async with run:
            await work(run, folder / "home", Recorder())

    asyncio.run(scenario())
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallRun, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return three_units(folder), folder / "home"


def test_every_unit_has_a_receipt_that_says_what_became_of_it_and_why(trained: tuple[SmallRun, Path]) -> None:
    run, home = trained
    accepted, rejected, waiting = read_receipts(home, run.run)

    assert runs_of(home) == (run.run,)
    assert [receipt.index for receipt in (accepted, rejected, waiting)] == [0, 1, 2]
    assert (accepted.outcome, accepted.code, accepted.weight, accepted.checkpoint) == ("accepted", "MERGED", 2**23, 1)
    assert (rejected.outcome, rejected.code) == ("rejected", "REPLAY_DIFFERS")
    assert (waiting.outcome, waiting.code, waiting.sentence) == ("waiting", "", "Delivered; the verdict is awaited.")
    assert accepted.delta is None
    assert rejected.delta is not None
    assert rejected.delta.read_bytes() == bytes(run.attempts[1].stored)
    assert {receipt.audit_share for receipt in (accepted, rejected, waiting)} == {2**24}
    assert accepted.line().split()[:6] == [accepted.unit[:12], "1", "accepted", "MERGED", "50.00", "%"]
    assert {receipt.claim for receipt in claim_receipts(home, run.run)} == {
        attempt.claim_sha256 for attempt in run.attempts
    }


def test_receipts_are_shown_for_people_and_for_programs(
    trained: tuple[SmallRun, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, home = trained
    assert main.run(["worker", "receipts", "--home", str(home)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"run {run.run[:12]}: 3 units finished; 1 accepted, 1 rejected, 1 waiting"
    assert shown[1].split() == ["unit", "round", "outcome", "code", "weight", "checkpoint", "why"]
    assert shown[3].endswith("A referee got another delta.")

    assert main.run(["worker", "receipts", "--home", str(home), "--run", str(run.join), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["outcome"] for line in lines] == ["accepted", "rejected", "waiting"]
    assert lines[0]["secret_sha256"] == "5e" * 32


def test_a_damaged_entry_does_not_hide_the_others(trained: tuple[SmallRun, Path], tmp_path: Path) -> None:
    run, home = trained
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    (read_receipts(copy, run.run)[0].directory / "claim.json").write_bytes(b"{}")

    assert len(read_receipts(copy, run.run)) == 2


def test_who_was_rejected_wrongly_can_show_it_and_appeal(
    trained: tuple[SmallRun, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, home = trained
    unit = run.attempts[1].lease.unit[:12]

    async def scenario() -> list[int]:
        async with run:
            joined = ["--join", str(run.join), "--home", str(home)]
            return [
                await asyncio.to_thread(main.run, ["verify", "replay", unit, *joined, "--threads", "1"]),
                await asyncio.to_thread(main.run, ["worker", "appeal", unit, *joined]),
                await asyncio.to_thread(main.run, ["worker", "appeal", run.attempts[0].lease.unit, *joined]),
            ]

    assert asyncio.run(scenario()) == [0, 0, 1]
    shown = capsys.readouterr()
    assert f"own claim {run.attempts[1].claim_sha256[:12]}, rejected REPLAY_DIFFERS" in shown.out
    assert "trail                 the same, bit for bit" in shown.out
    assert "confirmed:" in shown.out
    assert "waits for a second referee" in shown.out
    assert "[APPEAL_REFUSED]" in shown.err
    assert run.appeals == [run.attempts[1].claim_sha256]
    receipts = read_receipts(home, run.run)
    assert [receipt.appealed for receipt in receipts] == [False, True, False]
    awaited = "You appealed; a second referee's finding is awaited."
    assert [awaited in receipt.line() for receipt in receipts] == [False, True, False]


def test_a_home_in_which_nobody_has_worked_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["worker", "receipts", "--home", str(tmp_path / "nowhere")]) == 2
    assert "No worker has finished a unit in" in capsys.readouterr().err


def test_the_join_string_that_worked_is_remembered(
    trained: tuple[SmallRun, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, home = trained
    run.appeals.clear()

    async def scenario() -> int:
        # The port is the one of the last start, as a coordinator's is.
        port = int((home / "joins" / run.run).read_text().split(":")[2])
        async with run:
            await run.stop()
            run.port = port
            await run.start()
            return await asyncio.to_thread(
                main.run, ["worker", "appeal", run.attempts[1].claim_sha256[:8], "--home", str(home)]
            )

    assert asyncio.run(scenario()) == 0, capsys.readouterr().err
    assert run.appeals == [run.attempts[1].claim_sha256]


def test_an_appeal_that_must_be_refused_is_not_sent(trained: tuple[SmallRun, Path]) -> None:
    run, home = trained
    accepted, rejected, _ = read_receipts(home, run.run)
    assert rejected.appeal_until_ms is not None

    with pytest.raises(AppealRefused, match="was not rejected: it is accepted"):
        check_appealable(accepted, 0)
    with pytest.raises(AppealRefused, match="was over on"):
        check_appealable(rejected, rejected.appeal_until_ms + 1)
    check_appealable(rejected, rejected.appeal_until_ms - APPEAL_MS)


def test_a_unit_must_be_named_so_that_only_one_is_meant(trained: tuple[SmallRun, Path]) -> None:
    run, home = trained
    receipts = read_receipts(home, run.run)

    assert the_one(select(receipts, receipts[1].unit[:8].upper()), "").index == 1
    with pytest.raises(UsageError, match="at least 8"):
        select(receipts, receipts[0].unit[:7])
    with pytest.raises(UsageError, match="No unit"):
        the_one(select(receipts, "0" * 64), "0" * 64)
    with pytest.raises(UsageError, match="3 units"):
        the_one(receipts, "all")
