"""How fast a delta goes up: the real path against the same bytes through plain gRPC, side by side in one run.

The real path is everything that a worker's delta meets: the signed claim, the stream over TLS in 1 MiB chunks, SHA-256
and disk on the way, admission by the settler (header, every scale and code, content digest), fsync, database commits
and signed receipts. The plain one streams the same messages over TLS to a server in another process that counts them.

    python -m benchmarks.upload [--quick]
"""

import argparse
import asyncio
import hashlib
import multiprocessing
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import grpc.aio
import numpy as np

from benchmarks.report import Report
from coordinator.directory import RunDirectory
from diloco.shards import ShardInfo, write_shard
from mmdit.conditioning import ConditioningConfig, encode_caption
from mmdit.presets import PRESETS
from protocol import calls
from protocol.limits import UPLOAD_CHUNK_BYTES
from protocol.service import CERTIFICATE_NAME, CHANNEL_OPTIONS, SERVER_OPTIONS, service_handler, stub
from tests.integration.live_run import LiveRun
from tests.integration.peer import Peer, Work, connected

PRESET = "rgb32"
UPLOADS = 9
TARGET_RATIO = 1 / 3
"""Hashing, writing, checking and signing may cost twice the transfer itself, on loopback and two shared cores."""


def write_data(folder: Path) -> None:
    """Write a training shard and a held-out one of noise, in the preset's shape."""
    shape = PRESETS[PRESET]
    conditioning = ConditioningConfig(
        kind="byte-patch", max_tokens=8, token_dim=shape.joint_attention_dim, pooled_dim=shape.pooled_projection_dim
    )
    random = np.random.default_rng(1)
    for name in ("0000", "heldout"):
        latents = random.standard_normal((8, shape.in_channels, shape.sample_size, shape.sample_size))
        text, pooled = encode_caption("noise", conditioning)
        info = ShardInfo(licence="CC0-1.0", source="noise for a benchmark")
        raw = write_shard(latents.astype(np.float16), [text] * 8, np.stack([pooled] * 8), info)
        (folder / f"{name}.safetensors").write_bytes(raw)


class PlainServer:
    """The other side of the plain stream: reads chunks and counts their bytes."""

    async def Upload(self, requests: AsyncIterator[calls.UploadRequest], _context: object) -> calls.UploadReply:
        """Count a stream's bytes."""
        total = 0
        async for request in requests:
            total += len(request.data)
        return calls.UploadReply(receipt_envelope=total.to_bytes(8, "little"))

    def __getattr__(self, name: str) -> object:
        return self.Upload


def serve_plain(root: str, port: Connection) -> None:
    """Serve the plain side in a process of its own, with the run's own certificate."""

    async def serve() -> None:
        identity = RunDirectory(Path(root)).identity()
        server = grpc.aio.server(options=list(SERVER_OPTIONS))
        server.add_generic_rpc_handlers((service_handler(PlainServer()),))
        credentials = grpc.ssl_server_credentials([(identity.tls_key_pem, identity.tls_certificate_pem)])
        port.send(server.add_secure_port("127.0.0.1:0", credentials))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


async def chunks(raw: bytes) -> AsyncIterator[calls.UploadRequest]:
    """Cut bytes as a worker does."""
    for start in range(0, len(raw), UPLOAD_CHUNK_BYTES):
        yield calls.UploadRequest(data=raw[start : start + UPLOAD_CHUNK_BYTES])


async def plain_seconds(pem: bytes, port: int, raw: bytes) -> float:
    """Send the bytes to the plain server; return the seconds."""
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", CERTIFICATE_NAME))
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(pem), options=options) as ours:
        await ours.channel_ready()
        began = time.perf_counter()
        reply = await stub(ours, "Upload")(chunks(raw), timeout=120)
        seconds = time.perf_counter() - began
    assert int.from_bytes(reply.receipt_envelope, "little") == len(raw)
    return seconds


async def real_seconds(peer: Peer, work: Work) -> float:
    """Claim and upload; return the seconds, without those in which the client makes its sketch."""
    began = time.perf_counter()
    receipt = await peer.submit(work)
    claimed = time.perf_counter() - began
    await peer.sketch(work, receipt)
    began = time.perf_counter()
    assert peer.trust.bytes_receipt(await peer.upload(work)).claim == work.digest.hex()
    return claimed + time.perf_counter() - began


async def measure(run: LiveRun, plain_port: int, folder: Path, uploads: int) -> tuple[list[float], list[float], int]:
    """Interleave real and plain uploads of the same files; return both seconds and the size."""
    pem = ssl.get_server_certificate((run.join.host, run.join.port)).encode()
    real, plain, size = [], [], 0
    async with connected(run.join) as peer:
        for number in range(uploads + 1):
            path = folder / f"delta-{number}"
            work = peer.work(await peer.lease(), path)
            raw = path.read_bytes()
            size = len(raw)
            hashlib.sha256(raw).digest()  # both begin with the file in the page cache
            seconds = (await real_seconds(peer, work), await plain_seconds(pem, plain_port, raw))
            path.unlink()
            if number:  # the first one warms up
                real.append(seconds[0])
                plain.append(seconds[1])
    return real, plain, size


def main() -> int:
    """Run the benchmark; the exit status says whether the target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three uploads; writes no result file")
    quick: bool = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        data.mkdir()
        write_data(data)
        settings = (f"model.preset={PRESET}", "data.source=noise for a benchmark", "data.licence=CC0-1.0")
        many = ("rounds.units=100", "rounds.min_units=100", "rounds.lease_seconds=3600")
        with LiveRun(folder, (*settings, *many), data=data) as run:
            run.start()
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            server = multiprocessing.get_context("spawn").Process(
                target=serve_plain, args=(str(run.directory.root), theirs), daemon=True
            )
            server.start()
            port = ours.recv()
            real, plain, size = asyncio.run(measure(run, port, folder, 3 if quick else UPLOADS))
            server.terminate()
    report = Report(name="upload")
    for path, seconds in (("real: claim, TLS, SHA-256, disk, admission, receipt", real), ("plain gRPC, TLS", plain)):
        median = statistics.median(seconds)
        report.add_row(
            path=path,
            delta_mb=size / 1e6,
            uploads=len(seconds),
            median_s=median,
            mb_per_s=size / 1e6 / median,
            slowest_mb_per_s=size / 1e6 / max(seconds),
        )
    ratio = statistics.median(p / r for p, r in zip(plain, real, strict=True))
    report.add_target(
        "speed of the real upload path against plain gRPC",
        target=f"at least {TARGET_RATIO:.2f}",
        value=ratio,
        met=ratio >= TARGET_RATIO,
    )
    return 0 if report.finish(quick=quick) else 1


if __name__ == "__main__":
    sys.exit(main())
