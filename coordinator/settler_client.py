"""The control process's end of the settler socket: one awaitable call for each job."""

import asyncio
import itertools
import json
import socket
from typing import Any

from protocol.errors import ERRORS_BY_CODE, Bug, CoordinatorRestarting


class SettlerClient:
    """Sends jobs to the settler and waits for their results."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._gone = False

    @classmethod
    async def connect(cls, connection: socket.socket) -> "SettlerClient":
        """Wrap the supervisor's socket."""
        return cls(*await asyncio.open_unix_connection(sock=connection, limit=1 << 26))

    async def listen(self) -> None:
        """Hand out results as they come; raise `Bug` when the settler is gone."""
        try:
            await self._listen()
        except ConnectionError:
            pass
        finally:
            self._gone = True
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(CoordinatorRestarting())
            self._waiting.clear()
        raise Bug(private="the settler process is gone")

    async def _listen(self) -> None:
        while line := await self._reader.readline():
            answer = json.loads(line)
            future = self._waiting.pop(answer["id"], None)
            if future is None or future.cancelled():
                continue
            error = answer.get("error")
            if error is None:
                future.set_result(answer["result"])
            else:
                kind = ERRORS_BY_CODE.get(error["code"], Bug)
                future.set_exception(kind(error["message"], private=json.dumps(error)))

    async def call(self, kind: str, **job: Any) -> dict[str, Any]:
        """Run one job.

        Raises:
            CommonweightError: what the job raised.
            CoordinatorRestarting: the settler has ended, before or meanwhile; the supervisor starts everything anew.
        """
        if self._gone:
            raise CoordinatorRestarting
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._writer.write(json.dumps({"id": number, "kind": kind, **job}).encode() + b"\n")
            await self._writer.drain()
        except ConnectionError:
            self._waiting.pop(number, None)
            raise CoordinatorRestarting from None
        return await future
