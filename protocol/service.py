"""The service as a table: every call, its messages, who may make it; and errors on their way over the wire.

A call that is not in `CALLS` cannot be served, and a server whose handlers are not exactly those of the table does
not start: an RPC without an auth rule cannot exist.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum, unique
from typing import Any, Final

import grpc
import grpc.aio

from protocol import calls
from protocol.convert import decoder, encode
from protocol.errors import (
    ERRORS_BY_CODE,
    Bug,
    CommonweightError,
    LocalProblem,
    PayloadInvalid,
    RequestTooSlow,
    TryLater,
    Unreachable,
)
from protocol.limits import (
    MAX_METADATA_BYTES,
    MAX_RECEIVE_BYTES,
    MAX_STREAMS_PER_CONNECTION,
    MINUTE_MS,
    REQUEST_PATIENCE_MS,
    SECOND_MS,
)
from protocol.printing import printable
from protocol.wire import coordinator_pb2

SERVICE: Final = "commonweight.v1.Coordinator"
SESSION_METADATA: Final = "cw-session-bin"
ERROR_METADATA: Final = "cw-error"
RETRY_METADATA: Final = "cw-retry-after-ms"


@unique
class Auth(Enum):
    """Who may make a call."""

    OPEN = "open"  # anybody; limited per address
    SESSION = "session"  # a device with a token; limited per device
    AUDITOR = "auditor"  # an auditor with a token; limited like a device


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One RPC: its messages, whether the request is a stream, and who may make it."""

    request: type[Any]
    reply: type[Any]
    auth: Auth
    client_streams: bool = False


CALLS: Final[dict[str, Call]] = {
    "GetEndpoint": Call(request=calls.GetEndpointRequest, reply=calls.GetEndpointReply, auth=Auth.OPEN),
    "GetStatus": Call(request=calls.GetStatusRequest, reply=calls.GetStatusReply, auth=Auth.OPEN),
    "GetNonce": Call(request=calls.GetNonceRequest, reply=calls.GetNonceReply, auth=Auth.OPEN),
    "OpenSession": Call(request=calls.OpenSessionRequest, reply=calls.OpenSessionReply, auth=Auth.OPEN),
    "LeaseUnit": Call(request=calls.LeaseUnitRequest, reply=calls.LeaseUnitReply, auth=Auth.SESSION),
    "HandBack": Call(request=calls.HandBackRequest, reply=calls.HandBackReply, auth=Auth.SESSION),
    "SubmitClaim": Call(request=calls.SubmitClaimRequest, reply=calls.SubmitClaimReply, auth=Auth.SESSION),
    "SubmitSketch": Call(request=calls.SubmitSketchRequest, reply=calls.SubmitSketchReply, auth=Auth.SESSION),
    "GetUpload": Call(request=calls.GetUploadRequest, reply=calls.GetUploadReply, auth=Auth.SESSION),
    "Upload": Call(request=calls.UploadRequest, reply=calls.UploadReply, auth=Auth.SESSION, client_streams=True),
    "GetVerdicts": Call(request=calls.GetVerdictsRequest, reply=calls.GetVerdictsReply, auth=Auth.SESSION),
    "Appeal": Call(request=calls.AppealRequest, reply=calls.AppealReply, auth=Auth.SESSION),
    "TakeAudit": Call(request=calls.TakeAuditRequest, reply=calls.TakeAuditReply, auth=Auth.AUDITOR),
    "ReadArtifact": Call(request=calls.ReadArtifactRequest, reply=calls.ReadArtifactReply, auth=Auth.AUDITOR),
    "SubmitOpinions": Call(request=calls.SubmitOpinionsRequest, reply=calls.SubmitOpinionsReply, auth=Auth.AUDITOR),
}
"""Every RPC of the service."""

SERVER_OPTIONS: Final[Sequence[tuple[str, Any]]] = (
    # With this limit a gzip bomb costs nothing: the size is checked while inflating. Compression is off besides.
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", 2 * MAX_RECEIVE_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES // 2),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ("grpc.max_connection_idle_ms", 5 * MINUTE_MS),
    ("grpc.max_connection_age_ms", 60 * MINUTE_MS),
    ("grpc.max_connection_age_grace_ms", 10 * MINUTE_MS),
    ("grpc.keepalive_time_ms", MINUTE_MS),
    ("grpc.keepalive_timeout_ms", 20 * SECOND_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", 20 * SECOND_MS),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.server_handshake_timeout_ms", 10 * SECOND_MS),
    ("grpc.so_reuseport", 0),
)
"""Options of the coordinator's gRPC server."""

