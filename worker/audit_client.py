"""The auditor's calls as methods, and the check of what it is given to judge.

An auditor trusts the coordinator with the order of its work and with nothing else: unit, seed and shards follow from
the run config, and a claim is what its device signed.
"""

import time
from dataclasses import dataclass

from protocol import calls
from protocol.assignment import unit_id
from protocol.canonical import sha256_hex
from protocol.documents import Claim, Digest, UnitId, parse_payload
from protocol.envelope import open_envelope
from protocol.errors import AnswerInvalid, WrongRun
from protocol.keys import PublicKey
from protocol.limits import MAX_OPINIONS, MAX_PEER_DOCUMENT_BYTES, UPLOAD_CHUNK_BYTES
from protocol.trust import RunTrust
from worker.calling import Caller, Metadata
from worker.client import NoWork
from worker.link import CALL_SECONDS, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimToJudge:
    """A claim whose device's signature holds; `digest` is that of its payload as it was signed."""

    digest: Digest
    claim: Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditTask:
    """A unit to run again, and the claims to compare with it. `ends`: when it is taken back, in monotonic seconds."""

    round: int
    index: int
    unit: UnitId
    claims: tuple[ClaimToJudge, ...]
    ends: float


def check_task(reply: calls.TakeAuditReply, trust: RunTrust) -> AuditTask:
    """Return what an auditor must do, from a reply that holds.

    Checks: 0 round and index are of the run; 1 as many keys as claims, and no more than one unit may have; 2 each claim
    is signed by its key; 3 it names that key's device, this run and this unit; 4 no claim comes twice.

    Raises:
        Refusal: a check fails.
    """
    rules = trust.config.rounds
    if not (1 <= reply.round <= rules.planned and 0 <= reply.index < rules.units):  # 0
        raise WrongRun(f"The run has no unit {reply.index} in a round {reply.round}.")
    if not len(reply.claim_envelopes) == len(reply.device_keys) <= MAX_OPINIONS:  # 1
        raise WrongRun(f"{len(reply.claim_envelopes)} claims came with {len(reply.device_keys)} device keys.")
    unit = unit_id(trust.config_sha256, reply.round, reply.index)
    claims = []
    for raw, key in zip(reply.claim_envelopes, reply.device_keys, strict=True):
        claims.append(_check_claim(raw, PublicKey(raw=key), trust, unit))
    if len({claim.digest for claim in claims}) != len(claims):  # 4
        raise WrongRun("A claim came twice in one audit.")
    return AuditTask(
        round=reply.round,
        index=reply.index,
        unit=unit,
        claims=tuple(claims),
        ends=time.monotonic() + reply.remaining_ms / 1000,
    )


def _check_claim(raw: bytes, key: PublicKey, trust: RunTrust, unit: UnitId) -> ClaimToJudge:
    payload = open_envelope(raw, Claim.TYPE, key, max_bytes=MAX_PEER_DOCUMENT_BYTES)  # 2
    claim = parse_payload(Claim, payload)
    if claim.device != key.key_id or claim.run != trust.run or claim.unit != unit:  # 3
        # Stops a coordinator from having one device's claim judged as another's, or as a claim for another unit.
        raise WrongRun("A claim that came for judging is another device's, or for another unit.")
    return ClaimToJudge(digest=Digest(sha256_hex(payload)), claim=claim)


class AuditorClient(Caller):
    """The calls of an auditor's session; they raise as those of `CoordinatorClient` do."""

    async def take_audit(self, wait_ms: int) -> AuditTask | NoWork:
        """Return claims of one unit to judge, or why there are none."""
        request = calls.TakeAuditRequest(wait_ms=wait_ms)

        async def ask(link: Link, metadata: Metadata) -> AuditTask | NoWork:
            reply = await self._ask(link, "TakeAudit", request, metadata, seconds=CALL_SECONDS + wait_ms / 1000)
            if not reply.claim_envelopes:
                return NoWork(reason=reply.reason, retry_after_ms=reply.retry_after_ms)
            with self._believing(link):
                return check_task(reply, link.trust)

        return await self._in_session(ask)

    async def read_artifact(self, claim: Digest, role: str, offset: int) -> bytes:
        """Return at most 1 MiB of a stored artifact from `offset` on; nothing at its end.

        Raises:
            AuditUnknown: this auditor does not judge the claim any more.
        """
        request = calls.ReadArtifactRequest(claim=bytes.fromhex(claim), role=role, offset=offset)

        async def ask(link: Link, metadata: Metadata) -> bytes:
            reply: calls.ReadArtifactReply = await self._ask(link, "ReadArtifact", request, metadata)
            if len(reply.data) > UPLOAD_CHUNK_BYTES:
                raise AnswerInvalid(f"The coordinator sent a piece of {len(reply.data):,} bytes.")
            return reply.data

        return await self._in_session(ask)

    async def submit_opinions(self, envelopes: tuple[bytes, ...]) -> None:
        """Say what was found.

        Raises:
            AuditUnknown: this auditor does not judge these claims any more.
        """
        request = calls.SubmitOpinionsRequest(opinion_envelopes=envelopes)
        await self._in_session(lambda link, metadata: self._ask(link, "SubmitOpinions", request, metadata))
