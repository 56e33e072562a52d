"""The coordinator is killed at the worst moments; no receipted delta is lost or merged twice, and the bytes agree."""

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.rounds import RoundState
from coordinator.sqlite_store import SqliteStore
from protocol import calls
from protocol.documents import Manifest
from protocol.errors import CommonweightError, TryLater
from tests.integration.live_run import LiveRun, until
from tests.integration.peer import Peer, Work, connected
from verify.checkpoint import verify_checkpoint
from verify.rebuild import rebuild

WINDOW = ("rounds.units=3", "rounds.min_units=2", "rounds.min_window_seconds=3", "rounds.planned=2")


def round_state(run: LiveRun, number: int) -> RoundState | None:
    """Look into the database which state a round is in."""
    with closing(SqliteStore.open(run.directory.database)) as store:
        found = store.round(number)
        return None if found is None else found.state


def manifest(run: LiveRun, checkpoint: int) -> Manifest:
    """Return a published manifest, checked."""
    verify_checkpoint(run.directory.checkpoint(checkpoint), run.join.run)
    return run.directory.trust().manifest((run.directory.checkpoint(checkpoint) / "manifest.json").read_bytes())


async def deliver(run: LiveRun, folder: Path, count: int) -> list[Work]:
    """Deliver `count` made-up units, each from a new peer; return what was receipted."""
    done = []
    for _ in range(count):
        async with connected(run.join) as peer:
            lease = await peer.lease()
            work = peer.work(lease, folder / lease.lease)
            assert peer.trust.bytes_receipt(await peer.deliver(work)).claim == work.digest.hex()
            done.append(work)
    return done


def assert_merged_once(run: LiveRun, works: list[Work], checkpoints: int) -> None:
    """Every receipted delta is in exactly one manifest; and the deltas rebuild to the published bytes."""
    merged = [entry.claim for k in range(1, checkpoints + 1) for entry in manifest(run, k).merged]
    assert sorted(merged) == sorted(work.digest.hex() for work in works)
    out = run.folder / "rebuilt"
    rebuild(run.directory.public, out, on_round=lambda _: None)


def test_killed_while_collecting_it_goes_on_with_every_receipted_delta(folder: Path) -> None:
    with LiveRun(folder, ("rounds.units=3", "rounds.min_units=3", "rounds.planned=1")) as run:
        run.start()
        works = asyncio.run(deliver(run, folder, 2))
        run.kill_all()
        run.start()
        works += asyncio.run(deliver(run, folder, 1))
        run.await_checkpoint(1)
        assert_merged_once(run, works, 1)


def test_killed_while_merging_it_merges_the_same_set_again(folder: Path) -> None:
    with LiveRun(folder, WINDOW) as run:
        run.start()
        works = asyncio.run(deliver(run, folder, 2))
        os.kill(run.pid("settler"), signal.SIGSTOP)  # the merge will begin, and not end
        until(lambda: round_state(run, 1) is RoundState.MERGING, 30, "merging")
        os.kill(run.pid("settler"), signal.SIGCONT)
        os.kill(run.pid("supervisor"), signal.SIGKILL)
        run.kill_all()
        run.start()
        run.await_checkpoint(1)
        assert_merged_once(run, works, 1)


def test_killed_while_publishing_it_publishes_the_same_bytes(folder: Path) -> None:
    with LiveRun(folder, WINDOW) as run:
        run.start()
        deltas = run.directory.public / "deltas"
        shutil.rmtree(deltas, ignore_errors=True)
        deltas.write_text("in the way")  # everything is merged and put together, and then this can't be written
        works = asyncio.run(deliver(run, folder, 2))
        making = run.directory.public / "checkpoints" / ".making-000001" / "manifest.json"
        until(lambda: (making.parent / "root.pub").exists(), 60, "a checkpoint in the making")
        run.kill_all()
        before_publishing = folder / "before.sqlite"
        with closing(SqliteStore.open(run.directory.database)) as store:
            store.backup_to(before_publishing)
        deltas.unlink()
        run.start()
        run.await_checkpoint(1)
        until(lambda: round_state(run, 1) is RoundState.PUBLISHED, 30, "the database's knowledge of it")
        published = (run.directory.checkpoint(1) / "manifest.json").read_bytes()
        run.kill_all()
        # The database as it was between the manifest's rename and the commit that records it:
        for path in run.directory.root.glob("state.sqlite*"):
            path.unlink()
        shutil.copy(before_publishing, run.directory.database)
        run.start()
        until(lambda: round_state(run, 1) is RoundState.PUBLISHED, 30, "the manifest's adoption")
        assert (run.directory.checkpoint(1) / "manifest.json").read_bytes() == published
        assert_merged_once(run, works, 1)


