"""Receiving artifacts: a stream of chunks becomes a staged file, then a checked blob, then a signed receipt.

In this order: staged bytes, their fsync, the blob's place, the database commit, the receipt. A break anywhere leaves
either the bytes to be continued or the receipt to be asked for again.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from coordinator import claims
from coordinator.blobs import BlobStore
from coordinator.desk import Desk
from coordinator.sessions import Session
from coordinator.settler_client import SettlerClient
from coordinator.staging import Staging
from protocol.documents import Digest
from protocol.errors import (
    BytesRefused,
    DeltaTruncated,
    DigestMismatch,
    Refusal,
    ServerBusy,
    UploadInProgress,
    UploadOffsetWrong,
)
from protocol.limits import SETTLER_PATIENCE_MS, UPLOAD_CHUNK_BYTES

T = TypeVar("T")


class Decide(Protocol):
    """Runs a piece of work as one durable transaction."""

    async def __call__(self, work: Callable[[Desk], T]) -> T:
        """Return what the work returned."""
        ...


class Uploads:
    """Takes in what claims have promised. `changed` is awaited after each artifact that was accepted or rejected."""

    def __init__(
        self,
        *,
        decide: Decide,
        changed: Callable[[], Awaitable[None]],
        staging: Staging,
        blobs: BlobStore,
        settler: SettlerClient,
    ) -> None:
        self._decide = decide
        self._changed = changed
        self._staging = staging
        self._blobs = blobs
        self._settler = settler
        self._uploading: set[tuple[str, str]] = set()
        self._placing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def state(self, session: Session, claim: bytes, role: str) -> tuple[int, bytes]:
        """Return (bytes stored, receipt or nothing) of an artifact."""
        expected = await self._decide(lambda desk: claims.expected_artifact(desk, session, claim, role))
        if isinstance(expected, bytes):
            return 0, expected
        return await asyncio.to_thread(self._staging.offset, expected.claim, role), b""

    async def receive(
        self, session: Session, claim: bytes, role: str, offset: int, chunks: AsyncIterator[bytes]
    ) -> bytes:
        """Take an artifact's bytes from `offset` on; return the receipt once all are there and were checked.

        A stream that ends early keeps what it brought, and raises `DeltaTruncated`.
        """
        expected = await self._decide(lambda desk: claims.expected_artifact(desk, session, claim, role))
        if isinstance(expected, bytes):
            return expected
        place = (expected.claim, role)
        if place in self._uploading:
            raise UploadInProgress
        self._uploading.add(place)
        # A task of its own: a volunteer whose line breaks after the last byte finds the receipt when it asks again.
        receiving = asyncio.create_task(self._store_and_finish(place, expected, offset, chunks))
        try:
            return await asyncio.shield(receiving)
        except asyncio.CancelledError:
            receiving.add_done_callback(_look_at_the_end)
            raise

    async def _store_and_finish(
        self, place: tuple[str, str], expected: claims.Expected, offset: int, chunks: AsyncIterator[bytes]
    ) -> bytes:
        try:
            digest = await self._store_chunks(expected, offset, chunks)
            return await self._finish_upload(expected, digest)
        finally:
            self._uploading.discard(place)

    async def _store_chunks(self, expected: claims.Expected, offset: int, chunks: AsyncIterator[bytes]) -> str:
        """Append the stream to the staged file, hashing on the way; return the SHA-256 of the whole file."""
        artifact, claim = expected.artifact, expected.claim
        stored = await asyncio.to_thread(self._staging.offset, claim, artifact.role)
        if offset != stored:
            raise UploadOffsetWrong(f"The upload starts at byte {offset}, but {stored} bytes are stored.")
        hasher = hashlib.sha256()
        if offset:
            await asyncio.to_thread(_hash_prefix, self._staging.path(claim, artifact.role), offset, hasher)

        def store(at: int, data: bytes) -> None:
            self._staging.append(claim, artifact.role, at, data, artifact.size)
            hasher.update(data)

        storing: asyncio.Future[None] | None = None
        try:
            async for data in chunks:
                if storing is not None:
                    await storing
                # The next chunk travels while this one is hashed and written.
                storing = asyncio.ensure_future(asyncio.to_thread(store, offset, data))
                offset += len(data)
        finally:
            if storing is not None:
                await asyncio.shield(storing)
        if offset < artifact.size:
            raise DeltaTruncated(f"The upload ended at byte {offset} of {artifact.size}; continue from there.")
        return hasher.hexdigest()

    async def _finish_upload(self, expected: claims.Expected, digest: str) -> bytes:
        artifact, claim, lease = expected.artifact, expected.claim, expected.attempt.lease
        if digest != artifact.blob_sha256:
            await asyncio.to_thread(self._staging.discard, claim, artifact.role)
            raise DigestMismatch(
                f"The uploaded bytes have SHA-256 {digest[:12]}…, the claim says {artifact.blob_sha256[:12]}…; "
                "what was stored is thrown away, send it again from the start."
            )
        job: dict[str, Any] = {
            "path": str(self._staging.path(claim, artifact.role)),
            "unit": expected.attempt.unit,
            "artifact": asdict(artifact),
            "file_digest": digest,
        }
        if expected.sketch is not None:
            seed, value = expected.sketch
            job["sketch"] = {"seed": seed, "value": value.hex()}
        # The disk writes while the settler reads.
        syncing = asyncio.create_task(asyncio.to_thread(self._staging.sync, claim, artifact.role))
        syncing.add_done_callback(_look_at_the_end)
        try:
            async with asyncio.timeout(SETTLER_PATIENCE_MS / 1000):
                await self._settler.call("admit", **job)
            await syncing
        except TimeoutError:
            raise ServerBusy("The coordinator could not check the delta in time; it is kept, ask again.") from None
        except BytesRefused as refused:
            refusal: Refusal = refused
            await self._decide(lambda desk: claims.record_refused(desk, lease, refusal))
            await syncing
            await asyncio.to_thread(self._staging.discard, claim, artifact.role)
            await self._changed()
            raise
        # Two volunteers may bring the same bytes: one of them must not take them away that the other has a receipt for.
        placing = self._placing.setdefault(digest, asyncio.Lock())
        async with placing:
            await asyncio.to_thread(self._blobs.add, self._staging.path(claim, artifact.role), Digest(digest))
            try:
                receipt = await self._decide(lambda desk: claims.record_received(desk, lease))
            except Refusal:
                # The round moved on while the bytes travelled. No row will ever name this file: no sweep would find it.
                if not await self._decide(lambda desk: claims.has_receipt_for(desk, expected.attempt.unit, artifact)):
                    await asyncio.to_thread(self._blobs.remove, Digest(digest))
                raise
        await self._changed()
        return receipt


def _look_at_the_end(task: "asyncio.Task[Any]") -> None:
    """Take note of a task's end that perhaps nobody waits for any more, so that it is not reported as forgotten."""
    if not task.cancelled():
        task.exception()


def _hash_prefix(path: Path, length: int, hasher: "hashlib._Hash") -> None:
    with path.open("rb") as file:
        left = length
        while left and (data := file.read(min(UPLOAD_CHUNK_BYTES, left))):
            hasher.update(data)
            left -= len(data)
