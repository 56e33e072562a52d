import asyncio
import socket

import pytest

from coordinator.settler_client import SettlerClient
from protocol.errors import Bug, CoordinatorRestarting


def test_whoever_waits_for_a_settler_that_ends_is_told_to_come_back_and_so_is_who_asks_later() -> None:
    async def story() -> None:
        ours, theirs = socket.socketpair()
        client = await SettlerClient.connect(ours)
        listening = asyncio.create_task(client.listen())
        waiting = asyncio.create_task(client.call("ping"))
        await asyncio.to_thread(theirs.recv, 1 << 16)
        theirs.close()
        with pytest.raises(CoordinatorRestarting):
            await waiting
        with pytest.raises(Bug):  # which ends the process, so that the supervisor starts everything anew
            await listening
        with pytest.raises(CoordinatorRestarting):
            await client.call("ping")

    asyncio.run(asyncio.wait_for(story(), 10))


def test_a_settler_that_is_gone_before_anybody_listens_is_no_fault_of_the_caller() -> None:
    async def story() -> None:
        ours, theirs = socket.socketpair()
        client = await SettlerClient.connect(ours)
        theirs.close()
        calling = asyncio.create_task(client.call("describe"))
        with pytest.raises(Bug):
            await client.listen()
        with pytest.raises(CoordinatorRestarting):
            await calling

    asyncio.run(asyncio.wait_for(story(), 10))
