"""A TCP proxy that cuts connections: everything through it is real, until it isn't."""

import asyncio
import contextlib
import socket
import threading


class Cutter:
    """Forwards to a port; cuts the next connection after a number of bytes towards the server."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._budget: int | None = None
        self.bytes_up = 0
        self.cuts = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut_after(self, count: int | None) -> None:
        """Cut once this many more bytes went up (all connections together); None lets everything through."""
        self._loop.call_soon_threadsafe(self._set, count)

    def _set(self, count: int | None) -> None:
        self._budget = count

    def close(self) -> None:
        """Stop forwarding."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._forward())

    async def _forward(self) -> None:
        server = await asyncio.start_server(self._serve, sock=self._listening)
        async with server:
            await self._stop.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(
            self._pump(reader, up_writer, writer, up=True), self._pump(up_reader, writer, up_writer, up=False)
        )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: asyncio.StreamWriter, *, up: bool
    ) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(8_192):
                if up and self._budget is not None:
                    data = data[: self._budget]
                    self._budget -= len(data)
                if up:
                    self.bytes_up += len(data)
                    await asyncio.sleep(0.02)  # a home uplink, not a loopback: what was sent has arrived at the cut
                writer.write(data)
                await writer.drain()
                if up and self._budget == 0:
                    self._budget = None
                    self.cuts += 1
                    break
        writer.transport.abort()
        other.transport.abort()
