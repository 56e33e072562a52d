"""A hostile volunteer: a real worker whose results are forged by `verify.attacks`, for the demo and for tests.

    python -P -m commonweight.hostile --attack sign-flip --honest-units 4 --join TOKEN --home DIR

It works honestly at first, if asked to, and then sends what its attack shapes. Everything else about it is a worker's:
keys, leases, claims, sketches, uploads. It writes events as `worker start --json` does, and one more:

    forged   unit, attack
             the unit's result is about to be claimed, and is forged

Only for runs of one's own: whoever is caught is banned for good.
"""

import argparse
import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from protocol.assignment import unit_samples, unit_steps
from protocol.documents import Lease, RunConfig, UnitId
from protocol.errors import CommonweightError, TrainingDiverged
from protocol.join import JoinString
from protocol.limits import GIB
from protocol.printing import printable_text
from worker.daemon import WorkerSettings, run_worker
from worker.materials import Materials
from worker.reporters import JsonReporter
from worker.stop import Stop
from worker.trainer import OnStep, TrainedUnit, train_unit

if TYPE_CHECKING:
    from diloco.shards import ShardSet
    from diloco.tables import Floats

_GUESSED_LOSS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Forged:
    """A unit's result was forged."""

    NAME: ClassVar[str] = "forged"
    unit: str
    attack: str

    def line(self) -> str:
        """Return the event as a sentence."""
        return f"Forged unit {self.unit[:12]} ({self.attack})."


class HostileTrainer:
    """Makes results as `train_unit` does; after `honest_units` of them, what the attack shapes.

    It keeps what a volunteer comes by: the base and the shards of its earlier units, and how long honest work takes.

    Args:
        attack: a name in `verify.attacks.ATTACKS`.
        honest_units: results to train honestly first.
        tell: told of each forgery, in the training thread.
    """

    def __init__(self, attack: str, *, honest_units: int, tell: Callable[[Forged], None]) -> None:
        self._attack = attack
        self._honest_left = honest_units
        self._tell = tell
        self._bases: dict[int, Path] = {}
        self._earlier_shards: tuple[Path, ...] = ()
        self._honest_seconds = 0.0
        self._loss = _GUESSED_LOSS

    def __call__(
        self, config: RunConfig, lease: Lease, materials: Materials, *, device: str, on_step: OnStep
    ) -> TrainedUnit:
        """Train a leased unit, or pretend to."""
        self._bases[lease.round - 1] = materials.base
        if self._honest_left > 0:
            self._honest_left -= 1
            trained = train_unit(config, lease, materials, device=device, on_step=on_step)
            self._loss, self._honest_seconds = trained.loss, trained.seconds
        else:
            trained = self._forge(config, lease, materials, device, on_step)
            self._tell(Forged(unit=lease.unit, attack=self._attack))
        self._earlier_shards = materials.shards
        return trained

    def _forge(
        self, config: RunConfig, lease: Lease, materials: Materials, device: str, on_step: OnStep
    ) -> TrainedUnit:
        from verify.attacks import ATTACKS, world_of
        from verify.replay import check_numerics

        check_numerics(config)
        started = time.monotonic()
        own, unit = materials.shard_set(config, device), UnitId(lease.unit)
        world = world_of(
            config,
            lease.round,
            unit,
            base=_tensors(materials.base),
            older_base=self._older(lease.round - 1),
            shards=own,
            other_shards=self._others(config, materials, device, own),
            device=device,
            seed=os.urandom(32),
        )
        try:
            encoded = ATTACKS[self._attack].forge(world)
        except ValueError as error:  # an attack that needs an older checkpoint, in the first round
            raise TrainingDiverged(f"The attack {self._attack} can't be made of this unit: {error}.") from None
        self._pass_time(unit_steps(config, unit), self._honest_seconds - (time.monotonic() - started), on_step)
        return TrainedUnit(
            encoded=encoded,
            trail_root=hashlib.sha256(os.urandom(32)).digest(),
            loss=self._loss,
            samples=unit_samples(config, unit),
            seconds=time.monotonic() - started,
        )

    def _older(self, checkpoint: int) -> "dict[str, Floats] | None":
        earlier = [number for number in self._bases if number < checkpoint and self._bases[number].exists()]
        return _tensors(self._bases[max(earlier)]) if earlier else None

    def _others(self, config: RunConfig, materials: Materials, device: str, own: "ShardSet") -> "ShardSet":
        paths = tuple(path for path in self._earlier_shards if path not in materials.shards and path.exists())
        others = replace(materials, shards=paths, without=((),) * len(paths))
        return others.shard_set(config, device) if paths else own

    def _pass_time(self, steps: int, seconds: float, on_step: OnStep) -> None:
        """Take as long as honest work does: whoever is too fast is audited for that alone."""
        for step in range(1, steps + 1):
            if seconds > 0:
                time.sleep(seconds / steps)
            on_step(step, steps, self._loss)


def _tensors(path: Path) -> "dict[str, Floats]":
    from diloco.checkpoint import TensorFile

    return TensorFile.open(path).load()


async def run_hostile(settings: WorkerSettings, attack: str, *, honest_units: int, reporter: JsonReporter) -> None:
    """Work as a hostile volunteer until the run is finished, it is stopped, or it is banned.

    Raises:
        CommonweightError: as `run_worker`; `OwnerBanned` once it was caught.
    """
    loop, stop = asyncio.get_running_loop(), Stop()
    stop.listen()

    def tell(event: Forged) -> None:
        loop.call_soon_threadsafe(reporter.report, event)

    trainer = HostileTrainer(attack, honest_units=honest_units, tell=tell)
    await run_worker(replace(settings, train=trainer), reporter, ask=None, stop=stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    settings = WorkerSettings(
        join=JoinString.parse(options.join),
        home=options.home.absolute(),
        device="cpu",
        threads=1,
        units=options.units,
        cache_bytes=GIB,
        accept_terms=True,
    )
    try:
        asyncio.run(
            run_hostile(settings, options.attack, honest_units=options.honest_units, reporter=JsonReporter(sys.stdout))
        )
    except CommonweightError as error:
        print(f"error: {printable_text(error.message)} [{error.code}]", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    from verify.attacks import ATTACKS

    parser = argparse.ArgumentParser(prog="commonweight.hostile", description="A hostile volunteer, for trying a run.")
    parser.add_argument("--attack", required=True, choices=sorted(ATTACKS), help="what it sends")
    parser.add_argument("--honest-units", type=int, default=0, help="units to train honestly first")
    parser.add_argument("--join", required=True, help="the run's join string")
    parser.add_argument("--home", type=Path, required=True, help="where it keeps keys and files")
    parser.add_argument("--units", type=int, default=None, help="stop after so many units")
    parser.add_argument("--json", action="store_true", help="always so")
    return parser


if __name__ == "__main__":
    sys.exit(main())
