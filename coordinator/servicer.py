"""The gRPC face of `Control`: who calls, how often, decode, call, encode. No rule lives here."""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from coordinator.clock import Clock
from coordinator.control import Control
from coordinator.leasing import Leased
from coordinator.ratelimit import RateLimit, address_prefix
from coordinator.sessions import Session, Sessions
from protocol import calls
from protocol.errors import Bug, CommonweightError, PayloadInvalid, UploadTooSlow
from protocol.limits import (
    MAX_CALLS_PER_MINUTE_PER_DEVICE,
    MAX_OPEN_CALLS_PER_MINUTE_PER_ADDRESS,
    MAX_VERDICT_QUERIES,
    SESSION_MS,
    UPLOAD_CHUNK_BYTES,
    UPLOAD_CHUNK_PATIENCE_MS,
)
from protocol.service import CALLS, SESSION_METADATA, Auth, status_of

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

    def __init__(
        self, *, control: Control, sessions: Sessions, clock: Clock, endpoint: Callable[[], calls.GetEndpointReply]
    ) -> None:
        self._control = control
        self._sessions = sessions
        self._clock = clock
        self._endpoint = endpoint
        self._per_device = RateLimit(MAX_CALLS_PER_MINUTE_PER_DEVICE)
        self._per_address = RateLimit(MAX_OPEN_CALLS_PER_MINUTE_PER_ADDRESS)

    def _admit(self, auth: Auth, context: Context) -> Session | None:
        now = self._clock.now_ms()
        if auth is Auth.OPEN:
            self._per_address.admit(address_prefix(context.peer()), now)
            return None
        metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        token = metadata.get(SESSION_METADATA)
        session = self._sessions.session(token if isinstance(token, bytes) else None, now)
        self._per_device.admit(session.device, now)
        return session

    @_call
    async def GetEndpoint(self, request: calls.GetEndpointRequest, session: None) -> calls.GetEndpointReply:
        """Say who answers here."""
        return self._endpoint()

    @_call
    async def GetStatus(self, request: calls.GetStatusRequest, session: None) -> calls.GetStatusReply:
        """Say where the run stands."""
        facts = await self._control.decide(self._control.facts)
        return calls.GetStatusReply(**facts, devices_seen=self._sessions.devices(self._clock.now_ms()))

    @_call
    async def GetNonce(self, request: calls.GetNonceRequest, session: None) -> calls.GetNonceReply:
        """Give a number to sign."""
        return calls.GetNonceReply(nonce=self._sessions.nonce(self._clock.now_ms()))

    @_call
    async def OpenSession(self, request: calls.OpenSessionRequest, session: None) -> calls.OpenSessionReply:
        """Take a device's proof, give a token."""
        now = self._clock.now_ms()
        proven = self._sessions.prove(request.proof_envelope, request.delegation_envelope, now)
        await self._control.admit(proven)
        return calls.OpenSessionReply(token=self._sessions.open(proven, now), expires_in_ms=SESSION_MS)

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
        offset, receipt = await self._control.upload_state(session, request.claim, request.role)
        return calls.GetUploadReply(offset=offset, receipt_envelope=receipt)

    @_call
    async def Upload(self, requests: AsyncIterator[Any], session: Session) -> calls.UploadReply:
        """Take an artifact's bytes."""
        stream = _timed(requests)
        first = await anext(stream, None)
        if first is None:
            raise PayloadInvalid("An upload begins with a message that names claim, role and offset.")
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

        receipt = await self._control.upload(session, first.claim, first.role, first.offset, chunks())
        return calls.UploadReply(receipt_envelope=receipt)

    @_call
    async def GetVerdicts(self, request: calls.GetVerdictsRequest, session: Session) -> calls.GetVerdictsReply:
        """Give the verdicts that are known."""
        if len(request.claims) > MAX_VERDICT_QUERIES:
            raise PayloadInvalid(f"At most {MAX_VERDICT_QUERIES} claims can be asked for at once.")
        return calls.GetVerdictsReply(verdict_envelopes=await self._control.verdicts(session, request.claims))


async def _drain(requests: AsyncIterator[Any]) -> None:
    """Read a refused stream to its end, for a moment: a client that still writes would not see why it was refused."""
    with suppress(TimeoutError, grpc.aio.BaseError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in requests:
                pass


async def _timed(requests: AsyncIterator[Any]) -> AsyncIterator[calls.UploadRequest]:
    """Pass a stream on; cut it when a chunk takes too long, is too large, or is no chunk."""
    iterator = aiter(requests)
    while True:
        try:
            request = await asyncio.wait_for(anext(iterator), UPLOAD_CHUNK_PATIENCE_MS / 1000)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UploadTooSlow from None
        if isinstance(request, CommonweightError):
            raise request
        if len(request.data) > UPLOAD_CHUNK_BYTES:
            raise PayloadInvalid(f"A chunk has at most {UPLOAD_CHUNK_BYTES} bytes, this one has {len(request.data)}.")
        yield request
