"""Asking for a second referee: the one thing that a volunteer whose owner was banned can still do."""

import time

from diloco import NUMERICS
from protocol.canonical import canonical_json
from protocol.errors import AppealRefused
from protocol.join import JoinString
from worker.calling import Introduction
from worker.client import CoordinatorClient
from worker.durable import write_durably
from worker.home import WorkerHome
from worker.identity import load_or_make_identity
from worker.machine import this_machine
from worker.receipts import Receipt
from worker.spool import APPEALED
from worker.station import wall_ms


def check_appealable(receipt: Receipt, now_ms: int) -> None:
    """Raise `AppealRefused` if the coordinator would have to refuse an appeal."""
    name = f"Unit {receipt.unit[:12]}"
    if receipt.outcome != "rejected":
        raise AppealRefused(f"{name} was not rejected: it is {receipt.outcome}.")
    if receipt.appeal_until_ms is not None and now_ms > receipt.appeal_until_ms:
        day = time.strftime("%Y-%m-%d", time.gmtime(receipt.appeal_until_ms / 1000))
        raise AppealRefused(f"{name}: the time for an appeal was over on {day}.")


async def send_appeal(join: JoinString, home: WorkerHome, receipt: Receipt) -> None:
    """Send the appeal of a rejected claim, and note beside its verdict that it was sent.

    Raises:
        AppealRefused: the claim was not refuted by a referee, or it was appealed before.
        CommonweightError: see `CoordinatorClient`; the same call can be made again.
    """
    check_appealable(receipt, wall_ms())
    identity = load_or_make_identity(home.keys)
    machine = this_machine("cpu", 1, identity.device)
    client = CoordinatorClient(join, identity.papers, wall_ms=wall_ms)
    try:
        client.introduce(
            Introduction(numerics=NUMERICS, trainer_version=machine.trainer_version, device_class=machine.device_class)
        )
        await client.appeal(receipt.claim)
    finally:
        await client.close()
    write_durably(receipt.directory / APPEALED, canonical_json({"format": 1, "sent_ms": wall_ms()}))
