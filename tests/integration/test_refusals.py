"""Whatever a stranger sends wrong is refused with its own code and a sentence, and nothing of it is stored."""

import asyncio
import gzip
import hashlib
import json
import os
import struct
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np
import pytest
import zstandard

from coordinator.sqlite_store import SqliteStore
from coordinator.units import AttemptState
from diloco import NUMERICS
from diloco.container import expected_header
from diloco.frames import write_frames
from protocol import calls
from protocol.documents import Digest, Lease, LeaseId
from protocol.errors import (
    ClaimConflict,
    ClaimMismatch,
    ClaimUnknown,
    CommonweightError,
    ContentMismatch,
    DeltaCodeIllegal,
    DeltaNotFinite,
    DeltaOversized,
    DeltaSchemaMismatch,
    DeltaStreamCorrupt,
    DeltaTruncated,
    DigestMismatch,
    EndpointUntrusted,
    LeaseUnknown,
    NonceUnknown,
    NumericsMismatch,
    PayloadInvalid,
    SessionRequired,
    SignatureInvalid,
    SketchInvalid,
    StepOutOfOrder,
    TermsNotAccepted,
    UploadOffsetWrong,
    WrongRun,
)
from protocol.join import JoinString
from protocol.keys import PrivateKey
from protocol.limits import SKETCH_BYTES
from tests.integration.live_run import LiveRun
from tests.integration.peer import ZERO, Peer, Work, connected, refused
from verify.replay import codec_config, delta_schema

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end."""
    return asyncio.run(work)


def is_refusal(error: CommonweightError, kind: type[CommonweightError]) -> None:
    """Assert that an error has the code, and a sentence that a person can read."""
    assert error.code == kind.code, f"{error.code}: {error.message}"
    assert len(error.message) > 20
    assert error.message.endswith((".", "again"))


def attempt_state(served: LiveRun, lease: Lease) -> AttemptState:
    """Look into the database which state an attempt is in."""
    store = SqliteStore.open(served.directory.database)
    try:
        attempt = store.attempt(LeaseId(lease.lease))
        assert attempt is not None
        return attempt.state
    finally:
        store.close()


def stored_blobs(served: LiveRun) -> set[str]:
    """Return the digests of all stored deltas."""
    return {path.name for path in served.directory.blobs.rglob("*") if path.is_file()}


def resident_bytes(pid: int) -> int:
    """Return how much memory a process has in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def header_of(peer: Peer, lease: Lease) -> bytes:
    """Return the header that a delta of this lease must have."""
    return expected_header(delta_schema(peer.config), codec_config(peer.config), bytes.fromhex(lease.unit))


async def sketched(peer: Peer, work: Work) -> None:
    """Claim and send a sketch of zeros, so that the bytes come next."""
    receipt = await peer.submit(work)
    await peer.sketch(work, receipt, raw=bytes(SKETCH_BYTES))


# --- sessions ------------------------------------------------------------------------------------------------


def test_a_call_without_a_session_is_refused(served: LiveRun) -> None:
    async def story() -> None:
        async with connected(served.join, session=False) as peer:
            is_refusal(await refused(peer.lease()), SessionRequired)

    run(story())


def test_a_session_proof_signed_by_another_key_is_refused(served: LiveRun) -> None:
    async def story() -> None:
        async with connected(served.join, session=False) as peer:
            is_refusal(await refused(peer.open_session(key=PrivateKey.generate())), SignatureInvalid)

    run(story())


def test_a_worker_of_other_numerics_is_told_what_to_install(served: LiveRun) -> None:
    async def story() -> None:
        async with connected(served.join, session=False) as peer:
            error = await refused(peer.open_session(await peer.proof(numerics=99)))
            is_refusal(error, NumericsMismatch)
            assert f"numerics {NUMERICS}" in error.message
            assert "99" in error.message
            assert "Install" in error.message

    run(story())


def test_a_proof_for_another_run_server_or_nonce_or_without_terms_is_refused(served: LiveRun) -> None:
    async def story() -> None:
        async with connected(served.join, session=False) as peer:
            is_refusal(await refused(peer.open_session(await peer.proof(run=ZERO))), WrongRun)
            error = await refused(peer.open_session(await peer.proof(certificate_sha256=ZERO)))
            assert error.code == "DELEGATION_INVALID"
            is_refusal(await refused(peer.open_session(await peer.proof(nonce=ZERO))), NonceUnknown)
            is_refusal(await refused(peer.open_session(await peer.proof(terms_sha256=ZERO))), TermsNotAccepted)

    run(story())


