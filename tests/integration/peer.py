"""A volunteer made by hand: real keys, real TLS, real messages; it can do everything wrong that a stranger might."""

import hashlib
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from diloco import NUMERICS
from diloco.codec import encode
from diloco.container import Container, write_container
from diloco.sketch import sketch
from protocol import calls
from protocol.documents import (
    Artifact,
    Claim,
    ClaimReceipt,
    DeviceDelegation,
    Lease,
    RunConfig,
    SessionProof,
    digest_of,
    sign,
)
from protocol.errors import CommonweightError
from protocol.join import JoinString
from protocol.keys import PrivateKey
from protocol.limits import UPLOAD_CHUNK_BYTES
from protocol.service import CERTIFICATE_NAME, CHANNEL_OPTIONS, SESSION_METADATA, error_of, stub
from protocol.trust import RunTrust
from verify.replay import codec_config, delta_schema

ZERO = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A claimed delta on disk."""

    lease: Lease
    claim: Claim
    path: Path

    @property
    def digest(self) -> bytes:
        """SHA-256 of the claim's payload."""
        return bytes.fromhex(digest_of(self.claim))


class Peer:
    """One device of one owner, connected to a coordinator."""

    def __init__(self, channel: grpc.aio.Channel, join: JoinString, certificate_sha256: str) -> None:
        self.channel = channel
        self.join = join
        self.certificate_sha256 = certificate_sha256
        self.owner = PrivateKey.generate()
        self.device = PrivateKey.generate()
        self.trust = RunTrust(join.run)
        self.token = b""

    @property
    def config(self) -> RunConfig:
        """The run's config."""
        return self.trust.config

    async def call(self, name: str, request: Any, **options: Any) -> Any:
        """Make a call; raise the error that the coordinator meant."""
        try:
            return await stub(self.channel, name)(
                request, metadata=((SESSION_METADATA, self.token),), timeout=60, **options
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from None

    async def believe(self) -> None:
        """Take the steps of trust that a worker takes."""
        reply = await self.call("GetEndpoint", calls.GetEndpointRequest())
        self.trust.admit_root(reply.root_public_key)
        self.trust.admit_delegation(reply.delegation_envelope, now_ms=0)
        self.trust.admit_config(reply.config_envelope)
        self.trust.admit_endpoint(reply.endpoint_envelope, certificate_sha256=self.certificate_sha256, now_ms=0)

    async def proof(self, **changes: Any) -> SessionProof:
        """Return a session proof with a fresh nonce, and with changes."""
        nonce = (await self.call("GetNonce", calls.GetNonceRequest())).nonce.hex()
        honest = SessionProof(
            run=self.join.run,
            certificate_sha256=self.certificate_sha256,
            nonce=nonce,
            numerics=NUMERICS,
            trainer_version="commonweight test",
            device_class="cpu-test",
            terms_sha256=self.config.terms_sha256,
        )
        return replace(honest, **changes)

    async def open_session(self, proof: SessionProof | None = None, key: PrivateKey | None = None) -> None:
        """Open a session."""
        delegation = DeviceDelegation(owner_public_key=self.owner.public.hex, device_public_key=self.device.public.hex)
        reply = await self.call(
            "OpenSession",
            calls.OpenSessionRequest(
                proof_envelope=sign(proof or await self.proof(), key or self.device),
                delegation_envelope=sign(delegation, self.owner),
            ),
        )
        self.token = reply.token

    async def lease(self, wait_ms: int = 10_000) -> Lease:
        """Get a unit."""
        reply = await self.call("LeaseUnit", calls.LeaseUnitRequest(wait_ms=wait_ms))
        assert reply.lease_envelope, reply.reason
        return self.trust.lease(reply.lease_envelope)

    def work(self, lease: Lease, path: Path, *, scale: float = 1e-3) -> Work:
        """Make up a delta for a lease: noise, well-formed, deterministic in the unit."""
        schema, codec = delta_schema(self.config), codec_config(self.config)
        random = np.random.default_rng(int(lease.unit[:8], 16))
        delta = {spec.name: (random.standard_normal(spec.shape) * scale).astype(np.float32) for spec in schema.tensors}
        encoded = encode(delta, schema, codec, bytes.fromhex(lease.seed))
        write_container(path, encoded, bytes.fromhex(lease.unit))
        container = Container.open(path, schema, codec, bytes.fromhex(lease.unit))
        return self.claim_file(lease, path, container.content_digest().hex())

    def claim_file(self, lease: Lease, path: Path, content_sha256: str = ZERO, **changes: Any) -> Work:
        """Claim whatever file lies at `path`."""
        raw = path.read_bytes()
        artifact = Artifact(
            role="delta",
            content_sha256=content_sha256,
            blob_sha256=hashlib.sha256(raw).hexdigest(),
            size=len(raw),
        )
        honest = Claim(
            run=self.join.run,
            lease=lease.lease,
            lease_sha256=digest_of(lease),
            unit=lease.unit,
            device=self.device.public.key_id,
            artifacts=(artifact,),
            trail_root=ZERO,
            salt=hashlib.sha256(lease.lease.encode()).hexdigest(),
            samples=self.config.training.steps * self.config.training.batch,
            loss=1.0,
            trainer_version="commonweight test",
            device_class="cpu-test",
        )
        return Work(lease=lease, claim=replace(honest, **changes), path=path)

    async def submit(self, work: Work, key: PrivateKey | None = None) -> ClaimReceipt:
        """Send the claim; return its verified receipt."""
        reply = await self.call(
            "SubmitClaim", calls.SubmitClaimRequest(claim_envelope=sign(work.claim, key or self.device))
        )
        return self.trust.claim_receipt(reply.receipt_envelope)

    async def sketch(self, work: Work, receipt: ClaimReceipt, raw: bytes | None = None) -> calls.Instruction:
        """Send the sketch."""
        if raw is None:
            schema, codec = delta_schema(self.config), codec_config(self.config)
            container = Container.open(work.path, schema, codec, bytes.fromhex(work.lease.unit))
            raw = sketch(container.decoded_chunks(), bytes.fromhex(receipt.sketch_seed)).astype("<f4").tobytes()
        reply = await self.call("SubmitSketch", calls.SubmitSketchRequest(claim=work.digest, sketch=raw))
        instruction: calls.Instruction = reply.next
        return instruction

    async def offset(self, work: Work) -> int:
        """Ask how many bytes are stored."""
        reply = await self.call("GetUpload", calls.GetUploadRequest(claim=work.digest, role="delta"))
        stored: int = reply.offset
        return stored

    async def upload(
        self, work: Work, *, offset: int = 0, data: bytes | None = None, chunk: int = UPLOAD_CHUNK_BYTES
    ) -> bytes:
        """Upload from an offset; return the receipt's envelope."""
        raw = work.path.read_bytes()[offset:] if data is None else data
        reply = await self.call("Upload", _requests(work.digest, offset, raw, chunk))
        receipt: bytes = reply.receipt_envelope
        return receipt

    async def deliver(self, work: Work) -> bytes:
        """Claim, sketch, upload."""
        receipt = await self.submit(work)
        await self.sketch(work, receipt)
        return await self.upload(work, offset=await self.offset(work))


async def _requests(claim: bytes, offset: int, raw: bytes, chunk: int) -> AsyncIterator[calls.UploadRequest]:
    yield calls.UploadRequest(claim=claim, role="delta", offset=offset)
    for start in range(0, len(raw), chunk):
        yield calls.UploadRequest(data=raw[start : start + chunk])


@asynccontextmanager
async def connected(
    join: JoinString, *, session: bool = True, options: Sequence[tuple[str, Any]] = (), address: str = ""
) -> AsyncIterator[Peer]:
    """Connect a new peer (with new keys) to a coordinator, by default with a session."""
    pem = ssl.get_server_certificate((join.host, join.port))
    channel = grpc.aio.secure_channel(
        address or join.target,
        grpc.ssl_channel_credentials(pem.encode()),
        options=(*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", CERTIFICATE_NAME), *options),
    )
    async with channel:
        peer = Peer(channel, join, hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest())
        await peer.believe()
        if session:
            await peer.open_session()
        yield peer


async def refused(awaitable: Any) -> CommonweightError:
    """Return the error with which a call was refused; fail if it was not."""
    try:
        value = await awaitable
    except CommonweightError as error:
        return error
    raise AssertionError(f"it was not refused but gave {value!r}")
