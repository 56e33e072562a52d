"""A connection to the coordinator that was proved to speak for the run, before anything of value is sent over it.

The server's certificate is fetched over TLS without trusting it; the gRPC channel then accepts that very certificate
and no other; over it the server says who it is; and only the run's own signatures, checked in the order of
`protocol.trust`, make it believed. Certificates can so be self-signed and rotated without a new join string.
"""

import asyncio
import ssl
from dataclasses import dataclass, field
from typing import Final

import grpc
import grpc.aio

from protocol.calls import GetEndpointReply, GetEndpointRequest
from protocol.canonical import sha256_hex
from protocol.documents import Digest, Endpoint
from protocol.errors import AccessRefused, EndpointUntrusted, Refusal, TryLater, Unreachable
from protocol.join import JoinString
from protocol.service import CERTIFICATE_NAME, CHANNEL_OPTIONS, error_of, stub
from protocol.trust import RunTrust

CONNECT_SECONDS: Final = 15.0
CALL_SECONDS: Final = 30.0


@dataclass(slots=True, kw_only=True, eq=False)
class Link:
    """A believed connection. It is closed when it was retired and the last call over it has ended."""

    channel: grpc.aio.Channel
    trust: RunTrust
    endpoint: Endpoint
    certificate_sha256: Digest
    users: int = 0
    retired: bool = field(default=False)


async def fetch_certificate(host: str, port: int) -> bytes:
    """Return the certificate that a server shows, in DER, without believing it.

    Raises:
        Unreachable: nobody answers, or not in TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(
                host.strip("[]"), port, ssl=context, server_hostname=CERTIFICATE_NAME
            )
    except (OSError, TimeoutError, ssl.SSLError) as error:
        raise Unreachable(f"{host}:{port} did not answer: {error or 'no answer in time'}.") from None
    secured: ssl.SSLObject = writer.get_extra_info("ssl_object")
    certificate = secured.getpeercert(binary_form=True)
    writer.transport.abort()
    if certificate is None:
        raise EndpointUntrusted("The server shows no certificate.")
    return certificate


async def open_link(join: JoinString, *, now_ms: int) -> Link:
    """Connect, and take the four steps to belief: root key, delegation, run config, endpoint.

    Raises:
        EndpointUntrusted: the server does not speak for the run of the join string. Nothing was sent to it.
        DelegationInvalid: the coordinator's own papers have run out.
        Unreachable: nobody answers.
    """
    certificate = await fetch_certificate(join.host, join.port)
    pem = ssl.DER_cert_to_PEM_cert(certificate).encode("ascii")
    options = (
        *CHANNEL_OPTIONS,
        ("grpc.ssl_target_name_override", CERTIFICATE_NAME),
        # A proxy would be asked by the channel but not by the fetch above: two ways, two servers.
        ("grpc.enable_http_proxy", 0),
    )
    channel = grpc.aio.secure_channel(join.target, grpc.ssl_channel_credentials(pem), options=options)
    try:
        reply = await _ask_endpoint(channel)
        fingerprint = Digest(sha256_hex(certificate))
        trust, endpoint = _believe(join, reply, fingerprint, now_ms)
    except BaseException:
        await channel.close()
        raise
    return Link(channel=channel, trust=trust, endpoint=endpoint, certificate_sha256=fingerprint)


async def _ask_endpoint(channel: grpc.aio.Channel) -> GetEndpointReply:
    try:
        reply: GetEndpointReply | None = await stub(channel, "GetEndpoint")(
            GetEndpointRequest(), timeout=CALL_SECONDS, wait_for_ready=False
        )
    except grpc.aio.AioRpcError as error:
        refusal = error_of(error)
        if isinstance(refusal, TryLater):
            raise refusal from None
        # Whoever says this has proved nothing yet: it must not be able to end a worker with a sentence of its own.
        raise Unreachable(f"The server did not say who it is: {refusal.message}") from None
    if reply is None:  # what gRPC gives for bytes that could not be decoded
        raise EndpointUntrusted("The server's answer is not one of a coordinator.")
    return reply


def _believe(
    join: JoinString, reply: GetEndpointReply, certificate_sha256: Digest, now_ms: int
) -> tuple[RunTrust, Endpoint]:
    trust = RunTrust(join.run)
    try:
        trust.admit_root(reply.root_public_key)
        trust.admit_delegation(reply.delegation_envelope, now_ms=now_ms)
        trust.admit_config(reply.config_envelope)
        endpoint = trust.admit_endpoint(reply.endpoint_envelope, certificate_sha256=certificate_sha256, now_ms=now_ms)
    except AccessRefused:
        raise
    except Refusal as refusal:
        raise EndpointUntrusted(f"The server could not prove that it speaks for the run: {refusal.message}") from None
    return trust, endpoint
