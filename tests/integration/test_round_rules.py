"""What becomes of late work, of old deltas, and of the log, seen from outside over a whole small run."""

import asyncio
from contextlib import closing
from pathlib import Path

from coordinator.rounds import RoundState
from coordinator.sqlite_store import SqliteStore
from protocol import calls, layout
from protocol.documents import Verdict
from protocol.errors import RoundTooOld
from protocol.log import LogEntry, read_log
from tests.integration.live_run import LiveRun, until
from tests.integration.peer import Peer, Work, connected, refused


async def verdict(peer: Peer, work: Work) -> Verdict:
    """Wait for the verdict on a claim."""
    for _ in range(200):
        reply = await peer.call("GetVerdicts", calls.GetVerdictsRequest(claims=(work.digest,)))
        if reply.verdict_envelopes:
            return peer.trust.verdict(reply.verdict_envelopes[0])
        await asyncio.sleep(0.05)
    raise AssertionError("no verdict came")


def public_log(run: LiveRun, checkpoints: int) -> list[LogEntry]:
    """Read the whole public log, each entry checked against the one before."""
    entries: list[LogEntry] = []
    paths = [layout.log_path(number) for number in range(1, checkpoints + 1)]
    for path in (*paths, layout.LOG_TAIL):
        position, head = (entries[-1].position, entries[-1].head) if entries else (0, bytes(32))
        entries += read_log((run.directory.public / path).read_bytes(), position=position, head=head)
    return entries


def test_late_work_is_merged_into_the_next_round_with_a_discount(folder: Path) -> None:
    settings = ("rounds.units=3", "rounds.min_units=2", "rounds.min_window_seconds=1", "rounds.planned=3")

    async def story(run: LiveRun) -> None:
        async with connected(run.join) as late, connected(run.join) as a, connected(run.join) as b:
            slow = late.work(await late.lease(), folder / "slow")
            for number, peer in enumerate((a, b)):
                await peer.deliver(peer.work(await peer.lease(), folder / f"1-{number}"))
            await asyncio.to_thread(run.await_checkpoint, 1)
            await late.deliver(slow)
            for number, peer in enumerate((a, b)):
                await peer.deliver(peer.work(await peer.lease(), folder / f"2-{number}"))
            await asyncio.to_thread(run.await_checkpoint, 2)
            manifest = run.directory.trust().manifest((run.directory.checkpoint(2) / layout.MANIFEST).read_bytes())
            rounds = {entry.claim: entry.round for entry in manifest.merged}
            weights = {entry.claim: entry.weight for entry in manifest.merged}
            assert rounds[slow.digest.hex()] == 1
            assert len(weights) == 3
            others = [weight for claim, weight in weights.items() if claim != slow.digest.hex()]
            assert weights[slow.digest.hex()] < min(others)
            judged = await verdict(late, slow)
            assert (judged.outcome, judged.checkpoint) == ("accepted", 2)

    with LiveRun(folder, settings) as run:
        asyncio.run(story(run.start()))


def test_an_expired_units_first_holder_may_still_deliver_and_the_second_becomes_a_replica(folder: Path) -> None:
    settings = ("rounds.units=2", "rounds.min_units=2", "rounds.planned=1", "rounds.lease_seconds=1")

    async def story(run: LiveRun) -> None:
        async with connected(run.join) as first, connected(run.join) as second:
            work = first.work(await first.lease(), folder / "first")
            await asyncio.sleep(2)
            replica = second.work(await second.lease(), folder / "second")
            assert replica.lease.unit == work.lease.unit
            await first.deliver(work)
            await second.deliver(replica)
            assert (await verdict(second, replica)).code == "REPLICA"
            await first.deliver(first.work(await first.lease(), folder / "last"))
            assert (await verdict(first, work)).code == "MERGED"

    with LiveRun(folder, settings) as run:
        asyncio.run(story(run.start()))


def test_after_the_last_round_everything_has_its_verdict_and_the_log_is_whole(folder: Path) -> None:
    settings = ("rounds.units=3", "rounds.min_units=1", "rounds.min_window_seconds=1", "rounds.planned=1")

    async def story(run: LiveRun) -> None:
        async with connected(run.join) as late, connected(run.join) as peer, connected(run.join) as later:
            slow = late.work(await late.lease(), folder / "slow")
            slower = later.work(await later.lease(), folder / "slower")
            await late.sketch(slow, await late.submit(slow))
            await peer.deliver(peer.work(await peer.lease(), folder / "quick"))
            await asyncio.to_thread(run.await_checkpoint, 1)
            await late.upload(slow)
            judged = await verdict(late, slow)
            assert (judged.outcome, judged.code, judged.weight) == ("accepted", "TOO_LATE", 0)
            refusal = await refused(later.submit(slower))
            assert isinstance(refusal, RoundTooOld)
            assert "The run has ended with checkpoint 1" in refusal.message

    with LiveRun(folder, settings) as run:
        asyncio.run(story(run.start()))

        def tail_is_there() -> bool:
            return (run.directory.public / layout.LOG_TAIL).exists()

        until(tail_is_there, 20, "the log's tail")
        entries = public_log(run, 1)
        assert [entry.position for entry in entries] == list(range(1, len(entries) + 1))
        assert {"epoch-opened", "claim", "bytes", "closed", "published", "verdict", "epoch-revealed"} <= {
            entry.kind for entry in entries
        }


def test_only_the_newest_deltas_are_kept_where_the_operator_says_so(folder: Path) -> None:
    settings = ("rounds.units=1", "rounds.min_units=1", "rounds.planned=3", "storage.retain_rounds=1")

    async def story(run: LiveRun) -> list[Work]:
        works = []
        async with connected(run.join) as peer:
            for number in range(1, 4):
                works.append(peer.work(await peer.lease(), folder / str(number)))
                await peer.deliver(works[-1])
                await asyncio.to_thread(run.await_checkpoint, number)
        return works

    with LiveRun(folder, settings) as run:
        works = asyncio.run(story(run.start()))

        def kept() -> list[str]:
            return sorted(path.name for path in (run.directory.public / "deltas").iterdir())

        newest = works[-1].claim.artifacts[0].blob_sha256
        until(lambda: kept() == [f"{newest}.safetensors.zst"], 20, f"pruning (kept {kept()})")
        stored = [path.name for path in run.directory.blobs.rglob("*") if path.is_file()]
        assert stored == [newest]
        with closing(SqliteStore.open(run.directory.database)) as store:
            last = store.latest_round()
            assert last is not None
            assert last.state is RoundState.PUBLISHED
