"""Audits with every process real: the run's own auditor, workers, and peers that cheat over the wire."""

import asyncio
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from commonweight.demo_story import read_entries
from diloco.checkpoint import TensorFile
from diloco.container import Container, write_container
from diloco.determinism import set_precision
from diloco.shards import Shard
from protocol import calls, layout
from protocol.documents import Lease, Verdict
from protocol.errors import AppealRefused, AuditorRequired, OwnerBanned, StepOutOfOrder
from tests.integration.live_run import LiveRun, LiveWorker, command, environment, until
from tests.integration.peer import Peer, Work, connected, refused
from verify.replay import codec_config, delta_schema, replay_unit, shard_set

AUDITED = (
    "verification.mode=replay",
    "verification.probation=1",
    "verification.floor=1.0",
    "verification.referee_share=0",
    "rounds.units=2",
    "rounds.min_units=1",
    "rounds.min_window_seconds=0.1",
    "rounds.lease_seconds=60",
)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test in a loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run


def entries(run: LiveRun, kind: str) -> list[dict[str, Any]]:
    return [body for found, body in read_entries(run.directory.public) if found == kind]


def honest_work(peer: Peer, run: LiveRun, lease: Lease, path: Path) -> Work:
    """Train a leased unit as a worker would, from the files that the run publishes."""
    public = run.directory.public
    set_precision("cpu", 1)
    base = TensorFile.open(public / layout.checkpoint_directory(lease.round - 1) / layout.WEIGHTS).load()
    shards = shard_set(peer.config, [Shard.open(public / layout.shard_path(sha256)) for sha256 in lease.shards])
    _, encoded = replay_unit(peer.config, lease, base, shards, "cpu")
    write_container(path, encoded, bytes.fromhex(lease.unit))
    container = Container.open(path, delta_schema(peer.config), codec_config(peer.config), bytes.fromhex(lease.unit))
    return peer.claim_file(lease, path, container.content_digest().hex())


