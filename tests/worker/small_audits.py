"""What `SmallRun` does for auditors and appeals: it gives out what was uploaded, and remembers what it is told."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from protocol import calls
from protocol.canonical import sha256_hex
from protocol.documents import Claim, Delegation, Lease, Opinion, RunId, parse_payload, sign, verify
from protocol.envelope import parse_envelope
from protocol.errors import AppealRefused, AuditUnknown
from protocol.keys import PrivateKey, PublicKey
from protocol.limits import UPLOAD_CHUNK_BYTES


@dataclass
class Attempt:
    lease: Lease
    envelope: bytes
    state: str = "leased"
    claim: Claim | None = None
    claim_envelope: bytes = b""
    claim_sha256: str = ""
    claim_receipt: bytes = b""
    sketch: bytes = b""
    stored: bytearray = field(default_factory=bytearray)
    bytes_receipt: bytes = b""


class SmallAudits:
    """The auditors' half of the run, and its switches."""

    run: RunId
    root_key: PrivateKey

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.tokens: dict[bytes, str] = {}
        self.device_keys: dict[str, PublicKey] = {}
        self.auditor_key = PrivateKey.generate()
        self.to_audit: list[list[Attempt]] = []
        self.opinions: list[Opinion] = []
        self.appeals: list[str] = []
        self.piece_bytes = UPLOAD_CHUNK_BYTES
        self.audit_ms = 60_000
        self.spoil_reply: Callable[[calls.TakeAuditReply], calls.TakeAuditReply] = lambda reply: reply

    async def _answer(self, name: str, context: Any, work: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def _device(self, context: Any) -> str:
        raise NotImplementedError

    def auditor_delegation(self) -> bytes:
        """The root's word for the auditor's key."""
        delegation = Delegation(
            run=self.run, role="auditor", public_key=self.auditor_key.public.hex, not_after_ms=2**50
        )
        return sign(delegation, self.root_key)

    async def TakeAudit(self, request: calls.TakeAuditRequest, context: Any) -> Any:
        def work() -> calls.TakeAuditReply:
            assert self._device(context) == self.auditor_key.public.key_id
            if not self.to_audit:
                return calls.TakeAuditReply(reason="nothing is drawn", retry_after_ms=50)
            attempts = self.to_audit[0]
            reply = calls.TakeAuditReply(
                round=attempts[0].lease.round,
                index=attempts[0].lease.index,
                claim_envelopes=tuple(attempt.claim_envelope for attempt in attempts),
                device_keys=tuple(self.device_keys[attempt.lease.device].raw for attempt in attempts),
                remaining_ms=self.audit_ms,
            )
            return self.spoil_reply(reply)

        return await self._answer("TakeAudit", context, work)

    async def ReadArtifact(self, request: calls.ReadArtifactRequest, context: Any) -> Any:
        def work() -> calls.ReadArtifactReply:
            self._device(context)
            for attempt in self.to_audit[0] if self.to_audit else []:
                if attempt.claim_sha256 == request.claim.hex() and request.role == "delta":
                    end = request.offset + self.piece_bytes
                    return calls.ReadArtifactReply(data=bytes(attempt.stored[request.offset : end]))
            raise AuditUnknown

        return await self._answer("ReadArtifact", context, work)

    async def SubmitOpinions(self, request: calls.SubmitOpinionsRequest, context: Any) -> Any:
        def work() -> calls.SubmitOpinionsReply:
            assert self._device(context) == self.auditor_key.public.key_id
            if not self.to_audit:
                raise AuditUnknown
            opinions = [verify(Opinion, raw, self.auditor_key.public) for raw in request.opinion_envelopes]
            assert [opinion.claim for opinion in opinions] == [attempt.claim_sha256 for attempt in self.to_audit[0]]
            del self.to_audit[0]
            self.opinions += opinions
            return calls.SubmitOpinionsReply()

        return await self._answer("SubmitOpinions", context, work)

    async def Appeal(self, request: calls.AppealRequest, context: Any) -> Any:
        def work() -> calls.AppealReply:
            device = self._device(context)
            mine = {attempt.claim_sha256 for attempt in self.attempts if attempt.lease.device == device}
            if request.claim.hex() not in mine:
                raise AppealRefused
            self.appeals.append(request.claim.hex())
            return calls.AppealReply()

        return await self._answer("Appeal", context, work)


def forged(attempt: Attempt, container: bytes, content_sha256: str, key: PrivateKey) -> Attempt:
    """Return an attempt of the same lease whose device signed for other bytes."""
    from dataclasses import replace

    assert attempt.claim is not None
    (artifact,) = attempt.claim.artifacts
    other = replace(artifact, blob_sha256=sha256_hex(container), content_sha256=content_sha256, size=len(container))
    claim = replace(attempt.claim, artifacts=(other,), trail_root="ee" * 32)
    envelope = sign(claim, key)
    return Attempt(
        lease=attempt.lease,
        envelope=attempt.envelope,
        state="received",
        claim=parse_payload(Claim, parse_envelope(envelope).payload),
        claim_envelope=envelope,
        claim_sha256=sha256_hex(parse_envelope(envelope).payload),
        stored=bytearray(container),
    )
