"""The gRPC face of `Control`: who calls, how often, decode, call, encode. No rule lives here."""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from coordinator.control import Control
from coordinator.gate import Gate
from coordinator.leasing import Leased
from coordinator.ratelimit import RateLimit, address_prefix
from coordinator.sessions import Session, Sessions
from protocol import calls
from protocol.errors import AccessRefused, AuditorRequired, Bug, CommonweightError, PayloadInvalid, UploadTooSlow
from protocol.limits import (
    MAX_CALLS_AT_ONCE,
    MAX_CALLS_AT_ONCE_PER_ADDRESS,
    MAX_CALLS_AT_ONCE_PER_DEVICE,
    MAX_CALLS_PER_MINUTE_PER_DEVICE,
    MAX_OPEN_CALLS_PER_MINUTE_PER_ADDRESS,
    MAX_VERDICT_QUERIES,
    MINUTE_MS,
    SECOND_MS,
    SESSION_MS,
    UPLOAD_CHUNK_BYTES,
    UPLOAD_CHUNK_PATIENCE_MS,
    UPLOAD_MIN_BYTES_PER_MINUTE,
)
from protocol.service import CALLS, SESSION_METADATA, Auth, first_message, status_of

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
R = TypeVar("R")
DRAIN_SECONDS: Final = 2.0


def _call(method: Callable[..., Awaitable[R]]) -> Callable[..., Awaitable[R]]:
    """Guard a method: rate limit and session first, then its work; errors leave with their code and sentence."""
    auth = CALLS[method.__name__].auth

    @functools.wraps(method)
    async def guarded(self: "Servicer", request: Any, context: Context) -> R:
        try:
            session = self._admit(auth, context)
            if isinstance(request, CommonweightError):
                raise request
            with self._at_once_per_device.enter(session.device) if session else nullcontext():
                return await method(self, request, session)
        except CommonweightError as error:
            failure = error
        except Exception:
            logger.exception("%s failed", method.__name__, extra={"action": "call_failed"})
            failure = Bug()
        if isinstance(failure, Bug):
            logger.error("%s: %s %s", method.__name__, failure.message, failure.private, extra={"action": "bug"})
        code, sentence, metadata = status_of(failure)
        await context.abort(code, sentence, trailing_metadata=metadata)
        raise AssertionError("abort always raises")

    return guarded


