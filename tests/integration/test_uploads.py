"""An upload that is cut resumes where it stopped; a full disk on the coordinator loses nothing."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import TryLater, UploadInProgress
from tests.integration.cutter import Cutter
from tests.integration.live_run import LiveRun
from tests.integration.peer import Peer, Work, connected, refused

CHUNK = 8_192


async def settled_offset(peer: Peer, work: Work) -> int:
    """Return the stored offset once it has stopped moving: the server may still be writing what it had received."""
    before = -1
    while (now := await peer.offset(work)) != before:
        before = now
        await asyncio.sleep(0.2)
    return now


@pytest.fixture
def cutter(served: LiveRun) -> Iterator[Cutter]:
    """A proxy before the served run."""
    proxy = Cutter(served.join.port)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_upload_cut_at_a_random_byte_resumes_at_the_offset(
    served: LiveRun, cutter: Cutter, folder: Path, seed: int
) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            size = work.path.stat().st_size
            receipt = await peer.submit(work)
            await peer.sketch(work, receipt)
            async with connected(served.join, session=False, address=f"127.0.0.1:{cutter.port}") as cut:
                cut.device, cut.owner, cut.token = peer.device, peer.owner, peer.token
                where = random.Random(seed).randrange(size // 4, size)
                cutter.cut_after(where)
                assert isinstance(await refused(cut.upload(work, chunk=CHUNK)), TryLater)
                assert cutter.cuts == 1
            offset = await settled_offset(peer, work)
            assert where - 4 * CHUNK < offset <= where  # whole chunks that arrived are kept; TLS and framing cost some
            assert peer.trust.bytes_receipt(await peer.upload(work, offset=offset)).claim == work.digest.hex()

    asyncio.run(story())


def test_many_small_pieces_arrive_as_one(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            raw = work.path.read_bytes()
            receipt = await peer.submit(work)
            await peer.sketch(work, receipt)
            places = [0, 1, 1000, len(raw) // 2, len(raw) - 1, len(raw)]
            for start, end in itertools.pairwise(places[:-1]):
                assert (await refused(peer.upload(work, offset=start, data=raw[start:end]))).code == "DELTA_TRUNCATED"
                assert await peer.offset(work) == end
            assert await peer.upload(work, offset=places[-2])

    asyncio.run(story())


def test_two_connections_cannot_send_one_artifact_at_once(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            receipt = await peer.submit(work)
            await peer.sketch(work, receipt)
            outcomes = await asyncio.gather(*(peer.upload(work) for _ in range(4)), return_exceptions=True)
            assert sum(isinstance(outcome, bytes) for outcome in outcomes) >= 1
            for outcome in outcomes:
                if not isinstance(outcome, bytes):
                    assert getattr(outcome, "code", "") in {UploadInProgress.code, "UPLOAD_OFFSET_WRONG"}, outcome

    asyncio.run(story())


def set_reserve(run: LiveRun, before: int, after: int) -> None:
    """Stop the coordinator, change its disk reserve, and serve again."""
    run.stop()
    settings = run.directory.settings_file
    text = settings.read_text()
    assert f"reserve_mib = {before}\n" in text
    settings.write_text(text.replace(f"reserve_mib = {before}\n", f"reserve_mib = {after}\n"))
    run.start()


def test_below_its_disk_reserve_the_coordinator_takes_no_uploads_and_says_so(folder: Path) -> None:
    async def claim(run: LiveRun) -> tuple[Peer, Work]:
        async with connected(run.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            receipt = await peer.submit(work)
            await peer.sketch(work, receipt)
            return peer, work

    async def deliver(run: LiveRun, peer: Peer, work: Work) -> bytes:
        async with connected(run.join, session=False) as again:
            again.device, again.owner = peer.device, peer.owner
            await again.open_session()
            return await again.upload(work)

    async def turned_away(run: LiveRun, peer: Peer, work: Work) -> None:
        for refusal in (await refused(deliver(run, peer, work)), await refused(claim(run))):
            assert isinstance(refusal, TryLater)
            assert refusal.code == "COORDINATOR_DISK_FULL"

    with LiveRun(folder) as run:
        run.start()
        peer, work = asyncio.run(claim(run))
        set_reserve(run, 1, 100_000_000)
        asyncio.run(turned_away(run, peer, work))
        set_reserve(run, 100_000_000, 1)
        assert asyncio.run(deliver(run, peer, work))