async def verdict_on(peer: Peer, work: Work, *, code: str | None = None, seconds: float = 60) -> Verdict:
    """Wait for a claim's verdict, or for one with this code."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reply = await peer.call("GetVerdicts", calls.GetVerdictsRequest(claims=(work.digest,)))
        for raw in reply.verdict_envelopes:
            verdict = peer.trust.verdict(raw)
            if code is None or verdict.code == code:
                return verdict
        await asyncio.sleep(0.1)
    raise AssertionError(f"no verdict {code or ''} on {work.claim.unit[:12]}")


async def establish(peer: Peer, run: LiveRun, folder: Path) -> Work:
    """Pass probation with one honest unit."""
    work = honest_work(peer, run, await peer.lease(), folder / f"{peer.device.public.key_id[:8]}.delta")
    await peer.deliver(work)
    assert (await verdict_on(peer, work)).code == "MERGED"
    return work


@pytest.fixture
def audited(folder: Path) -> Iterator[LiveRun]:
    with LiveRun(folder, (*AUDITED, "rounds.planned=50")) as run:
        yield run.start()


def test_a_run_of_newcomers_is_audited_by_its_own_auditor_merged_and_can_be_checked_by_anybody(folder: Path) -> None:
    settings = ("verification.mode=replay", "verification.probation=2", "rounds.units=2", "rounds.planned=3")
    with LiveRun(folder, (*settings, "rounds.min_units=1", "rounds.min_window_seconds=0.1")) as run:
        run.start()
        with LiveWorker(run, "ada") as ada:
            assert ada.wait(120) == 0
        run.await_checkpoint(3)
        until(lambda: len(entries(run, "epoch-revealed")) == 3, 20, "the secrets' revelation")

        assert {body["reason"] for body in entries(run, "audit")} <= {"probation", "drawn", "outlier", "few"}
        assert {body["finding"] for body in entries(run, "opinion")} == {"confirmed"}
        assert [body["event"] for body in entries(run, "owner")][:3] == ["audit-passed", "audit-passed", "promoted"]
        assert {"MERGED"} <= {verdict["code"] for verdict in ada.events("verdict")} <= {"MERGED", "TOO_LATE"}
        for check in (
            ["checkpoint", "rebuild", str(run.directory.root)],
            ["verify", "draws", str(run.directory.public)],
        ):
            done = subprocess.run(command(*check), env=environment(), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_the_auditor_ends_with_a_supervisor_that_is_killed_and_the_next_one_starts_its_own(folder: Path) -> None:
    with LiveRun(folder, (*AUDITED, "rounds.planned=50")) as run:

        def ready() -> int:
            return (run.directory.auditor_home / "auditor.log").read_text().count('"event": "ready"')

        run.start()
        until(lambda: ready() == 1, 60, "the auditor")
        run.kill_all()  # waits for the end of all that it started
        run.start()
        until(lambda: ready() == 2, 60, "another auditor")
        assert "DIRECTORY_IN_USE" not in run.log.read_text()


@in_loop
async def test_a_forged_delta_is_refuted_its_owner_banned_and_an_appeal_goes_to_a_second_auditor(
    audited: LiveRun, folder: Path
) -> None:
    async with connected(audited.join) as peer:
        work = peer.work(await peer.lease(), folder / "noise.delta")
        await peer.deliver(work)
        verdict = await verdict_on(peer, work)
        assert (verdict.outcome, verdict.code, verdict.weight) == ("rejected", "REPLAY_DIFFERS", 0)
        assert isinstance(await refused(peer.lease()), OwnerBanned)

        await peer.call("Appeal", calls.AppealRequest(claim=work.digest))
        await peer.call("Appeal", calls.AppealRequest(claim=work.digest))  # asking again is harmless
        second = folder / "second"
        done = subprocess.run(
            command("auditor", "init", "--home", str(second)),
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        public_key = next(word for word in done.stdout.split() if len(word) == 64)
        subprocess.run(
            command(
                "coordinator", "delegate", str(audited.directory.root), "--root-key", str(folder / "root.pem"),
                "--auditor", public_key, "-o", str(second / "delegation.json"),
            ),
            env=environment(), check=True,
        )  # fmt: skip
        arguments = ["auditor", "start", "--join", str(audited.join), "--home", str(second), "--audits", "1"]
        done = subprocess.run(
            command(*arguments, "--threads", "1", "--json"),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        until(lambda: len(entries(audited, "opinion")) == 2, 20, "the second opinion")
        assert [body["finding"] for body in entries(audited, "opinion")] == ["refuted", "refuted"]
        assert len({body["auditor"] for body in entries(audited, "opinion")}) == 2
        assert isinstance(await refused(peer.call("Appeal", calls.AppealRequest(claim=work.digest))), AppealRefused)


@in_loop
async def test_an_established_volunteers_claim_goes_to_another_who_agrees_or_lies(
    audited: LiveRun, folder: Path
) -> None:
    async with connected(audited.join) as ada, connected(audited.join) as bob:
        await establish(ada, audited, folder)
        await establish(bob, audited, folder)

        claimed = honest_work(ada, audited, await ada.lease(), folder / "ada.delta")
        await ada.deliver(claimed)
        replica_lease = await bob.lease()
        assert replica_lease.unit == claimed.lease.unit, "an audit comes before new work"
        replica = honest_work(bob, audited, replica_lease, folder / "bob.delta")
        assert await bob.sketch(replica, await bob.submit(replica)) is calls.Instruction.KEEP
        assert (await verdict_on(bob, replica)).code == "REPLICA"
        assert (await verdict_on(ada, claimed)).code == "MERGED"

        accused = honest_work(ada, audited, await ada.lease(), folder / "accused.delta")
        await ada.deliver(accused)
        lie = bob.work(await bob.lease(), folder / "lie.delta")
        receipt = await bob.submit(lie)
        assert await bob.sketch(lie, receipt) is calls.Instruction.KEEP

        # The comparison takes a moment; until its bytes are wanted, there is nothing to upload to.
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with suppress(StepOutOfOrder):
                assert await bob.offset(lie) == 0
                break
            await asyncio.sleep(0.1)
        await bob.upload(lie)
        assert (await verdict_on(bob, lie)).code == "REPLAY_DIFFERS"
        assert (await verdict_on(ada, accused)).code == "MERGED"
        assert isinstance(await refused(bob.lease()), OwnerBanned)


@in_loop
async def test_only_an_auditor_may_judge_and_an_auditor_may_do_nothing_else(audited: LiveRun) -> None:
    async with connected(audited.join) as peer:
        for name, request in (
            ("TakeAudit", calls.TakeAuditRequest(wait_ms=0)),
            ("ReadArtifact", calls.ReadArtifactRequest(claim=bytes(32), role="delta", offset=0)),
            ("SubmitOpinions", calls.SubmitOpinionsRequest(opinion_envelopes=())),
        ):
            assert isinstance(await refused(peer.call(name, request)), AuditorRequired)


@in_loop
async def test_an_auditor_that_is_killed_is_started_again_and_finishes_what_it_had_begun(
    audited: LiveRun, folder: Path
) -> None:
    os.kill(audited.pid("auditor"), signal.SIGKILL)
    async with connected(audited.join) as peer:
        work = honest_work(peer, audited, await peer.lease(), folder / "ada.delta")
        await peer.deliver(work)
        assert (await verdict_on(peer, work, seconds=90)).code == "MERGED"


def test_status_says_who_is_trusted_and_what_waits_for_whom(audited: LiveRun) -> None:
    with LiveWorker(audited, "ada", "--units", "2") as ada:
        assert ada.wait(90) == 0

    def status() -> Any:
        done = subprocess.run(
            command("coordinator", "status", str(audited.directory.root), "--json"),
            env=environment(), capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    found = until(lambda: (now := status())["owners"] == {"established": 1} and now, 30, "the end of probation")
    assert found["audits"]["passed"] >= 1
    assert found["audits"]["failed"] == 0
