"""One named thread for one kind of blocking work, awaited from the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class OneThread:
    """Runs functions one after another in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function; when the awaiting task is cancelled, the function itself still goes on to its end."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, partial(function, *args, **kwargs))

    async def run_to_the_end(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that must not be left half known: on cancellation wait for it, and return its result.

        The cancellation is not forgotten: the task's next wait raises it.
        """
        future = asyncio.ensure_future(self.run(function, *args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            result = await future
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            return result

    def close(self) -> None:
        """Let the thread go when its work is done."""
        self._executor.shutdown(wait=False)
