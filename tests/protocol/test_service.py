"""The RPC table, and errors on their way through a real gRPC server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from protocol import calls
from protocol.errors import (
    Bug,
    ClaimConflict,
    CommonweightError,
    CoordinatorDiskFull,
    IllegalTransition,
    LeaseUnknown,
    PayloadInvalid,
    RateLimited,
    Unreachable,
)
from protocol.limits import MAX_RECEIVE_BYTES
from protocol.service import (
    CALLS,
    CHANNEL_OPTIONS,
    ERROR_METADATA,
    RETRY_METADATA,
    SERVER_OPTIONS,
    SERVICE,
    Auth,
    check_table,
    error_of,
    service_handler,
    status_of,
    stub,
)
from protocol.wire import coordinator_pb2

PROTO_SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]
OPEN_CALLS = {"GetEndpoint", "GetStatus", "GetNonce", "OpenSession"}
AUDITORS_CALLS = {"TakeAudit", "ReadArtifact", "SubmitOpinions"}


def test_the_table_has_exactly_the_methods_of_the_proto_file() -> None:
    check_table([method.name for method in PROTO_SERVICE.methods])
    assert PROTO_SERVICE.full_name == SERVICE


def test_a_method_without_a_rule_and_a_rule_without_a_method_are_found() -> None:
    with pytest.raises(TypeError, match="ReadDatabase"):
        check_table([*CALLS, "ReadDatabase"])
    with pytest.raises(TypeError, match="Upload"):
        check_table([name for name in CALLS if name != "Upload"])


@pytest.mark.parametrize("name", list(CALLS))
def test_a_call_has_the_messages_and_the_streaming_of_its_method(name: str) -> None:
    method = PROTO_SERVICE.methods_by_name[name]
    call = CALLS[name]
    assert call.request.__name__ == method.input_type.name
    assert call.reply.__name__ == method.output_type.name
    assert call.client_streams is method.client_streaming
    assert not method.server_streaming


def test_every_call_has_an_auth_rule_and_only_four_are_open() -> None:
    assert all(isinstance(call.auth, Auth) for call in CALLS.values())
    assert {name for name, call in CALLS.items() if call.auth is Auth.OPEN} == OPEN_CALLS


def test_only_auditors_judge() -> None:
    assert {name for name, call in CALLS.items() if call.auth is Auth.AUDITOR} == AUDITORS_CALLS


class Coordinator:
    """Serves two calls; the error that the next call raises is set from outside. The others are not reached."""

    def __init__(self) -> None:
        self.error: CommonweightError | None = None
        self.extra: tuple[tuple[str, str], ...] | None = None
        self.uploaded: list[int] = []

    async def GetStatus(self, request: calls.GetStatusRequest, context: Any) -> calls.GetStatusReply:
        if self.extra is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "as told", self.extra)
        if self.error is not None:
            await context.abort(*status_of(self.error))
        return calls.GetStatusReply(
            round=1, round_state="collecting", planned_rounds=9, checkpoint=0,
            units_open=4, units_assigned=0, units_accepted=0, devices_seen=2,
        )  # fmt: skip

    async def Upload(self, requests: AsyncIterator[calls.UploadRequest], context: Any) -> calls.UploadReply:
        self.uploaded = [len(request.data) async for request in requests]
        return calls.UploadReply(receipt_envelope=b"done")

    async def _never(self, request: object, context: Any) -> object:
        raise AssertionError("not called here")

    GetEndpoint = GetNonce = OpenSession = LeaseUnit = HandBack = _never
    SubmitClaim = SubmitSketch = GetUpload = GetVerdicts = _never
    Appeal = TakeAudit = ReadArtifact = SubmitOpinions = _never


def test_a_server_with_a_missing_implementation_does_not_start() -> None:
    class Incomplete(Coordinator):
        GetVerdicts = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="Incomplete does not implement GetVerdicts"):
        service_handler(Incomplete())


@asynccontextmanager
async def _served(coordinator: Coordinator) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((service_handler(coordinator),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
            yield channel
    finally:
        await server.stop(None)


async def _error_seen(coordinator: Coordinator) -> CommonweightError:
    async with _served(coordinator) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(channel, "GetStatus")(calls.GetStatusRequest(), timeout=10)
    return error_of(caught.value)


def _through_the_wire(error: CommonweightError) -> CommonweightError:
    coordinator = Coordinator()
    coordinator.error = error
    return asyncio.run(_error_seen(coordinator))


def _with_metadata(*metadata: tuple[str, str]) -> CommonweightError:
    coordinator = Coordinator()
    coordinator.extra = metadata
    return asyncio.run(_error_seen(coordinator))


def test_values_go_both_ways_through_a_real_server() -> None:
    async def exchange() -> None:
        coordinator = Coordinator()
        async with _served(coordinator) as channel:
            reply = await stub(channel, "GetStatus")(calls.GetStatusRequest(), timeout=10)
            assert reply.round_state == "collecting"
            assert reply.planned_rounds == 9

            async def chunks() -> AsyncIterator[calls.UploadRequest]:
                yield calls.UploadRequest(claim=b"c", role="delta", offset=0, data=b"12345")
                yield calls.UploadRequest(data=b"67")

            assert await stub(channel, "Upload")(chunks(), timeout=10) == calls.UploadReply(receipt_envelope=b"done")
            assert coordinator.uploaded == [5, 2]

    asyncio.run(exchange())


@pytest.mark.parametrize(
    "error",
    [
        LeaseUnknown("No lease 1e was given to this device."),
        ClaimConflict(),
        LeaseUnknown('Quotes ", percent % and a snowman \u2603\nsurvive.'),
    ],
)
def test_a_refusal_arrives_as_it_was_raised(error: CommonweightError) -> None:
    seen = _through_the_wire(error)
    assert type(seen) is type(error)
    assert seen.message == error.message.replace("\n", " ")


def test_a_try_later_arrives_with_its_waiting_time() -> None:
    seen = _through_the_wire(CoordinatorDiskFull(retry_after_ms=90_000))
    assert isinstance(seen, CoordinatorDiskFull)
    assert seen.retry_after_ms == 90_000


def test_a_bug_shows_no_detail_to_the_other_side() -> None:
    seen = _through_the_wire(IllegalTransition("unit 7 of /srv/secret was ASSIGNED"))
    assert type(seen) is Bug
    assert "secret" not in seen.message
    status, sentence, metadata = status_of(IllegalTransition("unit 7 of /srv/secret", private="more"))
    assert status is grpc.StatusCode.INTERNAL
    assert sentence == Bug().message
    assert metadata == ((ERROR_METADATA, "INTERNAL"),)


def test_an_error_carries_its_status_sentence_and_code_and_nothing_private() -> None:
    error = RateLimited("Slower, please.", private="10.0.0.1", retry_after_ms=70)
    assert status_of(error) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "Slower, please.",
        ((ERROR_METADATA, "RATE_LIMITED"), (RETRY_METADATA, "70")),
    )


@pytest.mark.parametrize("wait", ["", "soon", "-5", "1.5", "\u0667", "9" * 5000])
def test_a_waiting_time_that_is_no_sensible_number_becomes_five_seconds(wait: str) -> None:
    metadata = [(ERROR_METADATA, "SERVER_BUSY"), (RETRY_METADATA, wait)]
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details="busy"
    )
    seen = error_of(error)
    assert seen.code == "SERVER_BUSY"
    assert getattr(seen, "retry_after_ms", None) == 5_000


def test_a_code_that_we_do_not_know_counts_as_unreachable() -> None:
    seen = _with_metadata((ERROR_METADATA, "FROM_THE_FUTURE"))
    assert isinstance(seen, Unreachable)
    assert "UNAVAILABLE" in seen.message
    assert "as told" in seen.message
    assert isinstance(_with_metadata(), Unreachable)


def test_nobody_listening_is_unreachable() -> None:
    async def call() -> CommonweightError:
        async with grpc.aio.insecure_channel("127.0.0.1:1", options=CHANNEL_OPTIONS) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel, "GetStatus")(calls.GetStatusRequest(), timeout=5)
        return error_of(caught.value)

    assert isinstance(asyncio.run(call()), Unreachable)


def test_a_request_that_cannot_be_decoded_reaches_the_method_as_a_refusal() -> None:
    async def send() -> object:
        seen: list[object] = []

        class Listening(Coordinator):
            async def HandBack(self, request: object, context: Any) -> calls.HandBackReply:
                seen.append(request)
                return calls.HandBackReply()

        async with _served(Listening()) as channel:
            raw: Any = channel.unary_unary(f"/{SERVICE}/HandBack")
            await raw(b"\xff\xff", timeout=10)
        return seen[0]

    assert isinstance(asyncio.run(send()), PayloadInvalid)


def test_a_message_beyond_the_limit_never_reaches_the_coordinator() -> None:
    async def send() -> tuple[CommonweightError, list[int]]:
        coordinator = Coordinator()
        async with _served(coordinator) as channel:

            async def chunks() -> AsyncIterator[calls.UploadRequest]:
                yield calls.UploadRequest(data=bytes(MAX_RECEIVE_BYTES + 1))

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel, "Upload")(chunks(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return error_of(caught.value), coordinator.uploaded

    error, uploaded = asyncio.run(send())
    assert isinstance(error, Unreachable)
    assert uploaded == []
