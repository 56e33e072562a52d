"""The files of a worker's units, one fetch at a time: those of the unit in work, and the next checkpoint ahead of time.

While a unit trains, its machine's line is idle. The next unit is not known yet, but it starts from the newest
checkpoint, so that one is fetched as soon as it is published.
"""

import asyncio
from typing import Final

from protocol.documents import Lease
from protocol.errors import CommonweightError, DigestMismatch, TryLater
from worker.client import CoordinatorClient
from worker.library import Library, Needs
from worker.materials import Materials
from worker.threads import OneThread

AHEAD_SECONDS: Final = 60.0
"""How often a worker that trains looks whether there is a newer checkpoint."""


class Fetching:
    """Fetches through a library, in a thread of its own, so that fetches queue up behind each other."""

    def __init__(self, client: CoordinatorClient, library: Library, *, ahead_seconds: float) -> None:
        self._client = client
        self._library = library
        self._ahead_seconds = ahead_seconds
        self._thread = OneThread("files")

    @property
    def received_bytes(self) -> int:
        """What came over the network so far, of files that are not whole yet too."""
        return self._library.received_bytes

    def close(self) -> None:
        """Let the thread go when its work is done."""
        self._thread.close()

    async def materials(self, lease: Lease) -> Materials:
        """Return the files of a leased unit; see `Library.fetch`. A fetch ahead that is under way is let end first."""
        return await self._fetch(Needs.of_lease(lease))

    async def ahead(self, lease: Lease, begun: asyncio.Event) -> None:
        """While the unit of this lease trains, fetch each checkpoint that is published, until cancelled.

        Not before training has `begun`: in a small cache the newer checkpoint takes the place of the unit's base, which
        must have been read by then, and a large one takes a slow disk minutes.

        Failures are not told: whoever needs the files will meet them again, and say so then.
        """
        has = lease.round - 1
        await begun.wait()
        while True:
            await asyncio.sleep(self._ahead_seconds)
            newest = has
            try:
                newest = (await self._client.status()).checkpoint
                if newest > has:
                    # The shards are named so that no room is made at their cost: the unit in training reads them.
                    await self._fetch(Needs(round=newest + 1, shards=lease.shards))
                    has = newest
            except TryLater:
                continue
            except CommonweightError:
                # Too little room, or files that are not what was signed: not again and again at the line's cost.
                has = newest

    async def _fetch(self, needs: Needs) -> Materials:
        link = await self._client.connect()
        try:
            return await self._thread.run(self._library.fetch, link.endpoint.public_url, link.trust, needs)
        except (TryLater, DigestMismatch):
            # The operator may have moved the files: the next try asks the coordinator anew where they are.
            await self._client.drop(link)
            raise