def test_a_proof_can_be_used_once_only(served: LiveRun) -> None:
    async def story() -> None:
        async with connected(served.join, session=False) as peer:
            proof = await peer.proof()
            await peer.open_session(proof)
            is_refusal(await refused(peer.open_session(proof)), NonceUnknown)

    run(story())


def test_an_endpoint_that_is_not_signed_under_the_runs_id_is_not_believed(served: LiveRun) -> None:
    stranger = JoinString(host=served.join.host, port=served.join.port, run=type(served.join.run)("ab" * 32))

    async def story() -> None:
        async with connected(stranger):
            raise AssertionError("the endpoint was believed")

    with pytest.raises(EndpointUntrusted):
        run(story())


# --- claims --------------------------------------------------------------------------------------------------


def test_a_claim_with_a_bad_signature_is_refused(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            lease = await peer.lease()
            work = peer.work(lease, folder / "delta")
            is_refusal(await refused(peer.submit(work, key=PrivateKey.generate())), SignatureInvalid)
            assert attempt_state(served, lease) is AttemptState.LEASED

    run(story())


def test_a_claim_for_a_unit_never_leased_to_that_device_is_refused(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as honest, connected(served.join) as thief:
            lease = await honest.lease()
            work = thief.work(lease, folder / "delta")
            is_refusal(await refused(thief.submit(work)), LeaseUnknown)
            made_up = thief.claim_file(replace(lease, lease="f" * 32), folder / "delta")
            is_refusal(await refused(thief.submit(made_up)), LeaseUnknown)
            assert attempt_state(served, lease) is AttemptState.LEASED

    run(story())


def test_a_claim_that_does_not_bind_its_lease_is_refused(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            lease = await peer.lease()
            work = peer.work(lease, folder / "delta")
            content = work.claim.artifacts[0].content_sha256
            for changes in ({"lease_sha256": ZERO}, {"unit": ZERO}, {"samples": 10**9}):
                wrong = peer.claim_file(lease, folder / "delta", content, **changes)
                is_refusal(await refused(peer.submit(wrong)), ClaimMismatch)

    run(story())


def test_a_claim_of_more_bytes_than_the_lease_allows_is_refused_and_one_of_as_many_is_not(
    served: LiveRun, folder: Path
) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            lease = await peer.lease()
            (limit,) = lease.artifacts
            (folder / "large").write_bytes(bytes(limit.max_bytes + 1))
            error = await refused(peer.submit(peer.claim_file(lease, folder / "large")))
            is_refusal(error, ClaimMismatch)
            assert f"at most {limit.max_bytes} bytes" in error.message
            (folder / "empty").write_bytes(b"")
            is_refusal(await refused(peer.submit(peer.claim_file(lease, folder / "empty"))), ClaimMismatch)
            assert attempt_state(served, lease) is AttemptState.LEASED
            (folder / "largest").write_bytes(bytes(limit.max_bytes))
            assert await peer.submit(peer.claim_file(lease, folder / "largest"))

    run(story())


def test_the_same_claim_gives_the_same_receipt_and_a_different_one_is_a_conflict(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            lease = await peer.lease()
            work = peer.work(lease, folder / "delta")
            first = await peer.submit(work)
            assert await peer.submit(work) == first
            other = replace(work, claim=replace(work.claim, salt="12" * 32))
            is_refusal(await refused(peer.submit(other)), ClaimConflict)
            assert await peer.submit(work) == first
            store = SqliteStore.open(served.directory.database)
            assert len(store.evidence(LeaseId(lease.lease))) == 1
            store.close()

    run(story())


def test_sketch_and_bytes_must_follow_the_claim_in_order(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            lease = await peer.lease()
            work = peer.work(lease, folder / "delta")
            is_refusal(await refused(peer.upload(work)), ClaimUnknown)
            receipt = await peer.submit(work)
            is_refusal(await refused(peer.upload(work)), StepOutOfOrder)
            is_refusal(await refused(peer.sketch(work, receipt, raw=b"short")), SketchInvalid)
            bad = struct.pack("<1024f", *[float("nan")] * 1024)
            is_refusal(await refused(peer.sketch(work, receipt, raw=bad)), SketchInvalid)
            assert await peer.sketch(work, receipt) is calls.Instruction.UPLOAD
            is_refusal(await refused(peer.sketch(work, receipt, raw=bytes(SKETCH_BYTES))), SketchInvalid)
            assert await peer.upload(work)

    run(story())


def test_a_claim_of_somebody_else_cannot_be_uploaded_to(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer, connected(served.join) as thief:
            work = peer.work(await peer.lease(), folder / "delta")
            await sketched(peer, work)
            is_refusal(await refused(thief.upload(work)), ClaimUnknown)

    run(story())


# --- bytes ---------------------------------------------------------------------------------------------------


async def upload_refused(served: LiveRun, peer: Peer, work: Work, raw: bytes) -> CommonweightError:
    """Claim, sketch and upload; return the refusal, having checked that nothing was stored as accepted."""
    before = stored_blobs(served)
    await sketched(peer, work)
    error = await refused(peer.upload(work, data=raw))
    assert stored_blobs(served) == before
    assert attempt_state(served, work.lease) in {AttemptState.SKETCHED, AttemptState.JUDGED}
    return error


def test_a_truncated_upload_says_where_it_stopped_and_can_go_on(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            raw = work.path.read_bytes()
            error = await upload_refused(served, peer, work, raw[:-7])
            is_refusal(error, DeltaTruncated)
            assert str(len(raw) - 7) in error.message
            assert await peer.offset(work) == len(raw) - 7
            is_refusal(await refused(peer.upload(work, offset=len(raw) - 9)), UploadOffsetWrong)
            assert await peer.upload(work, offset=len(raw) - 7)

    run(story())


def test_an_oversized_upload_is_cut_at_the_claimed_size(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            raw = work.path.read_bytes()
            is_refusal(await upload_refused(served, peer, work, raw + bytes(5_000_000)), DeltaOversized)
            assert await peer.offset(work) <= len(raw)

    run(story())


def test_other_bytes_than_the_claimed_ones_are_thrown_away(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            work = peer.work(await peer.lease(), folder / "delta")
            raw = bytearray(work.path.read_bytes())
            raw[len(raw) // 2] ^= 1
            is_refusal(await upload_refused(served, peer, work, bytes(raw)), DigestMismatch)
            assert await peer.offset(work) == 0
            assert await peer.upload(work)

    run(story())


def poisoned(peer: Peer, lease: Lease, folder: Path, kind: str) -> bytes:
    """Return a delta file with one thing wrong, in its content or in how it is packed."""
    raw = peer.work(lease, folder / "honest").path.read_bytes()
    first = raw.index(zstandard.FRAME_HEADER)  # the frames begin behind their table
    match kind:
        case "one byte":
            return raw[:1]
        case "no frames":
            return raw[:first]
        case "gzip":
            return gzip.compress(bytes(64 << 20))[: len(raw)].ljust(len(raw), b"\0")
        case "bomb":
            return with_first_frame(raw, zstandard.ZstdCompressor().compress(bytes(256 << 20)))
        case "bomb that announces little":
            # A frame by hand: its descriptor, a content size of 4 bytes, and a gigabyte in blocks of one repeated byte.
            announced = zstandard.get_frame_parameters(raw[first:]).content_size.to_bytes(4, "little")
            blocks = b"\x02\x00\x10\x00" * 8000 + b"\x0b\x00\x00\x00"
            return with_first_frame(raw, zstandard.FRAME_HEADER + b"\x80\x88" + announced + blocks)
        case _:
            path = folder / "poisoned"
            content = poisoned_content(peer, lease, raw, kind)
            write_frames(path, len(content), [content])
            return path.read_bytes()


def with_first_frame(raw: bytes, frame: bytes) -> bytes:
    """Return a delta file whose first frame is another one; the table has its length behind the first 8 bytes."""
    first = raw.index(zstandard.FRAME_HEADER)
    second = first + int.from_bytes(raw[8:12], "little")
    return raw[:8] + len(frame).to_bytes(4, "little") + raw[12:first] + frame + raw[second:]


def poisoned_content(peer: Peer, lease: Lease, raw: bytes, kind: str) -> bytearray:
    """Return the content of a delta with one thing wrong."""
    content = bytearray(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read())
    header = header_of(peer, lease)
    names: dict[str, Any] = json.loads(header[8:])
    scales = next(value for key, value in names.items() if key.endswith(".scales"))
    codes = next(value for key, value in names.items() if key.endswith(".codes"))
    scale, code = (len(header) + entry["data_offsets"][0] for entry in (scales, codes))
    match kind:
        case "nan":
            content[scale : scale + 2] = np.array([0x7FC0], dtype="<u2").tobytes()
        case "inf":
            content[scale : scale + 2] = np.array([0x7F80], dtype="<u2").tobytes()
        case "illegal code":
            content[code] = 0xFF
        case "codes under no scale":
            content[scale : scale + 2] = bytes(2)
        case "other schema":
            content[20] ^= 1
        case "66 MB header":
            content[:8] = (66 << 20).to_bytes(8, "little")
        case _:
            raise AssertionError(kind)
    return content


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("nan", DeltaNotFinite),
        ("inf", DeltaNotFinite),
        ("illegal code", DeltaCodeIllegal),
        ("codes under no scale", DeltaCodeIllegal),
        ("other schema", DeltaSchemaMismatch),
        ("66 MB header", DeltaSchemaMismatch),
        ("one byte", DeltaTruncated),
        ("no frames", DeltaTruncated),
        ("gzip", DeltaStreamCorrupt),
        ("bomb", DeltaStreamCorrupt),
        ("bomb that announces little", DeltaStreamCorrupt),
    ],
)
def test_a_poisonous_delta_is_rejected_for_good(
    served: LiveRun, folder: Path, kind: str, error: type[CommonweightError]
) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            lease = await peer.lease()
            raw = poisoned(peer, lease, folder, kind)
            (folder / "poison").write_bytes(raw)
            work = peer.claim_file(lease, folder / "poison")
            before = resident_bytes(served.pid("settler"))
            is_refusal(await upload_refused(served, peer, work, raw), error)
            assert resident_bytes(served.pid("settler")) - before < 32 << 20
            assert attempt_state(served, lease) is AttemptState.JUDGED
            (envelope,) = (
                await peer.call("GetVerdicts", calls.GetVerdictsRequest(claims=(work.digest,)))
            ).verdict_envelopes
            verdict = peer.trust.verdict(envelope)
            assert (verdict.outcome, verdict.code, verdict.weight) == ("rejected", error.code, 0)

    run(story())


def test_a_delta_with_another_content_than_claimed_is_rejected(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            lease = await peer.lease()
            honest = peer.work(lease, folder / "delta")
            lie = peer.claim_file(lease, honest.path, content_sha256=ZERO)
            is_refusal(await upload_refused(served, peer, lie, honest.path.read_bytes()), ContentMismatch)

    run(story())


def test_the_delta_of_another_unit_is_rejected(served: LiveRun, folder: Path) -> None:
    async def story() -> None:
        async with connected(served.join) as peer, connected(served.join) as copier:
            stolen = peer.work(await peer.lease(), folder / "delta")
            copy = copier.claim_file(await copier.lease(), stolen.path, stolen.claim.artifacts[0].content_sha256)
            is_refusal(await upload_refused(served, copier, copy, stolen.path.read_bytes()), DeltaSchemaMismatch)

    run(story())


# --- the wire ------------------------------------------------------------------------------------------------


def test_huge_and_compressed_messages_do_not_grow_the_server(served: LiveRun) -> None:
    before = resident_bytes(served.pid("control_process"))

    async def story() -> None:
        async with connected(served.join, options=(("grpc.max_send_message_length", -1),)) as peer:
            request = calls.SubmitClaimRequest(claim_envelope=bytes(64 << 20))
            assert (await refused(peer.call("SubmitClaim", request))).code == "UNREACHABLE"  # gRPC's own refusal
            bomb = calls.SubmitClaimRequest(claim_envelope=bytes(256 << 20))
            error = await refused(peer.call("SubmitClaim", bomb, compression=grpc.Compression.Gzip))
            assert error.code == "UNREACHABLE"
            assert (await peer.lease()).round == 1  # the connection and the server are well

    run(story())
    assert resident_bytes(served.pid("control_process")) - before < 48 << 20


def test_garbage_instead_of_messages_is_refused(served: LiveRun) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            raw: Any = peer.channel.unary_unary("/commonweight.v1.Coordinator/SubmitClaim")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(os.urandom(1000), metadata=(("cw-session-bin", peer.token),), timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            error = await refused(peer.call("SubmitClaim", calls.SubmitClaimRequest(claim_envelope=b"{}")))
            assert error.code == "ENVELOPE_INVALID"
            too_many = tuple(hashlib.sha256(bytes([n % 256])).digest() for n in range(300))
            error = await refused(peer.call("GetVerdicts", calls.GetVerdictsRequest(claims=too_many)))
            is_refusal(error, PayloadInvalid)

    run(story())


def test_a_digest_that_is_no_digest_finds_nothing(served: LiveRun) -> None:
    async def story() -> None:
        async with connected(served.join) as peer:
            error = await refused(peer.call("GetUpload", calls.GetUploadRequest(claim=b"x", role="../../etc")))
            is_refusal(error, ClaimUnknown)
            reply = await peer.call("GetVerdicts", calls.GetVerdictsRequest(claims=(b"x",)))
            assert reply.verdict_envelopes == ()

    run(story())
    assert Digest(ZERO) not in stored_blobs(served)