def test_verdicts_and_receipts_survive_a_crash(folder: Path) -> None:
    async def story(run: LiveRun) -> None:
        async with connected(run.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            receipt = await peer.deliver(work)
            run.await_checkpoint(1)
            run.kill_all()
            run.start()
            async with connected(run.join, session=False) as again:
                again.device, again.owner = peer.device, peer.owner
                await again.open_session()
                assert await again.upload(work) == receipt
                reply = await again.call("GetVerdicts", calls.GetVerdictsRequest(claims=(work.digest,)))
                verdict = again.trust.verdict(reply.verdict_envelopes[0])
                assert (verdict.outcome, verdict.checkpoint, verdict.weight) == ("accepted", 1, 2**24)

    with LiveRun(folder, ("rounds.units=1", "rounds.min_units=1", "rounds.planned=2")) as run:
        run.start()
        asyncio.run(story(run))


async def stubborn(run: LiveRun, folder: Path, name: str, works: dict[str, Work], until_round: int) -> None:
    """Deliver units for ever, over every kill, like a worker that spools: a claimed unit is brought to its receipt."""
    peer_keys: Peer | None = None
    pending: Work | None = None
    while not run.published(until_round):
        try:
            async with connected(run.join, session=False) as peer:
                if peer_keys is not None:
                    peer.device, peer.owner = peer_keys.device, peer_keys.owner
                peer_keys = peer
                await peer.open_session()
                while True:
                    if pending is None:
                        lease = await peer.lease(wait_ms=500)
                        pending = peer.work(lease, folder / f"{name}-{lease.lease}")
                    await asyncio.sleep(0.5)  # so that the kills, not the deliveries, decide how long it takes
                    await peer.deliver(pending)
                    works[pending.digest.hex()] = pending
                    pending = None
        except (TryLater, AssertionError, OSError, TimeoutError):
            await asyncio.sleep(0.1)
        except CommonweightError as error:
            if error.code == "RUN_FINISHED":
                return
            if error.code not in {"SESSION_REQUIRED", "NONCE_UNKNOWN"}:
                raise


async def kill_at_random(run: LiveRun, chance: random.Random, until_round: int) -> int:
    """Kill one process or all of them, five times or until a round is published; return how often."""
    kills = 0  # after each of one process the supervisor waits twice as long as after the last
    while not run.published(until_round):
        await asyncio.sleep(chance.uniform(0.1, 1.0))
        if kills < 5 and run.serving is not None:
            victim = chance.choice(["supervisor", "control_process", "settler"])
            if victim == "supervisor":
                await asyncio.to_thread(run.kill_all)
                await asyncio.to_thread(run.start)
            else:
                before = run.pid(victim)
                os.kill(before, signal.SIGKILL)
                await asyncio.to_thread(restarted, run, victim, before)
            kills += 1
    return kills


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments_it_ends_with_every_receipted_delta_merged_once(folder: Path) -> None:
    rounds = 6
    settings = (
        "rounds.units=3",
        "rounds.min_units=3",
        f"rounds.planned={rounds}",
        "rounds.staleness_bound=3",
        "storage.snapshot_every=1",
    )
    chance = random.Random(20261123)
    with LiveRun(folder, settings) as run:
        run.start()
        works: dict[str, Work] = {}

        async def story() -> int:
            async with asyncio.timeout(400), asyncio.TaskGroup() as group:
                for n in range(2):
                    group.create_task(stubborn(run, folder, f"peer{n}", works, rounds))
                killing = group.create_task(kill_at_random(run, chance, rounds))
            return killing.result()

        kills = asyncio.run(story())
        assert kills >= 3
        until(lambda: round_state(run, rounds) is RoundState.PUBLISHED, 30, "the end")
        merged = [entry.claim for k in range(1, rounds + 1) for entry in manifest(run, k).merged]
        assert len(merged) == len(set(merged))
        assert set(works) <= set(merged) | replicas(run)
        rebuild(run.directory.public, run.folder / "rebuilt", on_round=lambda _: None)


def restarted(run: LiveRun, victim: str, before: int) -> None:
    """Wait until the supervisor has everything up again."""

    def anew() -> bool:
        serving = run.serving
        return serving is not None and serving.pids[victim] != before

    until(anew, 60, "the restart")


def replicas(run: LiveRun) -> set[str]:
    """Return the claims whose unit another attempt had settled first: receipted, credited, not merged."""
    with closing(sqlite3.connect(run.directory.database)) as connection:
        rows = connection.execute(
            "SELECT a.claim_sha256 FROM attempts a JOIN units u ON u.unit = a.unit WHERE u.chosen <> a.lease"
        )
        return {row[0] if isinstance(row[0], str) else row[0].hex() for row in rows if row[0] is not None}


def test_a_second_coordinator_over_the_same_directory_is_refused(folder: Path) -> None:
    with LiveRun(folder) as run:
        run.start()
        began = time.monotonic()
        from coordinator.serve import serve
        from protocol.errors import DirectoryInUse

        with pytest.raises(DirectoryInUse):
            serve(run.directory, auditor=None)
        assert time.monotonic() - began < 20
