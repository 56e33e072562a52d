"""What the verification benchmarks share: the runs that they measure, and results kept cell by cell on the disk.

A cell is one unit's measurements in one JSON file, so that a long benchmark can be broken off and taken up again.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.procedural import UNCHECKED, SmallRun, small_run, trained_weights
from diloco.checkpoint import write_checkpoint
from diloco.tables import Floats
from verify.laboratory import Laboratory
from verify.tolerances import DEFAULT_TOLERANCES
from verify.variants import variants_here

Precision = Literal["fp32", "bf16"]
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "bf16")
SEED: Final = hashlib.sha256(b"commonweight/benchmarks/verify/v1").digest()
TRAINED_ROUNDS: Final = 6


class Setting:
    """A run at the default tolerances, its files, the states that its units start from, and its laboratory.

    Args:
        folder: for its files; made if need be.
        stack: closes the laboratory.
        changes: arguments of `small_run`.
    """

    def __init__(self, precision: Precision, folder: Path, stack: ExitStack, **changes: Any) -> None:
        tolerance, code_tolerance = DEFAULT_TOLERANCES[precision]
        rules = replace(UNCHECKED, tolerance=tolerance, code_tolerance=code_tolerance)
        self.run: SmallRun = small_run(
            seed=SEED, units=4, rounds=60, shards=96, precision=precision, verification=rules, **changes
        )
        self.precision = precision
        self._folder = folder
        self._stack = stack
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def key(self) -> str:
        """What kept cells must agree on: everything of the config that a measurement depends on, by value."""
        config = self.run.config
        parts = (config.numerics, config.model, config.training, config.codec, config.seed)
        rules = (config.verification.tolerance, config.verification.code_tolerance)
        return hashlib.sha256(repr((parts, rules)).encode()).hexdigest()

    @cached_property
    def laboratory(self) -> Laboratory:
        """Processes that train the run's units in every way that this machine has; started when first asked for."""
        config = self.run.config
        paths = self.run.write_shards(self._folder / "shards")
        shards = {reference.sha256: path for reference, path in zip(config.data.shards, paths, strict=True)}
        bench = self._folder / "laboratory"
        bench.mkdir()
        return self._stack.enter_context(Laboratory(config, shards, variants_here(config.training.batch), bench))

    @cached_property
    def older(self) -> dict[str, Floats]:
        """Weights some rounds before `trained`."""
        return trained_weights(self.run, rounds=TRAINED_ROUNDS - 2)

    @cached_property
    def trained(self) -> dict[str, Floats]:
        """Weights after some rounds."""
        return trained_weights(self.run, rounds=TRAINED_ROUNDS)

    def base_file(self, checkpoint: int) -> Path:
        """Return a file with the weights of a checkpoint, which units of the next round start from."""
        path = self._folder / f"{checkpoint}.safetensors"
        if not path.exists():
            write_checkpoint(path, trained_weights(self.run, rounds=checkpoint))
        return path


class Cells:
    """Results on disk, one JSON file each; a file that was measured under another key does not count."""

    def __init__(self, folder: Path | None) -> None:
        """A quick run has no folder, and keeps nothing."""
        self._folder = folder

    def get(self, name: str, key: str, measure: Callable[[], Any]) -> Any:
        """Return the cell, measured now if it is not there."""
        path = None if self._folder is None else self._folder / f"{name}.json"
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if kept["key"] == key:
                return kept["cell"]
        cell = measure()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            new.write_text(json.dumps({"key": key, "cell": cell}))
            new.replace(path)
        return cell


def say(words: str) -> None:
    """Tell on standard error how far the measurement has come."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {words}\n")
