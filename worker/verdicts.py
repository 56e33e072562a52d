"""Asking what became of delivered units, now and then, and keeping the signed answers."""

import asyncio
from functools import partial
from typing import Final

from protocol.documents import Verdict
from protocol.errors import DiskFull, TryLater
from protocol.limits import MAX_VERDICT_QUERIES
from worker.client import CoordinatorClient
from worker.delivery import Delivery
from worker.lifecycle import SpoolState, VerdictGiven
from worker.progress import VerdictCame
from worker.reporters import Reporter
from worker.spool import VERDICT, Spool, SpoolEntry
from worker.threads import OneThread

FIRST_SECONDS: Final = 2.0
LONGEST_SECONDS: Final = 60.0
_LAST_TRIES: Final = 5


class Verdicts:
    """Polls for the verdicts of the units that were delivered."""

    def __init__(
        self, *, client: CoordinatorClient, delivery: Delivery, spool: Spool, disk: OneThread, reporter: Reporter
    ) -> None:
        self._client = client
        self._delivery = delivery
        self._spool = spool
        self._disk = disk
        self._reporter = reporter

    async def run(self) -> None:
        """Ask for ever: soon after something was delivered, ever more seldom while nothing is heard."""
        seconds, waiting = FIRST_SECONDS, 0
        while True:
            await asyncio.sleep(seconds)
            entries = self._delivery.awaiting_verdict()
            heard = await self._poll(entries)
            news = bool(heard) or len(entries) > waiting
            seconds = FIRST_SECONDS if news else min(LONGEST_SECONDS, 1.5 * seconds)
            waiting = len(entries) - heard
            for entry in self._delivery.awaiting_verdict():
                if entry.state is SpoolState.KEPT and not news:
                    self._delivery.ask_again(entry)  # its bytes may be wanted after all

    async def last_round(self, *, patient: bool) -> None:
        """Ask before the end; a few times if the run is over, since then all verdicts are there or about to be."""
        for attempt in range(_LAST_TRIES if patient else 1):
            if attempt:
                await asyncio.sleep(0.5)
            await self._poll(self._delivery.awaiting_verdict())
            if not self._delivery.awaiting_verdict():
                return

    async def _poll(self, entries: tuple[SpoolEntry, ...]) -> int:
        heard = 0
        for start in range(0, len(entries), MAX_VERDICT_QUERIES):
            asked = {entry.unit.claim: entry for entry in entries[start : start + MAX_VERDICT_QUERIES]}
            try:
                for raw, verdict in await self._client.verdicts(tuple(asked)):
                    entry = asked.pop(verdict.claim, None)  # type: ignore[call-overload]
                    if entry is not None:
                        await self._settle(entry, raw, verdict)
                        heard += 1
            except (TryLater, DiskFull):
                return heard  # others say why; the question is asked again
        return heard

    async def _settle(self, entry: SpoolEntry, raw: bytes, verdict: Verdict) -> None:
        await self._disk.run_to_the_end(partial(self._spool.record, entry, VerdictGiven(), (VERDICT, raw)))
        self._delivery.remove(entry.unit.claim)
        self._reporter.report(
            VerdictCame(
                claim=verdict.claim,
                unit=verdict.unit,
                outcome=verdict.outcome,
                code=verdict.code,
                sentence=verdict.sentence,
                weight=verdict.weight,
                checkpoint=verdict.checkpoint,
            )
        )
