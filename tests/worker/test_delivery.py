"""Nothing that is finished is lost: cut uploads, a coordinator that is gone, forgets, or refuses, and crashes."""

import asyncio
import shutil
from pathlib import Path

import pytest

from protocol import calls
from protocol.errors import (
    Bug,
    BytesRefused,
    ClaimMismatch,
    CommonweightError,
    CoordinatorDiskFull,
    DeltaNotFinite,
    DigestMismatch,
    OwnerBanned,
    RateLimited,
    ServerBusy,
    StepOutOfOrder,
    Unreachable,
)
from protocol.keys import PrivateKey
from tests.worker.recording import Recorder, spooled, work
from tests.worker.small_run import SmallRun
from worker.lifecycle import SpoolState
from worker.progress import Claimed, Event, Trained, Uploaded, Waiting
from worker.spool import Spool
from worker.stop import Stop, StopLevel


def run_one_unit(root: Path, *, prepare: object = None, units: int = 1) -> tuple[SmallRun, Recorder]:
    """Run a worker to the end of a run whose switches `prepare` sets."""
    recorder = Recorder()

    async def scenario() -> SmallRun:
        async with SmallRun(root / "run", units=units) as run:
            if callable(prepare):
                prepare(run)
            await work(run, root / "home", recorder)
            return run

    return asyncio.run(scenario()), recorder


@pytest.mark.parametrize(
    "call",
    ["GetNonce", "OpenSession", "LeaseUnit", "SubmitClaim", "SubmitSketch", "GetUpload", "Upload", "GetVerdicts"],
)
@pytest.mark.parametrize("error", [ServerBusy, Bug], ids=["busy", "bug"])
def test_trouble_in_any_call_is_met_by_asking_again(tmp_path: Path, call: str, error: type[CommonweightError]) -> None:
    def prepare(run: SmallRun) -> None:
        run.errors[call] = [error(), error()]

    run, recorder = run_one_unit(tmp_path, prepare=prepare)

    assert len(run.received()) == len(run.attempts) == 1
    assert recorder.named("finished")[0]["accepted"] == 1
    assert len(recorder.named("trained")) == 1


def test_an_upload_that_is_cut_resumes_where_it_stopped(tmp_path: Path) -> None:
    cut = 7_777

    def prepare(run: SmallRun) -> None:
        run.cut_upload_after = cut

    run, recorder = run_one_unit(tmp_path, prepare=prepare)

    assert run.log.count("Upload") == 2
    assert recorder.named("uploaded")[0]["bytes"] == len(run.received()[0].stored) - cut


def test_a_coordinator_without_disk_space_gets_the_delta_later(tmp_path: Path) -> None:
    def prepare(run: SmallRun) -> None:
        run.errors["Upload"] = [CoordinatorDiskFull(retry_after_ms=10)] * 3

    run, recorder = run_one_unit(tmp_path, prepare=prepare)

    assert len(run.received()) == 1
    assert recorder.waits() == {"COORDINATOR_DISK_FULL"}


def test_training_goes_on_while_the_coordinator_is_gone_and_everything_is_delivered_when_it_is_back(
    tmp_path: Path,
) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        gone = asyncio.Event()
        recorder = Recorder(lambda event: gone.set() if isinstance(event, Claimed) else None)
        async with SmallRun(tmp_path / "run", units=3) as run:
            worker = asyncio.create_task(work(run, tmp_path / "home", recorder))
            await gone.wait()
            await run.stop()
            await run.until(lambda: "UNREACHABLE" in recorder.waits())
            run.tokens.clear()  # a restarted coordinator knows no sessions
            await run.start()
            await worker
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert len(run.received()) == len(run.attempts) == 3
    assert recorder.named("finished")[0]["accepted"] == 3


def test_a_coordinator_that_comes_back_with_another_certificate_is_believed_again(tmp_path: Path) -> None:
    from tests.worker.certificates import self_signed

    async def scenario() -> SmallRun:
        gone = asyncio.Event()
        recorder = Recorder(lambda event: gone.set() if isinstance(event, Trained) else None)
        async with SmallRun(tmp_path / "run", units=2) as run:
            worker = asyncio.create_task(work(run, tmp_path / "home", recorder))
            await gone.wait()
            await run.stop()
            run.key_pem, run.certificate_pem, run.certificate_sha256 = self_signed()
            run.tokens.clear()
            await run.start()
            await worker
            return run

    assert len(asyncio.run(scenario()).received()) == 2


