"""The whole worker against a real server: it trains, delivers, and stops as it should."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from protocol.documents import Lease, LeaseId
from protocol.errors import (
    CacheTooSmall,
    ClaimMismatch,
    ConsentNeeded,
    DirectoryInUse,
    EndpointUntrusted,
    NetworksMissing,
    NumericsMismatch,
    Unreachable,
)
from protocol.keys import PrivateKey
from protocol.limits import GIB
from tests.worker.recording import Recorder, spooled, work
from tests.worker.small_audits import Attempt
from tests.worker.small_run import SmallRun
from worker.home import WorkerHome
from worker.progress import FILES, Event, Leased, Step, Waiting
from worker.stop import Stop, StopLevel


def test_a_worker_trains_the_run_to_its_end_and_keeps_the_receipts(tmp_path: Path) -> None:
    recorder, home = Recorder(), tmp_path / "home"

    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run", units=2) as run:
            await work(run, home, recorder)
            return run

    run = asyncio.run(scenario())

    assert len(run.received()) == 2
    assert len({attempt.lease.unit for attempt in run.received()}) == 2
    for name in ("connected", "ready", "lease", "downloaded", "step", "trained", "claimed", "uploaded", "verdict"):
        assert recorder.named(name), name
    assert recorder.names()[-1] == "finished"
    assert recorder.named("finished")[0]["accepted"] == 2
    assert recorder.named("verdict")[0]["checkpoint"] == 1
    leased = {event["unit"]: (event["round"], event["index"]) for event in recorder.named("lease")}
    assert {event["unit"]: (event["round"], event["index"]) for event in recorder.named("verdict")} == leased
    assert recorder.named("uploaded")[0]["bytes"] == len(run.received()[0].stored)
    settled = spooled(home, "settled")
    assert [path.name for path in settled] == sorted(attempt.claim_sha256 for attempt in run.received())
    for directory in settled:
        assert {path.name for path in directory.iterdir()} == {
            "state.json", "lease.json", "claim.json", "claim-receipt.json", "bytes-receipt.json", "verdict.json"
        }  # fmt: skip
        assert run.trust().bytes_receipt((directory / "bytes-receipt.json").read_bytes()).claim == directory.name


def test_a_base_checkpoint_is_fetched_once_for_all_units_of_a_round(tmp_path: Path) -> None:
    recorder = Recorder()

    async def scenario() -> list[str]:
        async with SmallRun(tmp_path / "run", units=3) as run:
            await work(run, tmp_path / "home", recorder)
            return [path for path, _ in run.files.requests]

    asked = asyncio.run(scenario())

    assert len(asked) == len(set(asked)) == 4  # manifest, weights, two shards


def test_a_worker_stops_after_the_units_that_were_asked_for(tmp_path: Path) -> None:
    recorder = Recorder()

    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run", units=3) as run:
            await work(run, tmp_path / "home", recorder, units=1)
            return run

    run = asyncio.run(scenario())

    assert len(run.attempts) == len(run.received()) == 1
    assert recorder.named("finished")[0]["waiting_units"] == 0


@pytest.mark.parametrize(
    ("when", "stop_at", "received"), [("just begun", 0.0, 0), ("mostly done", 0.5, 1)], ids=["begun", "done"]
)
def test_one_request_to_stop_hands_back_what_has_just_begun_and_finishes_what_is_mostly_done(
    tmp_path: Path, when: str, stop_at: float, received: int
) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        stop = Stop()

        def ask(event: Event) -> None:
            if isinstance(event, Step) and event.step >= stop_at * event.steps and not stop.asked.is_set():
                stop.ask()

        recorder = Recorder(ask)
        async with SmallRun(tmp_path / "run", units=3, steps=300) as run:
            await work(run, tmp_path / "home", recorder, stop=stop)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert len(run.received()) == received
    assert [attempt.state for attempt in run.attempts] == (["received"] if received else ["back"])
    assert recorder.named("stopping")
    assert bool(recorder.named("handed_back")) is not bool(received)
    assert recorder.names()[-1] == "finished"


def test_an_urgent_request_to_stop_hands_the_unit_back_at_once(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        stop = Stop()
        recorder = Recorder(lambda event: stop.raise_to(StopLevel.NOW) if isinstance(event, Step) else None)
        async with SmallRun(tmp_path / "run", units=1, steps=5000) as run:
            await work(run, tmp_path / "home", recorder, stop=stop)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert [attempt.state for attempt in run.attempts] == ["back"]
    assert recorder.named("handed_back")[0]["unit"] == run.attempts[0].lease.unit
    assert len(recorder.named("step")) < 5


def test_a_worker_of_other_numerics_is_told_what_to_install(tmp_path: Path) -> None:
    recorder = Recorder()

    async def scenario() -> None:
        async with SmallRun(tmp_path / "run") as run:
            run.numerics = 9
            await work(run, tmp_path / "home", recorder)

    with pytest.raises(NumericsMismatch, match="install version 9"):
        asyncio.run(scenario())

    assert recorder.names() == ["failed"]
    assert recorder.named("failed")[0]["code"] == "NUMERICS_MISMATCH"


def test_nothing_is_sent_before_the_terms_are_accepted(tmp_path: Path) -> None:
    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run") as run:
            with pytest.raises(ConsentNeeded, match="--accept-terms"):
                await work(run, tmp_path / "home", Recorder(), accept_terms=False)
            return run

    assert asyncio.run(scenario()).log == []


def test_who_lacks_the_text_encoders_of_a_run_is_told_before_anything_is_asked_or_sent(tmp_path: Path) -> None:
    async def scenario() -> SmallRun:
        small = SmallRun(tmp_path / "run")
        small.config = replace(
            small.config,
            conditioning={"kind": "encoders", "stored": False, "encoders": [{"name": "clip_l", "tokens": 77}]},
        )
        async with small as run:
            with pytest.raises(NetworksMissing, match=r"runs its text encoders, clip_l.*--components"):
                await work(run, tmp_path / "home", Recorder(), accept_terms=False)
            return run

    assert asyncio.run(scenario()).log == []
    assert not (tmp_path / "home/consent").exists()


def test_accepted_terms_are_remembered(tmp_path: Path) -> None:
    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run", units=2) as run:
            await work(run, tmp_path / "home", Recorder(), units=1)
            await work(run, tmp_path / "home", Recorder(), units=1, accept_terms=False)
            return run

    assert len(asyncio.run(scenario()).received()) == 2


def test_a_server_of_another_run_is_not_believed(tmp_path: Path) -> None:
    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run") as run:
            stranger = PrivateKey.generate()
            run.root_key = stranger  # the run id in the join string stays
            with pytest.raises(EndpointUntrusted):
                await work(run, tmp_path / "home", Recorder())
            return run

    assert asyncio.run(scenario()).log == []


def test_a_man_in_the_middle_with_his_own_certificate_is_not_believed(tmp_path: Path) -> None:
    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run") as run:
            run.certificate_sha256 = "ab" * 32  # the true statement, over another TLS connection
            with pytest.raises(EndpointUntrusted, match="certificate"):
                await work(run, tmp_path / "home", Recorder())
            return run

    assert asyncio.run(scenario()).log == []


def test_two_workers_with_one_home_refuse(tmp_path: Path) -> None:
    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run") as run:
            with WorkerHome(tmp_path / "home").lock(), pytest.raises(DirectoryInUse, match="--home"):
                await work(run, tmp_path / "home", Recorder())
            return run

    assert asyncio.run(scenario()).log == []


def test_a_unit_beyond_the_owners_cap_is_handed_back_before_anything_large_is_fetched(tmp_path: Path) -> None:
    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run") as run:
            with pytest.raises(CacheTooSmall, match="--cache-gib"):
                await work(run, tmp_path / "home", Recorder(), cache_bytes=int(0.0001 * GIB))
            return run

    run = asyncio.run(scenario())

    assert [attempt.state for attempt in run.attempts] == ["back"]
    assert [path for path, _ in run.files.requests] == ["/checkpoints/000000/manifest.json"]


def test_a_worker_follows_the_public_files_to_their_new_address(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.public_url = "http://127.0.0.1:1"

            def move(event: Event) -> None:
                if isinstance(event, Waiting) and event.part == FILES:
                    run.public_url = None  # the operator's next endpoint statement names the true address

            recorder = Recorder(move)
            await work(run, tmp_path / "home", recorder, units=1)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert len(run.attempts) == len(run.received()) == 1
    assert {event["part"] for event in recorder.named("waiting")} == {"files"}
    assert not recorder.named("handed_back")


def test_a_unit_whose_files_can_not_be_fetched_is_handed_back_long_before_its_lease_ends(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        stop = Stop()
        recorder = Recorder(lambda event: stop.ask() if len(recorder.named("handed_back")) == 2 else None)
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.public_url = "http://127.0.0.1:1"
            await work(run, tmp_path / "home", recorder, stop=stop, files_seconds=0.3)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert [attempt.state for attempt in run.attempts] == ["back", "back"]
    assert "its files did not come" in recorder.named("handed_back")[0]["reason"]
    second = recorder.names()[recorder.names().index("handed_back") :]
    assert second[second.index("lease") + 1] == "handed_back"  # the next lease is given up at the first failure


def test_who_can_not_connect_at_first_is_told_to_look_at_the_join_string(tmp_path: Path) -> None:
    async def scenario() -> Recorder:
        stop = Stop()
        recorder = Recorder(lambda event: stop.ask() if isinstance(event, Waiting) else None)
        run = SmallRun(tmp_path / "run")
        async with run:
            await run.stop()
            await work(run, tmp_path / "home", recorder, stop=stop)
        return recorder

    (waiting,) = asyncio.run(scenario()).named("waiting")
    assert waiting["reason"].endswith("Check host and port of the join string.")


def test_a_lease_with_hand_picked_shards_is_not_worked_on(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        stop = Stop()
        async with SmallRun(tmp_path / "run", units=1) as run:
            true_lease = run.make_lease
            names = {shard.sha256 for shard in run.config.data.shards}

            def other_shards(device: str, index: int) -> Lease:
                lease = true_lease(device, index)
                return replace(lease, shards=tuple(names - set(lease.shards)))

            run.make_lease = other_shards  # type: ignore[method-assign]
            recorder = Recorder(lambda event: stop.ask() if event.NAME == "waiting" else None)
            await work(run, tmp_path / "home", recorder, stop=stop)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert recorder.waits() == {"ANSWER_INVALID"}
    assert not recorder.named("lease")
    assert run.files.requests == []


def test_a_unit_that_diverges_is_handed_back_and_nothing_is_claimed(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        stop = Stop()
        recorder = Recorder(lambda event: stop.ask() if event.NAME == "waiting" else None)
        run = SmallRun(tmp_path / "run", units=1, steps=20)
        run.config = replace(run.config, training=replace(run.config.training, lr=1e30))
        run.republish_genesis()
        async with run:
            await work(run, tmp_path / "home", recorder, stop=stop)
            return run, recorder

    run, recorder = asyncio.run(scenario())

    assert "TRAINING_DIVERGED" in recorder.waits()
    assert recorder.named("handed_back")
    assert "SubmitClaim" not in run.log


def test_a_lease_whose_result_was_refused_before_is_handed_back_and_not_trained_again(tmp_path: Path) -> None:
    async def scenario() -> tuple[SmallRun, Recorder]:
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.errors["SubmitClaim"] = [ClaimMismatch()]
            run.errors["HandBack"] = [ClaimMismatch()]  # so that the lease stays this device's
            first = Recorder()
            await work(run, tmp_path / "home", first, units=1)
            stop = Stop()
            second = Recorder(lambda event: stop.ask() if event.NAME == "waiting" else None)
            await work(run, tmp_path / "home", second, stop=stop)
            return run, second

    run, recorder = asyncio.run(scenario())

    assert not recorder.named("trained")
    assert [attempt.state for attempt in run.attempts] == ["back"]


def test_a_crashed_worker_gets_its_own_lease_again(tmp_path: Path) -> None:
    leases: list[LeaseId] = []

    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run", units=1, steps=2000) as run:
            stop = Stop()

            def crash(event: Event) -> None:
                if isinstance(event, Leased):
                    leases.append(LeaseId(event.lease))
                if isinstance(event, Step):
                    run.errors["HandBack"] = [Unreachable()] * 5
                    stop.raise_to(StopLevel.NOW)

            await work(run, tmp_path / "home", Recorder(crash), stop=stop)
            run.errors.clear()
            again = Stop()

            def note(event: Event) -> None:
                if isinstance(event, Leased):
                    leases.append(LeaseId(event.lease))
                    again.ask()

            await work(run, tmp_path / "home", Recorder(note), stop=again)
            return run

    run = asyncio.run(scenario())

    assert len(leases) == 2
    assert leases[0] == leases[1]
    assert len(run.attempts) == 1


def test_a_coordinator_that_names_an_absurd_wait_is_asked_again_after_minutes(tmp_path: Path) -> None:
    async def scenario() -> Recorder:
        stop = Stop()
        recorder = Recorder(lambda event: stop.ask() if isinstance(event, Waiting) else None)
        async with SmallRun(tmp_path / "run", units=1) as run:
            run.attempts.append(Attempt(lease=run.make_lease("d" * 64, 0), envelope=b""))
            run.finish_when_done, run.no_work_ms = False, 2**31 - 1
            await work(run, tmp_path / "home", recorder, stop=stop)
            return recorder

    (waiting,) = asyncio.run(scenario()).named("waiting")

    assert (waiting["reason"], waiting["seconds"]) == ("all units are given out", 300)


@pytest.mark.parametrize("call", ["GetEndpoint", "LeaseUnit"])
def test_what_grpc_itself_refuses_is_told_with_its_own_words(tmp_path: Path, call: str) -> None:
    async def refuse(request: object, context: Any) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)")

    async def scenario() -> Recorder:
        stop = Stop()
        recorder = Recorder(lambda event: stop.ask() if isinstance(event, Waiting) else None)
        run = SmallRun(tmp_path / "run", units=1)
        setattr(run, call, refuse)
        async with run:
            await work(run, tmp_path / "home", recorder, stop=stop)
        return recorder

    waiting = asyncio.run(scenario()).named("waiting")[0]

    assert waiting["code"] == "UNREACHABLE"
    assert "RESOURCE_EXHAUSTED" in waiting["reason"]
    assert "Received message larger than max (5 vs. 4)" in waiting["reason"]
