"""What was tried against a served run, and must never work again."""

import asyncio
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from protocol import calls
from protocol.canonical import canonical_json, parse_json
from protocol.documents import DeviceDelegation, payload_of, sign
from protocol.envelope import seal
from protocol.errors import CommonweightError
from protocol.limits import MAX_CALLS_AT_ONCE_PER_ADDRESS, MAX_HTTP_CONNECTIONS_PER_ADDRESS, MAX_STREAMS_PER_CONNECTION
from tests.integration.live_run import LiveRun, until
from tests.integration.peer import Peer, Work, connected, refused


async def deliver(run: LiveRun, folder: Path, count: int) -> list[Work]:
    """Deliver units, each from a new peer."""
    works = []
    for _ in range(count):
        async with connected(run.join) as peer:
            lease = await peer.lease()
            works.append(peer.work(lease, folder / lease.lease))
            await peer.deliver(works[-1])
    return works


def test_calls_without_a_message_lose_their_place_and_others_learn_why_they_wait(folder: Path) -> None:
    async def story(run: LiveRun) -> None:
        async with ExitStackOfPeers(run, MAX_CALLS_AT_ONCE_PER_ADDRESS // MAX_STREAMS_PER_CONNECTION) as peers:
            silent: list[Any] = [
                peer.channel.stream_unary("/commonweight.v1.Coordinator/GetNonce")()
                for peer in peers
                for _ in range(MAX_STREAMS_PER_CONNECTION)
            ]
            await asyncio.sleep(2)
            with pytest.raises(CommonweightError) as caught:
                async with connected(run.join):
                    pass
            assert caught.value.code == "SERVER_BUSY"
            await asyncio.sleep(12)  # the silent ones have been shown out
            async with connected(run.join) as peer:
                assert await peer.lease()
            for call in silent:
                call.cancel()

    with LiveRun(folder) as run:
        asyncio.run(story(run.start()))


class ExitStackOfPeers:
    """Several connections to a run at once."""

    def __init__(self, run: LiveRun, count: int) -> None:
        self._managers = [connected(run.join, session=False) for _ in range(count)]

    async def __aenter__(self) -> list[Peer]:
        return [await manager.__aenter__() for manager in self._managers]

    async def __aexit__(self, *error: object) -> None:
        for manager in self._managers:
            with suppress(grpc.aio.AioRpcError, CommonweightError):
                await manager.__aexit__(None, None, None)


def test_silent_http_connections_are_dropped_and_shut_out_only_their_own_address(served: LiveRun) -> None:
    with ExitStack() as stack:
        for _ in range(MAX_HTTP_CONNECTIONS_PER_ADDRESS + 20):
            with suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", int(served.public_url.rpartition(":")[2]))))

        def answers() -> bool:
            with suppress(OSError), urllib.request.urlopen(f"{served.public_url}/run.json", timeout=2) as reply:
                return bool(reply.status == 200)
            return False

        until(answers, 25, "an answer over HTTP, with the silent connections still open at our end")


def test_padded_documents_are_refused_and_a_device_without_work_leaves_nothing_behind(served: LiveRun) -> None:
    async def story() -> None:
        async with connected(served.join, session=False) as peer:
            proof = await peer.proof()
            delegation = DeviceDelegation(
                owner_public_key=peer.owner.public.hex, device_public_key=peer.device.public.hex
            )
            members = parse_json(payload_of(delegation)) | {"padding": "x" * 100_000}
            padded = seal(canonical_json(members), DeviceDelegation.TYPE, peer.owner)
            request = calls.OpenSessionRequest(proof_envelope=sign(proof, peer.device), delegation_envelope=padded)
            assert (await refused(peer.call("OpenSession", request))).code == "ENVELOPE_INVALID"
            before = served.directory.database.read_bytes()
            await peer.open_session()
            digest = hashlib.sha256(before).digest()
            assert hashlib.sha256(served.directory.database.read_bytes()).digest() == digest

    asyncio.run(story())


def test_one_owner_cannot_hold_a_whole_round(folder: Path) -> None:
    async def story(run: LiveRun) -> None:
        async with connected(run.join) as first:
            held, reason = 0, ""
            for _ in range(8):
                async with connected(run.join, session=False) as device:
                    device.owner = first.owner
                    await device.open_session()
                    reply = await device.call("LeaseUnit", calls.LeaseUnitRequest(wait_ms=0))
                    held += bool(reply.lease_envelope)
                    reason = reply.reason
            assert held == 4
            assert "owner" in reason
            async with connected(run.join) as other:
                assert await other.lease()

    with LiveRun(folder, ("rounds.units=8", "rounds.min_units=8")) as run:
        asyncio.run(story(run.start()))


@pytest.mark.parametrize("offset", [1, 5, 10**6, 2**63])
def test_an_upload_from_beyond_the_stored_bytes_is_refused_and_costs_nothing(
    served: LiveRun, folder: Path, offset: int
) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            await peer.sketch(work, await peer.submit(work))
            assert (await refused(peer.upload(work, offset=offset, data=b""))).code == "UPLOAD_OFFSET_WRONG"
            assert (await refused(peer.upload(work, data=work.path.read_bytes()[:1000]))).code == "DELTA_TRUNCATED"
            assert (await refused(peer.upload(work, offset=offset + 1000, data=b""))).code == "UPLOAD_OFFSET_WRONG"
            assert await peer.offset(work) == 1000

    asyncio.run(story())


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated", "gone"])
def test_a_delta_that_the_disk_has_damaged_is_never_merged_and_the_run_goes_on_once_it_is_restored(
    folder: Path, damage: str
) -> None:
    settings = ("rounds.units=3", "rounds.min_units=2", "rounds.min_window_seconds=5", "rounds.planned=1")
    with LiveRun(folder, settings) as run:
        run.start()
        works = asyncio.run(deliver(run, folder, 2))
        blob = next(run.directory.blobs.rglob(works[0].claim.artifacts[0].blob_sha256))
        kept = folder / "kept"
        shutil.copy(blob, kept)
        blob.unlink()
        raw = bytearray(kept.read_bytes())
        raw[-100] ^= 0x10
        if damage != "gone":
            blob.write_bytes(raw if damage == "a flipped bit" else raw[:1000])
        until(lambda: "restore the file" in run.log.read_text(), 60, "the complaint")
        assert works[0].digest.hex()[:12] in run.log.read_text()
        assert not run.published(1)
        blob.unlink(missing_ok=True)
        shutil.copy(kept, blob)
        run.await_checkpoint(1)


def test_a_settler_that_hangs_does_not_lose_an_upload(folder: Path) -> None:
    async def story(run: LiveRun) -> None:
        async with connected(run.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            await peer.sketch(work, await peer.submit(work))
            os.kill(run.pid("settler"), signal.SIGSTOP)
            sending = asyncio.create_task(peer.upload(work))
            await asyncio.sleep(2)
            assert not sending.done()
            os.kill(run.pid("settler"), signal.SIGCONT)
            assert peer.trust.bytes_receipt(await sending).claim == work.digest.hex()

    with LiveRun(folder) as run:
        asyncio.run(story(run.start()))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_does_not_end_the_coordinator(folder: Path) -> None:
    place = folder / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a file system")
    try:
        with LiveRun(place, ("rounds.units=2", "rounds.min_units=2", "rounds.planned=1")) as run:
            run.start()
            works = asyncio.run(deliver(run, folder, 1))
            ballast = place / "ballast"
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 12))
            time.sleep(6)
            assert run.supervisor is not None
            assert run.supervisor.poll() is None
            ballast.unlink()
            until(lambda: run.serving is not None, 60, "serving again")
            works += asyncio.run(deliver(run, folder, 1))
            run.await_checkpoint(1)
            assert len(works) == 2
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
