"""A run of one round on a real gRPC server over TLS, with real keys, weights, shards and files; told when to misbehave.

It is no coordinator: it remembers in memory and merges nothing. What it signs, checks and sends is real.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np

from diloco import NUMERICS
from diloco.container import Container, largest_container
from protocol import calls
from protocol.assignment import unit_id, unit_seed, unit_shards
from protocol.canonical import sha256_hex
from protocol.documents import (
    Artifact,
    ArtifactLimit,
    BytesReceipt,
    Claim,
    ClaimReceipt,
    Delegation,
    DeviceDelegation,
    Endpoint,
    Lease,
    RunId,
    SessionProof,
    ShardRef,
    Takedown,
    Takedowns,
    Verdict,
    digest_of,
    parse_payload,
    sign,
    verify,
)
from protocol.envelope import parse_envelope
from protocol.errors import (
    ClaimConflict,
    ClaimUnknown,
    CommonweightError,
    LeaseEnded,
    NumericsMismatch,
    RunFinished,
    SessionRequired,
    StepOutOfOrder,
    UploadOffsetWrong,
)
from protocol.join import JoinString
from protocol.keys import PrivateKey, PublicKey
from protocol.layout import shard_path
from protocol.service import SERVER_OPTIONS, SESSION_METADATA, service_handler, status_of
from protocol.trust import RunTrust
from tests.worker.certificates import self_signed
from tests.worker.files_server import FilesServer, serving
from tests.worker.small_audits import Attempt, SmallAudits
from tests.worker.small_config import (
    publish_checkpoint,
    publish_genesis,
    publish_takedowns,
    small_config,
    small_shard,
)
from verify.replay import codec_config, delta_schema

HOUR_MS = 3_600_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class SmallRun(SmallAudits):
    """The run, its servers and its switches."""

    def __init__(self, root: Path, *, units: int = 2, steps: int = 3) -> None:
        super().__init__()
        self.public = root / "public"
        self.root_key, self.key = PrivateKey.generate(), PrivateKey.generate()
        self.run = RunId(self.root_key.public.key_id)
        raw_shards = [small_shard(seed) for seed in range(2)]
        refs = tuple(
            ShardRef(sha256=sha256_hex(raw), size=len(raw), samples=6, height=8, width=8) for raw in raw_shards
        )
        self.config = small_config(refs, units=units, steps=steps)
        for ref, raw in zip(refs, raw_shards, strict=True):
            self._publish(shard_path(ref.sha256), raw)
        self.republish_genesis()
        self.key_pem, self.certificate_pem, self.certificate_sha256 = self_signed()
        self.nonces: set[str] = set()
        self.log: list[str] = []
        self.errors: dict[str, list[CommonweightError]] = {}
        self.cut_upload_after: int | None = None
        self.next_after_sketch = calls.Instruction.UPLOAD
        self.verdict_for: Callable[[Attempt], str | None] = lambda attempt: (
            "accepted" if attempt.bytes_receipt else None
        )
        self.numerics = NUMERICS
        self.checkpoint = 0
        self.finish_when_done = True
        self.sign_receipts_with = self.key
        self.lease_ms = HOUR_MS
        self.public_url: str | None = None
        self.no_work_ms = 50
        self.changed = asyncio.Event()

    # --- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._files = serving(self.public)
        self.files: FilesServer = self._files.__enter__()
        self.port = 0
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        self._files.__exit__(None, None, None)

    async def start(self) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((service_handler(self),))
        credentials = grpc.ssl_server_credentials([(self.key_pem, self.certificate_pem)])
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(grace=None)

    @property
    def join(self) -> JoinString:
        return JoinString(host="127.0.0.1", port=self.port, run=self.run)

    def trust(self) -> RunTrust:
        trust = RunTrust(self.run)
        trust.admit_root(self.root_key.public.raw)
        trust.admit_delegation(self._delegation(), now_ms=now_ms())
        trust.admit_config(sign(self.config, self.root_key))
        return trust

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)

    def received(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.bytes_receipt]

    def _publish(self, path: str, content: bytes) -> None:
        target = self.public / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def republish_genesis(self) -> None:
        """Once at the start, and after a change of the config."""
        self.manifest = publish_genesis(self.public, self.run, self.config, self.key)
        self.base_sha256 = self.manifest.files[0].sha256

    def publish_another(self) -> None:
        """Publish one more checkpoint; leases go on starting from the first one."""
        self.checkpoint += 1
        publish_checkpoint(self.public, self.run, self.config, self.key, self.checkpoint)

    def take_down(self, *samples: int, checkpoint: int = 0) -> Takedowns:
        """Publish a checkpoint again whose manifest names a list with these samples of every shard."""
        entries = tuple(
            Takedown(shard=shard.sha256, sample=sample, from_round=checkpoint + 1, reason="asked for")
            for shard in self.config.data.shards
            for sample in samples
        )
        takedowns = Takedowns(run=self.run, entries=entries)
        digest = publish_takedowns(self.public, takedowns, self.key)
        found = publish_checkpoint(self.public, self.run, self.config, self.key, checkpoint, digest)
        if not checkpoint:
            self.manifest = found
        return takedowns

    def _delegation(self) -> bytes:
        return sign(
            Delegation(
                run=self.run, role="coordinator", public_key=self.key.public.hex, not_after_ms=now_ms() + HOUR_MS
            ),
            self.root_key,
        )

    def endpoint(self) -> Endpoint:
        return Endpoint(
            run=self.run,
            certificate_sha256=self.certificate_sha256,
            public_url=self.public_url or self.files.url,
            not_after_ms=now_ms() + HOUR_MS,
        )

    def make_lease(self, device: str, index: int) -> Lease:
        unit = unit_id(digest_of(self.config), 1, index)
        size = largest_container(delta_schema(self.config), codec_config(self.config))
        return Lease(
            run=self.run,
            config_sha256=digest_of(self.config),
            lease=hashlib.sha256(f"{device}{index}{len(self.attempts)}".encode()).hexdigest()[:32],
            device=device,
            unit=unit,
            round=1,
            index=index,
            base_sha256=self.base_sha256,
            shards=unit_shards(self.config, 1, index),
            takedowns_sha256=self.manifest.takedowns_sha256,
            seed=unit_seed(unit),
            artifacts=(ArtifactLimit(role="delta", max_bytes=size),),
            duration_ms=self.lease_ms,
        )

    # --- calls ---------------------------------------------------------------------------------------------------

    async def _answer(self, name: str, context: Any, work: Callable[[], Any]) -> Any:
        self.log.append(name)
        try:
            if self.errors.get(name):
                raise self.errors[name].pop(0)
            return work()
        except CommonweightError as error:
            await self._abort(context, error)

    async def _abort(self, context: Any, error: CommonweightError) -> None:
        code, sentence, metadata = status_of(error)
        await context.abort(code, sentence, trailing_metadata=metadata)

    def _device(self, context: Any) -> str:
        token = dict(context.invocation_metadata() or ()).get(SESSION_METADATA)
        if not isinstance(token, bytes) or token not in self.tokens:
            raise SessionRequired
        return self.tokens[token]

    async def GetEndpoint(self, request: Any, context: Any) -> calls.GetEndpointReply:
        return calls.GetEndpointReply(
            root_public_key=self.root_key.public.raw,
            delegation_envelope=self._delegation(),
            config_envelope=sign(self.config, self.root_key),
            endpoint_envelope=sign(self.endpoint(), self.key),
        )

    async def GetStatus(self, request: Any, context: Any) -> Any:
        def work() -> calls.GetStatusReply:
            return calls.GetStatusReply(
                round=self.checkpoint + 1,
                round_state="collecting",
                planned_rounds=9,
                checkpoint=self.checkpoint,
                units_open=0,
                units_assigned=0,
                units_accepted=0,
                devices_seen=1,
            )

        return await self._answer("GetStatus", context, work)

    async def GetNonce(self, request: Any, context: Any) -> Any:
        def work() -> calls.GetNonceReply:
            nonce = hashlib.sha256(f"nonce {len(self.log)}".encode()).digest()
            self.nonces.add(nonce.hex())
            return calls.GetNonceReply(nonce=nonce)

        return await self._answer("GetNonce", context, work)

    async def OpenSession(self, request: calls.OpenSessionRequest, context: Any) -> Any:
        def work() -> calls.OpenSessionReply:
            device = self._delegated(request.delegation_envelope)
            proof = verify(SessionProof, request.proof_envelope, device)
            assert proof.run == self.run
            assert proof.certificate_sha256 == self.certificate_sha256
            assert proof.terms_sha256 == self.config.terms_sha256
            self.nonces.remove(proof.nonce)
            if proof.numerics != self.numerics:
                raise NumericsMismatch(f"This run computes with numerics {self.numerics}; install version 9.")
            token = hashlib.sha256(f"token {len(self.log)}".encode()).digest()
            self.tokens[token] = device.key_id
            self.device_keys[device.key_id] = device
            return calls.OpenSessionReply(token=token, expires_in_ms=600_000)

        return await self._answer("OpenSession", context, work)

    def _delegated(self, envelope: bytes) -> PublicKey:
        if parse_envelope(envelope).payload_type == Delegation.TYPE:
            return self.trust().admit_auditor(envelope, now_ms=now_ms())
        claimed = parse_payload(DeviceDelegation, parse_envelope(envelope).payload)
        delegation = verify(DeviceDelegation, envelope, PublicKey.from_hex(claimed.owner_public_key))
        return PublicKey.from_hex(delegation.device_public_key)

    async def LeaseUnit(self, request: Any, context: Any) -> Any:
        def work() -> calls.LeaseUnitReply:
            device = self._device(context)
            for held in self.attempts:
                if held.lease.device == device and held.state == "leased":
                    return self._leased(held)
            done = {attempt.lease.index for attempt in self.attempts if attempt.state not in ("back", "refused")}
            left = [index for index in range(self.config.rounds.units) if index not in done]
            if not left and self.finish_when_done:
                raise RunFinished
            if not left:
                return calls.LeaseUnitReply(reason="all units are given out", retry_after_ms=self.no_work_ms)
            lease = self.make_lease(device, left[0])
            self.attempts.append(Attempt(lease=lease, envelope=sign(lease, self.key)))
            return self._leased(self.attempts[-1])

        return await self._answer("LeaseUnit", context, work)

    def _leased(self, attempt: Attempt) -> calls.LeaseUnitReply:
        return calls.LeaseUnitReply(
            lease_envelope=attempt.envelope, remaining_ms=self.lease_ms, base_checkpoint=attempt.lease.round - 1
        )

    async def HandBack(self, request: calls.HandBackRequest, context: Any) -> Any:
        def work() -> calls.HandBackReply:
            self._device(context)
            (attempt,) = (attempt for attempt in self.attempts if attempt.lease.lease == request.lease)
            if attempt.state != "leased":
                raise LeaseEnded
            attempt.state = "back"
            return calls.HandBackReply()

        return await self._answer("HandBack", context, work)

    async def SubmitClaim(self, request: calls.SubmitClaimRequest, context: Any) -> Any:
        def work() -> calls.SubmitClaimReply:
            self._device(context)
            claim = parse_payload(Claim, parse_envelope(request.claim_envelope).payload)
            (attempt,) = (attempt for attempt in self.attempts if attempt.lease.lease == claim.lease)
            digest = sha256_hex(parse_envelope(request.claim_envelope).payload)
            assert claim.lease_sha256 == sha256_hex(parse_envelope(attempt.envelope).payload)
            assert claim.samples == self.config.training.steps * self.config.training.batch
            if attempt.claim_sha256 not in ("", digest):
                raise ClaimConflict
            if not attempt.claim_sha256:
                receipt = ClaimReceipt(
                    run=self.run,
                    claim=digest,
                    epoch=1,
                    log_position=1,
                    sketch_seed="5c" * 32,
                    audit_share=2**24,
                    secret_sha256="5e" * 32,
                )
                attempt.claim, attempt.claim_sha256, attempt.state = claim, digest, "claimed"
                attempt.claim_envelope = request.claim_envelope
                attempt.claim_receipt = sign(receipt, self.sign_receipts_with)
            wanted = {"claimed": calls.Instruction.SKETCH, "sketched": self.next_after_sketch}
            return calls.SubmitClaimReply(
                receipt_envelope=attempt.claim_receipt,
                next=wanted.get(attempt.state, calls.Instruction.DONE),
            )

        return await self._answer("SubmitClaim", context, work)

    def _claimed(self, claim: bytes) -> Attempt:
        for attempt in self.attempts:
            if attempt.claim_sha256 == claim.hex():
                return attempt
        raise ClaimUnknown

    async def SubmitSketch(self, request: calls.SubmitSketchRequest, context: Any) -> Any:
        def work() -> calls.SubmitSketchReply:
            self._device(context)
            attempt = self._claimed(request.claim)
            assert np.isfinite(np.frombuffer(request.sketch, "<f4")).all()
            assert len(request.sketch) == 4096
            attempt.sketch = request.sketch
            if attempt.state == "claimed":
                attempt.state = "sketched"
            return calls.SubmitSketchReply(next=self.next_after_sketch)

        return await self._answer("SubmitSketch", context, work)

    async def GetUpload(self, request: calls.GetUploadRequest, context: Any) -> Any:
        def work() -> calls.GetUploadReply:
            self._device(context)
            attempt = self._claimed(request.claim)
            if attempt.state == "claimed":
                raise StepOutOfOrder
            return calls.GetUploadReply(offset=len(attempt.stored), receipt_envelope=attempt.bytes_receipt)

        return await self._answer("GetUpload", context, work)

    async def Upload(self, requests: AsyncIterator[calls.UploadRequest], context: Any) -> Any:
        self.log.append("Upload")
        try:
            if self.errors.get("Upload"):
                raise self.errors["Upload"].pop(0)
            attempt: Attempt | None = None
            async for request in requests:
                if attempt is None:
                    attempt = self._claimed(request.claim)
                    if request.offset != len(attempt.stored):
                        raise UploadOffsetWrong
                attempt.stored += request.data
                if self.cut_upload_after is not None and len(attempt.stored) >= self.cut_upload_after:
                    del attempt.stored[self.cut_upload_after :]
                    self.cut_upload_after = None
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            assert attempt is not None
            return calls.UploadReply(receipt_envelope=self._receive(attempt))
        except CommonweightError as error:
            await self._abort(context, error)

    def _receive(self, attempt: Attempt) -> bytes:
        assert attempt.claim is not None
        artifact: Artifact = attempt.claim.artifacts[0]
        assert sha256_hex(bytes(attempt.stored)) == artifact.blob_sha256
        path = self.public.parent / "received.safetensors"
        path.write_bytes(attempt.stored)
        container = Container.open(
            path, delta_schema(self.config), codec_config(self.config), bytes.fromhex(attempt.lease.unit)
        )
        container.check_finite()
        assert container.content_digest().hex() == artifact.content_sha256
        receipt = BytesReceipt(
            run=self.run, claim=attempt.claim_sha256, artifacts=attempt.claim.artifacts, log_position=2
        )
        attempt.bytes_receipt, attempt.state = sign(receipt, self.sign_receipts_with), "received"
        return attempt.bytes_receipt

    async def GetVerdicts(self, request: calls.GetVerdictsRequest, context: Any) -> Any:
        def work() -> calls.GetVerdictsReply:
            found = []
            for raw in request.claims:
                attempt = self._claimed(raw)
                outcome = self.verdict_for(attempt)
                if outcome is not None:
                    found.append(sign(self._verdict(attempt, accepted=outcome == "accepted"), self.key))
            return calls.GetVerdictsReply(verdict_envelopes=tuple(found))

        return await self._answer("GetVerdicts", context, work)

    def _verdict(self, attempt: Attempt, *, accepted: bool) -> Verdict:
        return Verdict(
            run=self.run,
            claim=attempt.claim_sha256,
            unit=attempt.lease.unit,
            outcome="accepted" if accepted else "rejected",
            code="MERGED" if accepted else "REPLAY_DIFFERS",
            sentence="Merged into checkpoint 1." if accepted else "A referee got another delta.",
            weight=2**23 if accepted else 0,
            checkpoint=1 if accepted else None,
        )
