"""The tasks of an admitted worker: prepare, produce, deliver, hear verdicts; and how they end together."""

import asyncio
from contextlib import suppress
from typing import Final

from protocol.documents import RunConfig
from protocol.errors import CommonweightError, OwnerBanned, RunFinished
from verify.hearing import heard_by_trainers
from worker.client import CoordinatorClient
from worker.delivery import Delivery
from worker.fetching import Fetching
from worker.library import Library
from worker.machine import Machine
from worker.patience import Patience
from worker.producer import Allowance, Producer
from worker.reporters import Reporter
from worker.spool import Spool
from worker.station import make_ready
from worker.stop import Stop
from worker.threads import OneThread
from worker.trainer import Trainer
from worker.verdicts import Verdicts

FAREWELL_SECONDS: Final = 30.0
"""How long a worker tries to deliver what is left when the run is finished: it can't be merged any more."""


class Shift:
    """Builds the parts of the work and runs them as one."""

    def __init__(
        self,
        *,
        client: CoordinatorClient,
        config: RunConfig,
        machine: Machine,
        train: Trainer,
        allowance: Allowance,
        library: Library,
        spool: Spool,
        disk: OneThread,
        patience: Patience,
        reporter: Reporter,
        stop: Stop,
    ) -> None:
        self._machine = machine
        self._config = config
        self._networks = library.networks
        self._reporter = reporter
        self._stop = stop
        self._training = OneThread("training")
        self._torch_ready = asyncio.Event()
        self._delivery = Delivery(
            client=client,
            spool=spool,
            disk=disk,
            config=config,
            torch_ready=self._torch_ready,
            patience=patience,
            reporter=reporter,
            stop=stop,
        )
        self._fetching = Fetching(client, library, ahead_seconds=allowance.ahead_seconds)
        self._verdicts = Verdicts(client=client, delivery=self._delivery, spool=spool, disk=disk)
        self._producer = Producer(
            client=client,
            config=config,
            machine=machine,
            train=train,
            allowance=allowance,
            fetching=self._fetching,
            delivery=self._delivery,
            spool=spool,
            disk=disk,
            training=self._training,
            patience=patience,
            reporter=reporter,
            stop=stop,
        )

    @property
    def waiting_units(self) -> int:
        """Finished units whose only copy may be on this disk."""
        return self._delivery.holding

    async def run(self) -> str:
        """Work until there is a reason to end; return it. A unit in work is handed back, whatever the reason.

        Raises:
            CommonweightError: the first task that could not go on; the others were ended.
        """
        work = asyncio.create_task(self._tasks(), name="work")
        now = asyncio.create_task(self._stop.now.wait(), name="stop at once")
        try:
            await asyncio.wait({work, now}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return await work
            work.cancel()
            with suppress(asyncio.CancelledError):
                return await work
            return "Stopped at once, as asked."
        except BaseExceptionGroup as group:
            cause = _cause(group)
            if isinstance(cause, OwnerBanned):
                # Its owner should see which claim was refuted, and what became of an appeal.
                with suppress(CommonweightError):
                    await self._verdicts.last_round(patient=False)
            raise cause from None
        finally:
            now.cancel()
            work.cancel()
            self._training.close()
            self._fetching.close()
            await self._producer.give_up("the worker stops")

    async def _tasks(self) -> str:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._prepare(), name="prepare")
            await self._delivery.start(group)
            polling = group.create_task(self._verdicts.run(), name="verdicts")
            if heard_by_trainers(self._config):
                # Loading them takes long and may fail: a lease begins afterwards.
                await self._stop.before_asked(self._torch_ready.wait())
            ending = await self._producer.run()
            finished = ending.code == RunFinished.code
            await self._delivery.drained(FAREWELL_SECONDS if finished else None)
            polling.cancel()
            await self._verdicts.see_kept_through(FAREWELL_SECONDS, self._stop)
        await self._verdicts.last_round(patient=finished)
        return ending.sentence

    async def _prepare(self) -> None:
        await make_ready(self._training, self._machine, self._config, self._networks, self._reporter)
        self._torch_ready.set()


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error to show: a mistake of ours must not hide behind another task's refusal."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((error for error in leaves if not isinstance(error, CommonweightError)), leaves[0])
