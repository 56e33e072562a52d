"""Uploads of the same bytes by two volunteers, which honest work of one unit is."""

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from coordinator import bans
from coordinator.blobs import DirectoryBlobs
from coordinator.desk import Desk
from coordinator.settler_client import SettlerClient
from coordinator.staging import Staging
from coordinator.units import AttemptState
from coordinator.uploads import Uploads
from protocol.documents import Artifact, Digest, sign
from protocol.errors import BytesRefused
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import ESTABLISHED, LEASE_MS, TRAINING_MS, Volunteer, Work

T = TypeVar("T")
DELTA = b"x" * 1000
DIGEST = Digest(hashlib.sha256(DELTA).hexdigest())


class SlowBlobs(DirectoryBlobs):
    """Blobs on a disk that takes its time to remove one."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.removing = threading.Event()

    def remove(self, digest: Digest) -> None:
        self.removing.set()
        time.sleep(0.3)
        super().remove(digest)


def find_everything_good(connection: socket.socket) -> None:
    """Answer at the settler's end of its socket that every delta is one."""
    with connection, connection.makefile("rb") as lines:
        for line in lines:
            connection.sendall(json.dumps({"id": json.loads(line)["id"], "result": {}}).encode() + b"\n")


def claimed(office: Office, by: Volunteer) -> Work:
    """A unit that is leased, trained to `DELTA`, claimed and sketched."""
    work = office.lease(by)
    artifact = Artifact(role="delta", content_sha256=DIGEST, blob_sha256=DIGEST, size=len(DELTA))
    claim = replace(work.claim, artifacts=(artifact,))
    signed = replace(work, claim=claim, envelope=sign(claim, by.key))
    office.clock.advance(TRAINING_MS)
    office.claim(signed)
    office.sketch(signed)
    return signed


async def chunks() -> AsyncIterator[bytes]:
    yield DELTA


def test_an_upload_that_is_refused_does_not_take_away_the_same_bytes_of_another(
    opening: Opening, tmp_path: Path
) -> None:
    office = opening(floor=0, planned=9)
    slow, quick = (office.volunteer(name, record=ESTABLISHED) for name in ("slow", "quick"))
    first = claimed(office, slow)
    office.wait(LEASE_MS)  # late: the unit is open again
    second = claimed(office, quick)
    assert second.lease.unit == first.lease.unit
    blobs = SlowBlobs(tmp_path / "blobs")

    async def decide(work: Callable[[Desk], T]) -> T:
        return office._decide(work)

    async def changed() -> None:
        pass

    ours, its = socket.socketpair()
    threading.Thread(target=find_everything_good, args=(its,), daemon=True).start()

    async def both() -> tuple[BaseException | bytes, BaseException | bytes]:
        staging = Staging(tmp_path / "staging", reserve_bytes=0)
        settler = await SettlerClient.connect(ours)
        listening = asyncio.create_task(settler.listen())
        uploads = Uploads(decide=decide, changed=changed, staging=staging, blobs=blobs, settler=settler)
        refused = asyncio.create_task(uploads.receive(slow.session, first.digest, "delta", 0, banned_meanwhile()))
        await asyncio.to_thread(blobs.removing.wait, 10)
        receipt = asyncio.create_task(uploads.receive(quick.session, second.digest, "delta", 0, chunks()))
        one, other = await asyncio.gather(refused, receipt, return_exceptions=True)
        listening.cancel()
        return one, other

    async def banned_meanwhile() -> AsyncIterator[bytes]:
        yield DELTA
        office._decide(lambda desk: bans.ban(desk, slow.session.owner))

    refusal, receipt = asyncio.run(both())
    assert isinstance(refusal, BytesRefused)
    assert isinstance(receipt, bytes)
    assert office.attempt(second).state is AttemptState.RECEIVED
    assert blobs.has(DIGEST)