CHANNEL_OPTIONS: Final[Sequence[tuple[str, Any]]] = (
    ("grpc.max_receive_message_length", 2 * MAX_RECEIVE_BYTES),
    ("grpc.keepalive_time_ms", MINUTE_MS),
    ("grpc.keepalive_timeout_ms", 20 * SECOND_MS),
    # A worker must notice soon that the coordinator is back, and not hammer it.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 15 * SECOND_MS),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
"""Options of a worker's channel."""

CERTIFICATE_NAME: Final = "commonweight"
"""The name in the coordinator's own certificate; the run's signature over the certificate is what counts."""


def _decoded_or_refusal(kind: type[Any]) -> Callable[[bytes], Any]:
    """Decode a request, or return (not raise) why it can't be: gRPC would turn an exception into INTERNAL."""
    decode = decoder(kind)

    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw)
        except CommonweightError as refusal:
            return refusal

    return decoded


Door = Callable[[grpc.aio.ServicerContext[Any, Any]], AbstractContextManager[None]]
"""What a call passes before its first message is awaited; raises a `CommonweightError` to keep it out."""


def service_handler(implementation: object, *, door: Door | None = None) -> grpc.GenericRpcHandler:
    """Return the gRPC handler that serves `implementation`, whose methods are named as in `CALLS`.

    A request that can't be decoded reaches the method as a `CommonweightError` instead of a message. On the wire all is
    as in the proto file; here every call is taken as a stream, because gRPC would wait for ever, and uncounted, for the
    one message of a unary call.

    Raises `TypeError` if a call of the table is not implemented, or the proto file has one that the table has not.
    """
    check_table([method.name for method in coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].methods])
    handlers: dict[str, Any] = {}
    for name, call in CALLS.items():
        method = getattr(implementation, name, None)
        if method is None:
            raise TypeError(f"{type(implementation).__name__} does not implement {name}")
        handlers[name] = grpc.stream_unary_rpc_method_handler(
            _behind_door(method if call.client_streams else _with_one_message(method), door or _open_door),
            request_deserializer=_decoded_or_refusal(call.request),
            response_serializer=encode,
        )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _open_door(_context: object) -> AbstractContextManager[None]:
    return nullcontext()


def _behind_door(method: Callable[..., Any], door: Door) -> Callable[..., Any]:
    async def served(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            with door(context):
                return await method(requests, context)
        except CommonweightError as error:
            code, sentence, metadata = status_of(error)
            await context.abort(code, sentence, trailing_metadata=metadata)

    return served


def _with_one_message(method: Callable[..., Any]) -> Callable[..., Any]:
    async def served(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await method(await first_message(requests), context)

    return served


async def first_message(requests: AsyncIterator[Any]) -> Any:
    """Return a call's first message; raise `RequestTooSlow` if it does not come, `PayloadInvalid` if there is none."""
    try:
        async with asyncio.timeout(REQUEST_PATIENCE_MS / 1000):
            return await anext(aiter(requests))
    except TimeoutError:
        raise RequestTooSlow from None
    except StopAsyncIteration:
        raise PayloadInvalid("The call ended without a message.") from None


def check_table(methods_of_service: Sequence[str]) -> None:
    """Raise `TypeError` unless `CALLS` covers exactly the methods of the proto file."""
    if set(CALLS) != set(methods_of_service):
        raise TypeError(f"CALLS and the proto file differ in {sorted(set(CALLS) ^ set(methods_of_service))}")


def stub(channel: grpc.aio.Channel, name: str) -> Any:
    """Return the callable of one RPC on a channel; it takes and returns values of `protocol.calls`."""
    call = CALLS[name]
    make = channel.stream_unary if call.client_streams else channel.unary_unary
    return make(f"/{SERVICE}/{name}", request_serializer=encode, response_deserializer=decoder(call.reply))


def status_of(error: CommonweightError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return gRPC status, public sentence and trailing metadata of an error.

    A `Bug` or a `LocalProblem` of the server is nobody else's business, and may name its files: neither shows detail.
    """
    if isinstance(error, (Bug, LocalProblem)):
        error = Bug()
    metadata = [(ERROR_METADATA, error.code)]
    if isinstance(error, TryLater):
        metadata.append((RETRY_METADATA, str(error.retry_after_ms)))
    return grpc.StatusCode[error.status], error.message, tuple(metadata)


def error_of(error: grpc.aio.AioRpcError) -> CommonweightError:
    """Return the error that the other side meant; `Unreachable` when it was the network or gRPC itself."""
    metadata: Mapping[str, Any] = dict(error.trailing_metadata() or ())
    kind = ERRORS_BY_CODE.get(str(metadata.get(ERROR_METADATA, "")))
    details = printable((error.details() or "")[:1000])
    if kind is None:
        return Unreachable(f"The coordinator did not answer ({error.code().name}): {details[:200] or 'no details'}.")
    if issubclass(kind, TryLater):
        wait = str(metadata.get(RETRY_METADATA, ""))
        # A number without end must not crash a worker; how long to wait at most is the worker's own decision.
        usable = wait.isascii() and wait.isdigit() and len(wait) <= 12
        return kind(details, retry_after_ms=int(wait) if usable else 5_000)
    return kind(details)
