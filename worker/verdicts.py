"""Asking what became of delivered units, now and then, and keeping the signed answers.

A verdict may change: an audit back may refute what was merged, and an appeal may restore what was rejected. So the
newest settled units are asked about again, though seldom.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from protocol.documents import Verdict, parse_payload
from protocol.envelope import parse_envelope
from protocol.errors import DiskFull, Refusal, TryLater
from protocol.limits import MAX_VERDICT_QUERIES
from worker.client import CoordinatorClient
from worker.delivery import Delivery
from worker.lifecycle import SpoolState
from worker.spool import VERDICT, Spool, SpoolEntry
from worker.stop import Stop
from worker.threads import OneThread

FIRST_SECONDS: Final = 2.0
LONGEST_SECONDS: Final = 60.0
LONGEST_KEPT_SECONDS: Final = 10.0
"""While replicas are kept: a referee may be waiting for their bytes."""
AGAIN_SECONDS: Final = 600.0
"""How often settled units are asked about again."""
_LAST_TRIES: Final = 5


class Verdicts:
    """Polls for the verdicts of the units that were delivered."""

    def __init__(self, *, client: CoordinatorClient, delivery: Delivery, spool: Spool, disk: OneThread) -> None:
        self._client = client
        self._delivery = delivery
        self._spool = spool
        self._disk = disk

    async def run(self) -> None:
        """Ask for ever: soon after something was delivered, ever more seldom while nothing is heard."""
        seconds, waiting, again = FIRST_SECONDS, 0, 0.0
        while True:
            await asyncio.sleep(seconds)
            if time.monotonic() >= again:
                await self._ask_settled()
                again = time.monotonic() + AGAIN_SECONDS
            entries = self._delivery.awaiting_verdict()
            heard = await self._poll(entries)
            news = bool(heard) or len(entries) > waiting
            longest = LONGEST_KEPT_SECONDS if self._delivery.count(SpoolState.KEPT) else LONGEST_SECONDS
            seconds = FIRST_SECONDS if news else min(longest, 1.5 * seconds)
            waiting = len(entries) - heard
            if not news:
                self._ask_kept()  # their bytes may be wanted after all

    async def last_round(self, *, patient: bool) -> None:
        """Ask before the end; a few times if the run is over, since then all verdicts are there or about to be."""
        await self._ask_settled()
        for attempt in range(_LAST_TRIES if patient else 1):
            if attempt:
                await asyncio.sleep(0.5)
            await self._poll(self._delivery.awaiting_verdict())
            if not self._delivery.awaiting_verdict():
                return

    async def see_kept_through(self, seconds: float, stop: Stop) -> None:
        """Give kept replicas a while before the end: those whose bytes are wanted then and never come are forfeit."""
        ends = time.monotonic() + seconds
        while self._delivery.count(SpoolState.KEPT) and time.monotonic() < ends and not stop.asked.is_set():
            self._ask_kept()
            await self._delivery.drained(max(0.0, ends - time.monotonic()))
            await self._poll(self._delivery.awaiting_verdict())
            if self._delivery.count(SpoolState.KEPT):
                await stop.sleep(1.0)

    def _ask_kept(self) -> None:
        for entry in self._delivery.awaiting_verdict():
            if entry.state is SpoolState.KEPT:
                self._delivery.ask_again(entry)

    async def _ask_settled(self) -> None:
        await self._poll(await self._disk.run(self._spool.settled, MAX_VERDICT_QUERIES))

    async def _poll(self, entries: Sequence[SpoolEntry]) -> int:
        heard = 0
        for start in range(0, len(entries), MAX_VERDICT_QUERIES):
            asked = {entry.unit.claim: entry for entry in entries[start : start + MAX_VERDICT_QUERIES]}
            try:
                for raw, verdict in await self._client.verdicts(tuple(asked)):
                    entry = asked.pop(verdict.claim, None)  # type: ignore[call-overload]
                    if entry is not None and await self._disk.run(_stored, entry) != verdict:
                        await self._delivery.settle(entry, raw, verdict)
                        heard += 1
            except (TryLater, DiskFull):
                return heard  # others say why; the question is asked again
        return heard


def _stored(entry: SpoolEntry) -> Verdict | None:
    raw = entry.document(VERDICT)
    try:
        return None if raw is None else parse_payload(Verdict, parse_envelope(raw).payload)
    except Refusal:
        return None