class Servicer:
    """Serves the calls of `protocol.service.CALLS`."""

    def __init__(self, *, control: Control, sessions: Sessions, endpoint: Callable[[], calls.GetEndpointReply]) -> None:
        self._control = control
        self._sessions = sessions
        self._endpoint = endpoint
        self._at_once = Gate(total=MAX_CALLS_AT_ONCE, each=MAX_CALLS_AT_ONCE_PER_ADDRESS)
        self._at_once_per_device = Gate(total=MAX_CALLS_AT_ONCE, each=MAX_CALLS_AT_ONCE_PER_DEVICE)
        self._per_device = RateLimit(MAX_CALLS_PER_MINUTE_PER_DEVICE)
        self._per_address = RateLimit(MAX_OPEN_CALLS_PER_MINUTE_PER_ADDRESS)

    def door(self, context: Context) -> AbstractContextManager[None]:
        """Count a call from its headers on, so that those who open calls and say nothing only shut out themselves."""
        return self._at_once.enter(address_prefix(context.peer()))

    def _admit(self, auth: Auth, context: Context) -> Session | None:
        now = ticks_ms()
        if auth is Auth.OPEN:
            self._per_address.admit(address_prefix(context.peer()), now)
            return None
        metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        token = metadata.get(SESSION_METADATA)
        session = self._sessions.session(token if isinstance(token, bytes) else None, now)
        if not session.auditor:  # one of a few that the root delegated; it reads deltas in many pieces
            self._per_device.admit(session.device, now)
        if auth is Auth.AUDITOR and not session.auditor:
            raise AuditorRequired
        if auth is Auth.SESSION and session.auditor:
            raise AccessRefused("An auditor judges the work of others and trains nothing itself; use a worker's keys.")
        return session

    @_call
    async def GetEndpoint(self, request: calls.GetEndpointRequest, session: None) -> calls.GetEndpointReply:
        """Say who answers here."""
        return self._endpoint()

    @_call
    async def GetStatus(self, request: calls.GetStatusRequest, session: None) -> calls.GetStatusReply:
        """Say where the run stands."""
        facts = await self._control.decide(self._control.facts)
        return calls.GetStatusReply(**facts, devices_seen=self._sessions.devices(ticks_ms()))

    @_call
    async def GetNonce(self, request: calls.GetNonceRequest, session: None) -> calls.GetNonceReply:
        """Give a number to sign."""
        return calls.GetNonceReply(nonce=self._sessions.nonce(ticks_ms()))

    @_call
    async def OpenSession(self, request: calls.OpenSessionRequest, session: None) -> calls.OpenSessionReply:
        """Take a device's proof, give a token."""
        now = ticks_ms()
        opened = self._sessions.prove(request.proof_envelope, request.delegation_envelope, now)
        return calls.OpenSessionReply(token=self._sessions.open(opened), expires_in_ms=SESSION_MS)

    @_call
    async def LeaseUnit(self, request: calls.LeaseUnitRequest, session: Session) -> calls.LeaseUnitReply:
        """Give a unit, or say why there is none."""
        answer = await self._control.lease(session, request.wait_ms)
        if isinstance(answer, Leased):
            return calls.LeaseUnitReply(
                lease_envelope=answer.envelope,
                remaining_ms=answer.remaining_ms,
                base_checkpoint=answer.base_checkpoint,
            )
        return calls.LeaseUnitReply(retry_after_ms=answer.retry_after_ms, reason=answer.reason)

    @_call
    async def HandBack(self, request: calls.HandBackRequest, session: Session) -> calls.HandBackReply:
        """Take a unit back."""
        await self._control.hand_back(session, request.lease)
        return calls.HandBackReply()

    @_call
    async def SubmitClaim(self, request: calls.SubmitClaimRequest, session: Session) -> calls.SubmitClaimReply:
        """Take a claim."""
        answer = await self._control.submit_claim(session, request.claim_envelope)
        return calls.SubmitClaimReply(receipt_envelope=answer.receipt, next=answer.next)

    @_call
    async def SubmitSketch(self, request: calls.SubmitSketchRequest, session: Session) -> calls.SubmitSketchReply:
        """Take a sketch."""
        return calls.SubmitSketchReply(next=await self._control.submit_sketch(session, request.claim, request.sketch))

    @_call
    async def GetUpload(self, request: calls.GetUploadRequest, session: Session) -> calls.GetUploadReply:
        """Say how much of an artifact is stored."""
        offset, receipt = await self._control.uploads.state(session, request.claim, request.role)
        return calls.GetUploadReply(offset=offset, receipt_envelope=receipt)

    @_call
    async def Upload(self, requests: AsyncIterator[Any], session: Session) -> calls.UploadReply:
        """Take an artifact's bytes."""
        first = await first_message(requests)
        if isinstance(first, CommonweightError):
            raise first
        stream = _timed(requests)
        try:
            return await self._upload(first, stream, session)
        except CommonweightError:
            await _drain(requests)
            raise

    async def _upload(
        self, first: calls.UploadRequest, stream: AsyncIterator[calls.UploadRequest], session: Session
    ) -> calls.UploadReply:
        async def chunks() -> AsyncIterator[bytes]:
            if first.data:
                yield first.data
            async for request in stream:
                yield request.data

        receipt = await self._control.uploads.receive(session, first.claim, first.role, first.offset, chunks())
        return calls.UploadReply(receipt_envelope=receipt)

    @_call
    async def GetVerdicts(self, request: calls.GetVerdictsRequest, session: Session) -> calls.GetVerdictsReply:
        """Give the verdicts that are known."""
        if len(request.claims) > MAX_VERDICT_QUERIES:
            raise PayloadInvalid(f"At most {MAX_VERDICT_QUERIES} claims can be asked for at once.")
        return calls.GetVerdictsReply(verdict_envelopes=await self._control.verdicts(session, request.claims))

    @_call
    async def Appeal(self, request: calls.AppealRequest, session: Session) -> calls.AppealReply:
        """Send a refuted claim to a second referee."""
        await self._control.appeal(session, request.claim)
        return calls.AppealReply()

    @_call
    async def TakeAudit(self, request: calls.TakeAuditRequest, session: Session) -> calls.TakeAuditReply:
        """Give an auditor claims to judge, or say that there are none."""
        order = await self._control.take_audit(session, request.wait_ms)
        if order is None:
            return calls.TakeAuditReply(retry_after_ms=SECOND_MS, reason="there is nothing to judge now")
        return calls.TakeAuditReply(
            round=order.round,
            index=order.index,
            claim_envelopes=order.claims,
            device_keys=order.device_keys,
            remaining_ms=order.remaining_ms,
        )

    @_call
    async def ReadArtifact(self, request: calls.ReadArtifactRequest, session: Session) -> calls.ReadArtifactReply:
        """Give an auditor a piece of what it judges."""
        data = await self._control.read_artifact(session, request.claim, request.role, request.offset)
        return calls.ReadArtifactReply(data=data)

    @_call
    async def SubmitOpinions(self, request: calls.SubmitOpinionsRequest, session: Session) -> calls.SubmitOpinionsReply:
        """Take an auditor's opinions."""
        await self._control.submit_opinions(session, request.opinion_envelopes)
        return calls.SubmitOpinionsReply()


async def _drain(requests: AsyncIterator[Any]) -> None:
    """Read a refused stream to its end, for a moment: a client that still writes would not see why it was refused."""
    with suppress(TimeoutError, grpc.aio.BaseError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in requests:
                pass


async def _timed(requests: AsyncIterator[Any]) -> AsyncIterator[calls.UploadRequest]:
    """Pass a stream on; cut it when it is too slow on the whole, when a message is too large, or no chunk."""
    began, brought = ticks_ms(), 0
    while True:
        try:
            async with asyncio.timeout(UPLOAD_CHUNK_PATIENCE_MS / 1000):
                request = await anext(requests)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UploadTooSlow from None
        if isinstance(request, CommonweightError):
            raise request
        if len(request.data) > UPLOAD_CHUNK_BYTES:
            raise PayloadInvalid(f"A chunk has at most {UPLOAD_CHUNK_BYTES} bytes, this one has {len(request.data)}.")
        brought += len(request.data)
        # One chunk of credit; after that a trickle of tiny chunks is as slow as silence.
        if brought + UPLOAD_CHUNK_BYTES < (ticks_ms() - began) * UPLOAD_MIN_BYTES_PER_MINUTE // MINUTE_MS:
            raise UploadTooSlow
        yield request


def ticks_ms() -> int:
    """Return a time that only this process knows and nobody can set: for limits, nonces and sessions."""
    return time.monotonic_ns() // 1_000_000
