"""How every call is made: over a believed connection, in a session that renews itself, with a deadline, errors by name.

What is not the coordinator's refusal of this very request comes out as `TryLater`: silence, trouble on its side, and
answers that do not hold. After silence or such an answer the connection is dropped, since the coordinator may have
come back with another certificate or key.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc.aio

from protocol import calls
from protocol.documents import Digest, SessionProof, sign
from protocol.errors import (
    AnswerInvalid,
    CommonweightError,
    NonceUnknown,
    Refusal,
    SessionRequired,
    TryLater,
    Unreachable,
    WrongRun,
)
from protocol.join import JoinString
from protocol.limits import SECOND_MS
from protocol.service import SESSION_METADATA, error_of, stub
from worker.identity import Papers
from worker.link import CALL_SECONDS, Link, open_link

RENEW_BEFORE_MS: Final = 30 * SECOND_MS
TRIES_FOR_A_SESSION: Final = 3

Metadata = tuple[tuple[str, bytes], ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """What a device or an auditor says of itself when it opens a session."""

    numerics: int
    trainer_version: str
    device_class: str


class Caller:
    """Makes calls to a run's coordinator. For one event loop; calls may run side by side."""

    def __init__(self, join: JoinString, papers: Papers, *, wall_ms: Callable[[], int]) -> None:
        self.join = join
        self._papers = papers
        self._wall_ms = wall_ms
        self._introduction: Introduction | None = None
        self._link: Link | None = None
        self._token: tuple[bytes, float] | None = None
        self._config_sha256: Digest | None = None
        self._connecting = asyncio.Lock()
        self._proving = asyncio.Lock()

    async def connect(self) -> Link:
        """Return the believed connection; make one if there is none.

        Raises:
            EndpointUntrusted, DelegationInvalid: see `open_link`.
            WrongRun: the run's config was changed since the first connection; the worker must start again.
            Unreachable: nobody answers.
        """
        async with self._connecting:
            if self._link is None:
                link = await open_link(self.join, now_ms=self._wall_ms())
                if self._config_sha256 not in (None, link.trust.config_sha256):
                    await link.channel.close()
                    raise WrongRun("The run has a new config since this worker started; start the worker again.")
                self._config_sha256 = link.trust.config_sha256
                self._link = link
            return self._link

    def introduce(self, introduction: Introduction) -> None:
        """Say what this device is, once that is known; sessions need it."""
        self._introduction = introduction

    async def open_session(self) -> None:
        """Open a session now, to hear early whether this device is admitted.

        Raises:
            NumericsMismatch, TermsNotAccepted, OwnerBanned: the run does not admit this worker.
            Unreachable: nobody answers.
        """
        async with self._using() as link:
            await self._session_token(link)

    async def close(self) -> None:
        """Close the connection."""
        link, self._link = self._link, None
        if link is not None:
            await link.channel.close()

    @asynccontextmanager
    async def _using(self) -> AsyncIterator[Link]:
        link = await self.connect()
        link.users += 1
        try:
            yield link
        finally:
            link.users -= 1
            if link.retired and not link.users:
                await link.channel.close()

    async def drop(self, link: Link) -> None:
        """Let the next call connect anew, and so hear again where the run's files are; calls under way go on."""
        self._retire(link)
        if not link.users:
            await link.channel.close()

    def _retire(self, link: Link) -> None:
        # Not closed at once: an upload may still be running over it.
        link.retired = True
        if self._link is link:
            self._link = None

    async def _in_session(self, ask: Callable[[Link, Metadata], Awaitable[T]]) -> T:
        """Make a call with a session token; with a new one if the coordinator does not know the old one any more."""
        for _ in range(TRIES_FOR_A_SESSION):
            async with self._using() as link:
                token = await self._session_token(link)
                try:
                    return await ask(link, ((SESSION_METADATA, token),))
                except SessionRequired:
                    if self._token is not None and self._token[0] == token:
                        self._token = None
        raise AnswerInvalid("The coordinator gave a session and did not know it, three times in a row.")

    async def _session_token(self, link: Link) -> bytes:
        async with self._proving:
            if self._token is not None and time.monotonic() < self._token[1]:
                return self._token[0]
            for _ in range(TRIES_FOR_A_SESSION):
                try:
                    reply = await self._prove(link)
                except NonceUnknown:
                    continue
                usable_ms = max(0, reply.expires_in_ms - RENEW_BEFORE_MS)
                self._token = (reply.token, time.monotonic() + usable_ms / 1000)
                return reply.token
        raise AnswerInvalid("The coordinator gave a nonce and did not know it, three times in a row.")

    async def _prove(self, link: Link) -> calls.OpenSessionReply:
        assert self._introduction is not None, "introduce comes first"
        nonce: calls.GetNonceReply = await self._ask(link, "GetNonce", calls.GetNonceRequest())
        proof = SessionProof(
            run=self.join.run,
            certificate_sha256=link.certificate_sha256,
            nonce=nonce.nonce.hex(),
            numerics=self._introduction.numerics,
            trainer_version=self._introduction.trainer_version,
            device_class=self._introduction.device_class,
            terms_sha256=link.trust.config.terms_sha256,
        )
        request = calls.OpenSessionRequest(
            proof_envelope=sign(proof, self._papers.key), delegation_envelope=self._papers.delegation_envelope
        )
        reply: calls.OpenSessionReply = await self._ask(link, "OpenSession", request)
        return reply

    async def _ask(
        self, link: Link, name: str, request: Any, metadata: Metadata = (), *, seconds: float = CALL_SECONDS
    ) -> Any:
        """Make one call; raise what the coordinator meant, or a `TryLater`."""
        error: CommonweightError
        try:
            reply = await stub(link.channel, name)(request, timeout=seconds, metadata=metadata)
        except grpc.aio.AioRpcError as failed:
            error = error_of(failed)
        else:
            if reply is not None:
                return reply
            # What gRPC gives for bytes that can't be decoded.
            error = AnswerInvalid(f"The coordinator's answer to {name} is not one; a newer Commonweight may be needed.")
        if not isinstance(error, (Refusal, TryLater)):
            # Whatever is wrong on the coordinator's machine, it is no reason to stop this one.
            error = Unreachable(f"The coordinator has a problem of its own: {error.message}")
        if isinstance(error, (Unreachable, AnswerInvalid)):
            self._retire(link)
        raise error

    @contextmanager
    def _believing(self, link: Link) -> Iterator[None]:
        """Turn a signed answer that does not hold into `AnswerInvalid`, and drop the connection."""
        try:
            yield
        except Refusal as refusal:
            self._retire(link)
            raise AnswerInvalid(f"The coordinator's answer does not hold: {refusal.message}") from None