def test_a_lost_session_is_opened_again_at_once(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            recorder = Recorder(lambda event: run.tokens.clear() if isinstance(event, Trained) else None)
            await work(run, tmp_path / "home", recorder)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert run.log.count("OpenSession") == 2
    assert not recorder.named("waiting")


@pytest.mark.parametrize(
    ("call", "error"), [("SubmitClaim", ClaimMismatch()), ("Upload", DeltaNotFinite())], ids=["claim", "bytes"]
)
def test_a_refused_unit_is_set_aside_with_code_and_sentence_and_the_worker_goes_on(
    tmp_path: Path, call: str, error: CommonweightError
) -> None:
    def prepare(run: SmallRun) -> None:
        run.errors[call] = [error]

    run, recorder = run_one_unit(tmp_path, prepare=prepare, units=2)

    (refused,) = recorder.named("refused")
    assert (refused["code"], refused["sentence"]) == (error.code, error.message)
    (directory,) = spooled(tmp_path / "home", "refused")
    assert directory.name == refused["claim"]
    assert error.code in (directory / "state.json").read_text()
    assert (directory / "delta.safetensors.zst").exists()
    assert recorder.named("finished")[0]["refused"] == 1
    assert len(run.received()) >= 1


@pytest.mark.parametrize(("outcome", "kept"), [("accepted", False), ("rejected", True)])
def test_a_unit_that_was_judged_before_its_bytes_came_has_its_verdict_and_is_not_called_refused(
    tmp_path: Path, outcome: str, kept: bool
) -> None:
    def prepare(run: SmallRun) -> None:
        run.errors["GetUpload"] = [BytesRefused("This claim was judged already.")]
        run.verdict_for = lambda attempt: outcome if attempt.state == "sketched" else None

    _, recorder = run_one_unit(tmp_path, prepare=prepare)

    assert not recorder.named("refused")
    assert [verdict["outcome"] for verdict in recorder.named("verdict")] == [outcome]
    (settled,) = spooled(tmp_path / "home", "settled")
    assert (settled / "delta.safetensors.zst").exists() is kept


def test_an_owner_who_is_banned_hears_it_and_keeps_the_unit(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.errors["SubmitClaim"] = [OwnerBanned()]
            await work(run, tmp_path / "home", Recorder())

    with pytest.raises(OwnerBanned):
        asyncio.run(scenario())

    assert len(spooled(tmp_path / "home", "pending")) == 1


def test_a_receipt_by_a_foreign_key_is_not_believed_and_the_delta_is_kept(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder, list[Path]]:
        stop = Stop()
        recorder = Recorder(lambda event: stop.ask() if isinstance(event, Waiting) else None)
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.sign_receipts_with = PrivateKey.generate()
            await work(run, tmp_path / "home", recorder, stop=stop)
            return run, recorder, list(spooled(tmp_path / "home", "pending")[0].iterdir())

    run, recorder, files = asyncio.run(scenario())

    assert recorder.waits() == {"ANSWER_INVALID"}
    assert {path.name for path in files} == {"state.json", "lease.json", "claim.json", "delta.safetensors.zst"}
    assert recorder.named("finished")[0]["waiting_units"] == 1
    assert not run.received()


@pytest.mark.parametrize("moment", ["trained", "claimed", "uploaded"])
def test_a_spool_from_any_moment_before_a_crash_is_delivered_without_training_again(
    tmp_path: Path, moment: str
) -> None:
    """The coordinator is ahead of the worker by any number of steps: it repeats its answers."""
    home, image = tmp_path / "home", tmp_path / "image"

    async def scenario() -> tuple[SmallRun, Recorder]:
        def photograph(event: Event) -> None:
            if moment == event.NAME:
                shutil.copytree(home / "spool", image)

        async with SmallRun(tmp_path / "run", units=1) as run:
            await work(run, home, Recorder(photograph))
            shutil.rmtree(home / "spool")
            image.rename(home / "spool")
            recorder = Recorder()
            await work(run, home, recorder)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert not recorder.named("trained")
    assert run.log.count("Upload") == 1  # the bytes did not travel twice
    assert recorder.named("finished")[0]["accepted"] == 1
    assert len(spooled(home, "settled")) == 1
    assert spooled(home, "pending") == []


def test_a_unit_that_could_not_be_claimed_before_the_stop_is_claimed_at_the_next_start(tmp_path: Path) -> None:
    home = tmp_path / "home"

    async def scenario() -> tuple[SmallRun, Recorder]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.errors["SubmitClaim"] = [Unreachable()] * 1000
            stop = Stop()
            recorder = Recorder(lambda event: stop.raise_to(StopLevel.NOW) if isinstance(event, Waiting) else None)
            await work(run, home, recorder, stop=stop)
            assert recorder.named("finished")[0]["waiting_units"] == 1
            run.errors.clear()
            again = Recorder()
            await work(run, home, again)
            return run, again

    run, recorder = asyncio.run(scenario())

    assert recorder.named("connected")[0]["waiting_units"] == 1
    assert not recorder.named("trained")
    assert len(run.attempts) == len(run.received()) == 1


def test_a_coordinator_that_forgot_the_claim_is_told_again(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        async with SmallRun(tmp_path / "run", units=1) as run:

            def forget(event: Event) -> None:
                if isinstance(event, Claimed) and run.log.count("SubmitClaim") == 1:
                    run.attempts[0].claim_sha256, run.attempts[0].state = "", "leased"

            recorder = Recorder(forget)
            await work(run, tmp_path / "home", recorder)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert len(recorder.named("claimed")) == 2
    assert len(run.received()) == 1


def test_a_coordinator_that_never_agrees_on_the_step_does_not_keep_the_worker_for_ever(tmp_path: Path) -> None:
    def prepare(run: SmallRun) -> None:
        run.errors["GetUpload"] = [StepOutOfOrder()] * 100

    run, recorder = run_one_unit(tmp_path, prepare=prepare)

    assert recorder.named("refused")[0]["code"] == "STEP_OUT_OF_ORDER"
    assert run.log.count("GetUpload") == 3


def test_bytes_that_were_damaged_on_the_way_are_sent_again(tmp_path: Path) -> None:
    def prepare(run: SmallRun) -> None:
        run.errors["Upload"] = [DigestMismatch()]

    run, recorder = run_one_unit(tmp_path, prepare=prepare)

    assert len(run.received()) == 1
    assert not recorder.named("refused")


def test_a_delta_that_this_disk_has_damaged_is_set_aside(tmp_path: Path) -> None:
    home = tmp_path / "home"

    async def scenario() -> Recorder:
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.errors["SubmitClaim"] = [Unreachable()] * 1000
            stop = Stop()
            first = Recorder(lambda event: stop.raise_to(StopLevel.NOW) if isinstance(event, Waiting) else None)
            await work(run, home, first, stop=stop)
            run.errors.clear()
            (entry,) = spooled(home, "pending")
            with (entry / "delta.safetensors.zst").open("r+b") as file:
                file.truncate(1000)
            again = Recorder()
            await work(run, home, again, units=1, stop=Stop())
            return again

    recorder = asyncio.run(scenario())

    assert recorder.named("refused")[0]["code"] == "DELTA_TRUNCATED"


def test_a_unit_whose_bytes_are_not_wanted_is_kept_until_its_verdict(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder, bool]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.next_after_sketch = calls.Instruction.KEEP
            run.verdict_for = lambda attempt: None
            run.finish_when_done = False
            recorder = Recorder()
            worker = asyncio.create_task(work(run, tmp_path / "home", recorder))
            await run.until(lambda: "GetVerdicts" in run.log)
            (entry,) = spooled(tmp_path / "home", "pending")
            kept = (entry / "delta.safetensors.zst").exists()
            run.verdict_for = lambda attempt: "accepted"
            run.finish_when_done = True
            await worker
            return run, recorder, kept

    run, recorder, kept = asyncio.run(scenario())

    assert kept
    assert "Upload" not in run.log
    assert recorder.named("verdict")[0]["outcome"] == "accepted"
    (settled,) = spooled(tmp_path / "home", "settled")
    assert not (settled / "delta.safetensors.zst").exists()


def test_a_kept_replica_whose_bytes_are_wanted_after_all_is_sent_even_when_the_run_is_over(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.next_after_sketch = calls.Instruction.KEEP
            run.verdict_for = lambda attempt: "accepted" if attempt.bytes_receipt else None
            recorder = Recorder()
            worker = asyncio.create_task(work(run, tmp_path / "home", recorder))
            await run.until(lambda: run.log.count("SubmitClaim") > 1)  # it asks whether they are
            run.next_after_sketch = calls.Instruction.UPLOAD
            await worker
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert len(run.received()) == 1
    assert recorder.named("verdict")[0]["outcome"] == "accepted"


def test_kept_replicas_do_not_keep_a_worker_from_training_on(tmp_path: Path) -> None:
    def prepare(run: SmallRun) -> None:
        run.next_after_sketch = calls.Instruction.KEEP
        run.verdict_for = lambda attempt: "accepted" if len(run.attempts) == 6 else None

    _, recorder = run_one_unit(tmp_path, prepare=prepare, units=6)

    assert recorder.named("finished")[0]["accepted"] == 6
    assert not recorder.named("waiting")


def test_a_banned_owner_hears_which_claim_was_refuted_before_the_worker_ends(tmp_path: Path) -> None:
    recorder = Recorder()

    async def scenario() -> None:
        async with SmallRun(tmp_path / "run", units=2) as run:
            run.verdict_for = lambda attempt: None

            def ban(event: Event) -> None:
                if isinstance(event, Uploaded):
                    run.errors["LeaseUnit"] = [OwnerBanned()] * 9
                    run.errors["SubmitClaim"] = [OwnerBanned()] * 9
                    run.verdict_for = lambda attempt: "rejected"

            recorder._on_event = ban
            with pytest.raises(OwnerBanned):
                await work(run, tmp_path / "home", recorder)

    asyncio.run(scenario())

    assert recorder.named("verdict")[0]["code"] == "REPLAY_DIFFERS"
    assert recorder.names()[-1] == "failed"


def test_a_verdict_that_changes_later_is_heard_at_the_next_start(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()

    async def scenario() -> None:
        async with SmallRun(tmp_path / "run", units=1) as run:
            await work(run, tmp_path / "home", first)
            run.verdict_for = lambda attempt: "rejected"  # an audit back refuted it
            await work(run, tmp_path / "home", second)

    asyncio.run(scenario())

    assert [verdict["code"] for verdict in first.named("verdict")] == ["MERGED"]
    assert [verdict["code"] for verdict in second.named("verdict")] == ["REPLAY_DIFFERS"]
    (settled,) = spooled(tmp_path / "home", "settled")
    assert {"verdict.json", "superseded-MERGED.json"} <= {path.name for path in settled.iterdir()}


def test_training_waits_with_a_reason_when_too_many_finished_units_wait(tmp_path: Path) -> None:
    async def scenario() -> SmallRun:
        recorder = Recorder()
        async with SmallRun(tmp_path / "run", units=4) as run:
            run.errors["Upload"] = [RateLimited(retry_after_ms=1)] * 1000
            worker = asyncio.create_task(work(run, tmp_path / "home", recorder, spooled_units=2))
            await run.until(lambda: any("2 finished units" in event["reason"] for event in recorder.named("waiting")))
            assert len(run.attempts) == 2
            run.errors.clear()
            await worker
            return run

    assert len(asyncio.run(scenario()).received()) == 4


def test_a_rejecting_verdict_is_told_and_kept(tmp_path: Path) -> None:
    def prepare(run: SmallRun) -> None:
        run.verdict_for = lambda attempt: "rejected"

    run, recorder = run_one_unit(tmp_path, prepare=prepare)

    assert recorder.named("verdict")[0]["outcome"] == "rejected"
    assert recorder.named("finished")[0]["rejected"] == 1
    assert Spool(tmp_path / "home/spool" / run.run).pending() == ()
    (settled,) = spooled(tmp_path / "home", "settled")
    assert SpoolState.REJECTED.value in (settled / "state.json").read_text()
    assert (settled / "delta.safetensors.zst").read_bytes() == bytes(run.received()[0].stored)
