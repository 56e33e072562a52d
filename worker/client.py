"""The coordinator's calls as methods. Each signed answer is verified before anybody sees it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol import calls
from protocol.documents import Artifact, Digest, LeaseId, Verdict
from protocol.errors import ClaimMismatch
from protocol.limits import UPLOAD_CHUNK_BYTES, UPLOAD_MIN_BYTES_PER_MINUTE
from worker.calling import Caller, Metadata
from worker.leases import Grant
from worker.link import CALL_SECONDS, Link

LONGEST_UPLOAD_CALL_SECONDS: Final = 3600.0
"""An upload that takes longer goes on in another call, from where it stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoWork:
    """There is no unit now; ask again after `retry_after_ms`."""

    reason: str
    retry_after_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadStand:
    """How many bytes of an artifact are stored; and the verified receipt once all of the claim's bytes are."""

    offset: int
    receipt_envelope: bytes


class CoordinatorClient(Caller):
    """The calls of a session.

    All raise what the coordinator refused (a `Refusal`), or a `TryLater`: `Unreachable`, `AnswerInvalid`, or what it
    asked to wait for.
    """

    async def status(self) -> calls.GetStatusReply:
        """Return where the run stands."""
        async with self._using() as link:
            reply: calls.GetStatusReply = await self._ask(link, "GetStatus", calls.GetStatusRequest())
            return reply

    async def lease_unit(self, wait_ms: int) -> Grant | NoWork:
        """Return the unit that this device holds already, else a new one, else why there is none.

        Raises:
            RunFinished: there will be no more.
        """
        request = calls.LeaseUnitRequest(wait_ms=wait_ms)

        async def ask(link: Link, metadata: Metadata) -> Grant | NoWork:
            reply = await self._ask(link, "LeaseUnit", request, metadata, seconds=CALL_SECONDS + wait_ms / 1000)
            if not reply.lease_envelope:
                return NoWork(reason=reply.reason, retry_after_ms=reply.retry_after_ms)
            with self._believing(link):
                lease = link.trust.lease(reply.lease_envelope)
            return Grant(
                lease=lease,
                envelope=reply.lease_envelope,
                remaining_ms=reply.remaining_ms,
                base_checkpoint=reply.base_checkpoint,
            )

        return await self._in_session(ask)

    async def hand_back(self, lease: LeaseId) -> None:
        """Give a unit back."""
        await self._in_session(
            lambda link, metadata: self._ask(link, "HandBack", calls.HandBackRequest(lease=lease), metadata)
        )

    async def submit_claim(self, claim: Digest, envelope: bytes) -> tuple[bytes, calls.Instruction]:
        """Commit to a result; return the verified receipt's envelope and what comes next."""
        request = calls.SubmitClaimRequest(claim_envelope=envelope)

        async def ask(link: Link, metadata: Metadata) -> tuple[bytes, calls.Instruction]:
            reply = await self._ask(link, "SubmitClaim", request, metadata)
            with self._believing(link):
                if link.trust.claim_receipt(reply.receipt_envelope).claim != claim:
                    raise ClaimMismatch("The receipt is for another claim.")
            return reply.receipt_envelope, reply.next

        return await self._in_session(ask)

    async def submit_sketch(self, claim: Digest, sketch: bytes) -> calls.Instruction:
        """Send the sketch of a claim's delta; return what comes next."""
        request = calls.SubmitSketchRequest(claim=bytes.fromhex(claim), sketch=sketch)

        async def ask(link: Link, metadata: Metadata) -> calls.Instruction:
            reply: calls.SubmitSketchReply = await self._ask(link, "SubmitSketch", request, metadata)
            return reply.next

        return await self._in_session(ask)

    async def upload_stand(self, claim: Digest, artifacts: tuple[Artifact, ...], role: str) -> UploadStand:
        """Return how far an upload has come."""
        request = calls.GetUploadRequest(claim=bytes.fromhex(claim), role=role)

        async def ask(link: Link, metadata: Metadata) -> UploadStand:
            reply = await self._ask(link, "GetUpload", request, metadata)
            self._check_bytes_receipt(link, reply.receipt_envelope, claim, artifacts)
            return UploadStand(offset=reply.offset, receipt_envelope=reply.receipt_envelope)

        return await self._in_session(ask)

    async def upload(
        self,
        claim: Digest,
        artifacts: tuple[Artifact, ...],
        role: str,
        path: Path,
        offset: int,
        on_sent: Callable[[int], None],
    ) -> bytes:
        """Send an artifact from `offset` on; return the verified receipt's envelope, or empty if others are missing.

        Args:
            on_sent: told the number of bytes of each chunk that was handed to the connection.
        """
        remaining = sum(artifact.size for artifact in artifacts if artifact.role == role) - offset
        seconds = min(LONGEST_UPLOAD_CALL_SECONDS, 60.0 + 60.0 * remaining / UPLOAD_MIN_BYTES_PER_MINUTE)

        async def ask(link: Link, metadata: Metadata) -> bytes:
            requests = _upload_requests(claim, role, path, offset, on_sent)
            reply: calls.UploadReply = await self._ask(link, "Upload", requests, metadata, seconds=seconds)
            self._check_bytes_receipt(link, reply.receipt_envelope, claim, artifacts)
            return reply.receipt_envelope

        return await self._in_session(ask)

    async def verdicts(self, claims: tuple[Digest, ...]) -> tuple[tuple[bytes, Verdict], ...]:
        """Return the verified verdicts, with their envelopes, that are known for these claims."""
        request = calls.GetVerdictsRequest(claims=tuple(bytes.fromhex(claim) for claim in claims))

        async def ask(link: Link, metadata: Metadata) -> tuple[tuple[bytes, Verdict], ...]:
            reply = await self._ask(link, "GetVerdicts", request, metadata)
            with self._believing(link):
                found = tuple((raw, link.trust.verdict(raw)) for raw in reply.verdict_envelopes)
            return tuple((raw, verdict) for raw, verdict in found if verdict.claim in claims)

        return await self._in_session(ask)

    async def appeal(self, claim: Digest) -> None:
        """Ask for a second referee on a rejected claim.

        Raises:
            AppealRefused, ClaimUnknown: there is nothing to appeal against.
        """
        request = calls.AppealRequest(claim=bytes.fromhex(claim))
        await self._in_session(lambda link, metadata: self._ask(link, "Appeal", request, metadata))

    def _check_bytes_receipt(self, link: Link, envelope: bytes, claim: Digest, artifacts: tuple[Artifact, ...]) -> None:
        if not envelope:
            return
        with self._believing(link):
            receipt = link.trust.bytes_receipt(envelope)
            if receipt.claim != claim or receipt.artifacts != artifacts:
                # Stops a receipt for other work, or for other bytes, from letting this delta be deleted.
                raise ClaimMismatch("The receipt is for another claim or for other bytes.")


async def _upload_requests(
    claim: Digest, role: str, path: Path, offset: int, on_sent: Callable[[int], None]
) -> AsyncIterator[calls.UploadRequest]:
    end = (await asyncio.to_thread(path.stat)).st_size
    first, at = True, offset
    while first or at < end:
        data = await asyncio.to_thread(_read_chunk, path, at)
        if first:
            yield calls.UploadRequest(claim=bytes.fromhex(claim), role=role, offset=offset, data=data)
        else:
            yield calls.UploadRequest(data=data)
        if not data:
            return  # a message without data, or a file that was cut meanwhile: the coordinator will say what it misses
        first, at = False, at + len(data)
        on_sent(len(data))


def _read_chunk(path: Path, offset: int) -> bytes:
    # Opened anew for each chunk: a stream that is broken off in the middle leaves no open file behind.
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(UPLOAD_CHUNK_BYTES)
