"""Measuring how far honest replays of one unit lie apart on this machine, and how far cheats lie from them.

A laboratory keeps one process for each instruction set, has it train units, and compares every result with every other
one as a referee and as a replica would.
"""

import contextlib
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from diloco.checkpoint import TensorFile
from diloco.codec import EncodedDelta, encode
from diloco.container import Container, write_container
from diloco.sketch import sketch
from diloco.tables import Floats
from protocol.assignment import unit_id
from protocol.documents import RunConfig, UnitId, digest_of, payload_of
from protocol.errors import LocalProblem
from verify.compare import Comparison, compare, sketch_difference
from verify.replay import codec_config, delta_schema, unit_spec_of
from verify.variants import Job, Order, Variant, delta_file, forged_file

_STOP_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One comparison of a claim with a replay of its unit, all differences relative to the replay.

    claimant: the variant that sent the codes, or the cheat's name.
    referee: the variant that replayed.
    same_bits: whether the two raw deltas are equal in every bit.
    raw: L2 norm of the difference of the raw deltas; None for a cheat, whose raw delta nobody has.
    least_raw: the least raw difference that explains the codes; what a referee judges by.
    code: D of the decoded codes; what a referee judges by too.
    sketched: D as two sketches estimate it; what a replica is compared by.
    """

    claimant: str
    referee: str
    same_bits: bool
    raw: float | None
    least_raw: float
    code: float
    sketched: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All comparisons of one unit: between honest variants, and of cheats with honest referees."""

    round: int
    index: int
    honest: tuple[Pair, ...]
    cheats: tuple[Pair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """An honest result; the raw delta stays in its file until it is a referee's."""

    name: str
    raw: TensorFile
    encoded: EncodedDelta
    container: Container
    sketch: Floats


class Laboratory:
    """The processes and files of a measurement; use as a context manager.

    Args:
        config: of the run; its training precision is what is measured.
        shards: files of the run's training shards, by digest.
        variants: what to compare.
        folder: empty; holds one raw delta for each variant at a time, memory two.
        without: of a shard, by digest, the samples that were taken down.
        networks: the folder of the text encoders, for runs whose shards hold captions alone.
    """

    def __init__(
        self,
        config: RunConfig,
        shards: Mapping[str, Path],
        variants: Sequence[Variant],
        folder: Path,
        *,
        without: Mapping[str, Sequence[int]] | None = None,
        networks: Path | None = None,
    ) -> None:
        self._config = config
        self._variants = tuple(variants)
        self._folder = folder
        self._processes: list[_Process] = []
        (folder / "config.json").write_bytes(payload_of(config))
        self._shards = {name: str(path.absolute()) for name, path in shards.items()}
        self._networks = None if networks is None else str(networks)
        self._without = {name: tuple(samples) for name, samples in (without or {}).items()}

    def __enter__(self) -> Self:
        places = list(dict.fromkeys((variant.device, variant.capability) for variant in self._variants))
        for number, place in enumerate(places):
            ours = tuple(v for v in self._variants if (v.device, v.capability) == place)
            config = str(self._folder / "config.json")
            job = Job(config=config, shards=self._shards, variants=ours, without=self._without, networks=self._networks)
            self._processes.append(_Process(job, self._folder / f"job-{number}"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.stop()

    def measure(
        self, round_number: int, index: int, base: Path, *, older_base: Path | None = None, cheats: Sequence[str] = ()
    ) -> Measured:
        """Train one unit in every variant, forge cheats on it, and compare.

        Args:
            base: file with all tensors of the checkpoint to start from.
            older_base: file with an older checkpoint, for cheats that need one.
            cheats: names in `verify.attacks.ATTACKS` that admission lets through.

        Raises:
            LocalProblem: a process ended; the message has its last words.
        """
        out = self._folder / "unit"
        out.mkdir(exist_ok=True)
        for number, process in enumerate(self._processes):
            process.fill(
                Order(
                    round=round_number,
                    index=index,
                    base=str(base.absolute()),
                    older_base=None if older_base is None else str(older_base.absolute()),
                    cheats=() if number else tuple(cheats),
                    out=str(out.absolute()),
                )
            )
        unit = unit_id(digest_of(self._config), round_number, index)
        seed = unit_spec_of(self._config, round_number, unit).seed
        results = [self._result(out, variant, unit, seed) for variant in self._variants]
        measured = Measured(
            round=round_number,
            index=index,
            honest=tuple(self._honest(results, seed)),
            cheats=tuple(self._forged(out, results, unit, seed, cheats)),
        )
        for path in out.iterdir():
            path.unlink()
        return measured

    def _result(self, out: Path, variant: Variant, unit: UnitId, seed: bytes) -> _Result:
        raw = TensorFile.open(delta_file(out, variant))
        schema, codec = delta_schema(self._config), codec_config(self._config)
        encoded = encode(raw.load(), schema, codec, seed)
        path = delta_file(out, variant).with_suffix(".delta")
        write_container(path, encoded, bytes.fromhex(unit))
        container = Container.open(path, schema, codec, bytes.fromhex(unit))
        seen = sketch(encoded.decoded_chunks(), _sketch_seed(unit))
        return _Result(name=variant.name, raw=raw, encoded=encoded, container=container, sketch=seen)

    def _honest(self, results: Sequence[_Result], seed: bytes) -> Iterator[Pair]:
        for referee in results:
            own = referee.raw.load()
            for claimant in results:
                if claimant is not referee:
                    raw = _raw_difference(claimant.raw, own)
                    comparison = compare(claimant.container, referee.encoded, own, seed)
                    yield _pair(claimant.name, referee, raw, comparison, claimant.sketch)

    def _forged(
        self, out: Path, results: Sequence[_Result], unit: UnitId, seed: bytes, cheats: Sequence[str]
    ) -> Iterator[Pair]:
        schema, codec = delta_schema(self._config), codec_config(self._config)
        # The first variant is the cheat's own machine, the last one as far from it as this machine has.
        for referee in {result.name: result for result in (results[0], results[-1])}.values():
            own = referee.raw.load()
            for cheat in cheats:
                container = Container.open(forged_file(out, cheat), schema, codec, bytes.fromhex(unit))
                container.check_finite()
                comparison = compare(container, referee.encoded, own, seed)
                yield _pair(cheat, referee, None, comparison, sketch(container.decoded_chunks(), _sketch_seed(unit)))


def _pair(claimant: str, referee: _Result, raw: float | None, comparison: Comparison, seen: Floats) -> Pair:
    return Pair(
        claimant=claimant,
        referee=referee.name,
        same_bits=raw == 0.0,
        raw=raw,
        least_raw=comparison.raw_difference,
        code=comparison.code_difference,
        sketched=sketch_difference(seen, referee.sketch),
    )


class _Process:
    """One child and its pipes."""

    def __init__(self, job: Job, path: Path) -> None:
        job.write(path.with_suffix(".json"))
        self._words = path.with_suffix(".log")
        with self._words.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "verify.variants", str(path.with_suffix(".json"))],
                env=job.variants[0].environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def fill(self, order: Order) -> None:
        """Send an order and wait until it is filled."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # its answer, which will not come, tells why
        if self._child.stdout.readline() != b"done\n":
            self._child.wait()
            words = self._words.read_text(errors="replace").strip().splitlines()
            raise LocalProblem(
                f"Training a unit for the measurement failed: {words[-1] if words else 'no word of why'}."
            )

    def stop(self) -> None:
        """End the child's input, and the child if that does not."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _raw_difference(theirs: TensorFile, own: Mapping[str, Floats]) -> float:
    over = math.fsum(float(np.sum((theirs.tensor(name).astype(np.float64) - own[name]) ** 2)) for name in own)
    return math.sqrt(over / math.fsum(float(np.sum(values.astype(np.float64) ** 2)) for values in own.values()))


def _sketch_seed(unit: UnitId) -> bytes:
    return hashlib.sha256(b"commonweight/laboratory/v1\0" + bytes.fromhex(unit)).digest()
