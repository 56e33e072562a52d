"""Entry of the control process: puts `Control`, its gRPC server and its clockwork together.

`python -P -m coordinator.control_process DIR SETTLER_FD LIFELINE_FD READY_FD PUBLIC_URL`
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from coordinator import deadlines
from coordinator.blobs import DirectoryBlobs
from coordinator.clock import Clock, WallClock
from coordinator.control import Control
from coordinator.desk import CLOCK_KEY, Desk
from coordinator.directory import RunDirectory, RunIdentity, sign_endpoint
from coordinator.lifeline import exit_with_parent, raise_file_limit
from coordinator.publisher import Publisher
from coordinator.servicer import Servicer
from coordinator.sessions import Sessions
from coordinator.settings_sections import StorageSettings
from coordinator.settler_client import SettlerClient
from coordinator.sqlite_store import SqliteStore
from coordinator.staging import Staging
from coordinator.takedowns import TakedownDesk
from protocol import layout
from protocol.calls import GetEndpointReply
from protocol.documents import Digest
from protocol.limits import DAY_MS, MAX_CONCURRENT_RPCS, MIB
from protocol.service import SERVER_OPTIONS, service_handler

logger = logging.getLogger(__name__)

ENDPOINT_DAYS = 30
GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What the supervisor hands to the control process."""

    directory: RunDirectory
    settler: socket.socket
    ready: int
    public_url: str


def open_desk(directory: RunDirectory, identity: RunIdentity, delta_bytes: int, storage: StorageSettings) -> Desk:
    """Open the database and the clock of a run; must be called in the writer's thread."""
    store = SqliteStore.open(directory.database)
    stopped_ms = int(store.meta(CLOCK_KEY) or 0)
    desk = Desk(
        run=identity.run,
        config=identity.config,
        config_sha256=identity.config_sha256,
        key=identity.coordinator,
        run_secret=identity.run_secret,
        delta_bytes=delta_bytes,
        retain_rounds=storage.retain_rounds,
        snapshot_every=storage.snapshot_every,
        store=store,
        clock=WallClock(stopped_ms),
    )
    if stopped_ms:
        with store.transaction():
            deadlines.forgive_absence(desk, stopped_ms)
            # Said at once: another crash must not have the same absence forgiven again.
            store.put_meta(CLOCK_KEY, str(desk.clock.now_ms()))
    return desk


def _endpoint(identity: RunIdentity, public_url: str, clock: Clock) -> GetEndpointReply:
    """Say who answers here; signed anew for each caller, so that it never runs out while the server runs."""
    until = clock.now_ms() + ENDPOINT_DAYS * DAY_MS
    return GetEndpointReply(
        root_public_key=identity.root_public.raw,
        delegation_envelope=identity.delegation_envelope,
        config_envelope=identity.config_envelope,
        endpoint_envelope=sign_endpoint(identity, public_url, until),
    )


async def _build(wiring: Wiring, settler: SettlerClient, writer: ThreadPoolExecutor) -> tuple[Desk, Control, Servicer]:
    identity = wiring.directory.identity()
    settings = wiring.directory.settings()
    facts = await settler.call("describe")
    loop = asyncio.get_running_loop()
    desk = await loop.run_in_executor(
        writer,
        open_desk,
        wiring.directory,
        identity,
        int(facts["delta_bytes"]),
        settings.storage,
    )
    # What a merge writes: weights, momentum, residual, and the running average. An upload must never take the room that
    # its own merge needs.
    one_merge = (4 if identity.config.outer.ema_decay else 3) * (
        wiring.directory.checkpoint(0) / layout.WEIGHTS
    ).stat().st_size
    publisher = Publisher(wiring.directory.public, identity.coordinator)
    control = Control(
        desk=desk,
        blobs=DirectoryBlobs(wiring.directory.blobs),
        staging=Staging(wiring.directory.staging, reserve_bytes=settings.storage.reserve_mib * MIB + one_merge),
        publisher=publisher,
        settler=settler,
        heldout=wiring.directory.public / layout.shard_path(identity.config.data.heldout.sha256),
        takedowns=TakedownDesk(wiring.directory.takedowns, publisher, run=identity.run, config=identity.config),
        writer=writer,
    )
    sessions = Sessions(
        run=identity.run,
        root=identity.root_public,
        wall_ms=desk.clock.now_ms,
        config=identity.config,
        certificate_sha256=identity.certificate_sha256,
        upgrade_hint=(
            f"Install the Commonweight release whose numerics are {identity.config.numerics} "
            "(`commonweight --version` shows a release's numerics), then start the worker again."
        ),
    )
    servicer = Servicer(
        control=control,
        sessions=sessions,
        endpoint=lambda: _endpoint(identity, wiring.public_url, desk.clock),
    )
    return desk, control, servicer


def _server(servicer: Servicer, identity: RunIdentity, address: str) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=list(SERVER_OPTIONS), maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS)
    server.add_generic_rpc_handlers((service_handler(servicer, door=servicer.door),))
    credentials = grpc.ssl_server_credentials([(identity.tls_key_pem, identity.tls_certificate_pem)])
    return server, server.add_secure_port(address, credentials)


async def run(wiring: Wiring) -> int:
    """Serve until SIGTERM, or until a part dies; a part that dies ends the process (the supervisor restarts it)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    settings = wiring.directory.settings()
    writer = ThreadPoolExecutor(1, thread_name_prefix="database")
    settler = await SettlerClient.connect(wiring.settler)
    listening = loop.create_task(settler.listen(), name="settler")
    desk, control, servicer = await _build(wiring, settler, writer)
    await control.start(Digest(desk.config.genesis_sha256))
    address = f"{settings.server.bind}:{settings.server.port}"
    server, port = _server(servicer, wiring.directory.identity(), address)
    await server.start()
    os.write(wiring.ready, json.dumps({"port": port}).encode() + b"\n")
    parts = [listening, *(_part(loop, work, name) for name, work in _clockwork(control))]
    stopping = loop.create_task(stop.wait(), name="stop")
    done, _ = await asyncio.wait([stopping, *parts], return_when=asyncio.FIRST_COMPLETED)
    await server.stop(GRACE_SECONDS)
    for part in parts:
        part.cancel()
    await asyncio.gather(*parts, return_exceptions=True)
    await loop.run_in_executor(writer, desk.store.close)
    return 0 if stopping in done else _report(done)


def _clockwork(control: Control) -> list[tuple[str, Coroutine[Any, Any, None]]]:
    return [
        ("tick", control.tick()),
        ("sweep", control.sweep()),
        ("settle", control.settle()),
        ("compare", control.compare()),
        ("tell", control.tell()),
        ("watch", control.watch_settler()),
    ]


def _part(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
    return loop.create_task(work, name=name)


def _report(done: set["asyncio.Task[Any]"]) -> int:
    for part in done:
        logger.error("%s ended: %r", part.get_name(), part.exception(), extra={"action": "part_died"})
    return 1


def main(arguments: list[str]) -> int:
    """Run the control process."""
    directory, settler, lifeline, ready, public_url = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s control: %(message)s")
    exit_with_parent(int(lifeline))
    raise_file_limit()
    wiring = Wiring(
        directory=RunDirectory(Path(directory)),
        settler=socket.socket(fileno=int(settler)),
        ready=int(ready),
        public_url=public_url,
    )
    return asyncio.run(run(wiring))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
