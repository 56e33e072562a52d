"""One unit trained in the ways in which honest machines differ: instructions, threads, attention, batch splits.

What a library chooses when it is loaded can't be changed afterwards, so each instruction set gets a process of its own:

    python -P -m verify.variants JOB.json

It reads orders (one JSON object a line) and answers each with the files that it wrote. `verify.laboratory` gives them.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diloco.checkpoint import TensorFile, write_checkpoint
from diloco.container import write_container
from diloco.determinism import set_precision
from diloco.execution import Execution
from diloco.shards import Shard, ShardSet
from diloco.tables import Floats
from diloco.unit import run_unit
from protocol.assignment import unit_id, unit_shards
from protocol.documents import RunConfig, UnitId, digest_of, parse_payload
from verify.attacks import ATTACKS, world_of
from verify.networks import encode_for
from verify.replay import model_config, shard_set, unit_spec_of

Attention = Literal["default", "math"]
Capability = Literal["native", "avx2", "default"]

_ENVIRONMENTS: Final[Mapping[Capability, Mapping[str, str]]] = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}
"""What holds torch's own kernels, oneDNN's and MKL's to older instructions."""
_FORGER_SEED: Final = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train a unit.

    Args:
        device: "cpu" or "cuda".
        capability: instruction set of the CPU's kernels; "native" is the newest that the machine has.
        threads: CPU threads.
        attention: "default" lets torch choose its fused kernel, "math" takes the plain one.
        parts: parts of a batch that pass through the model one after another.
    """

    device: Literal["cpu", "cuda"]
    capability: Capability
    threads: int
    attention: Attention
    parts: int

    @property
    def name(self) -> str:
        """The variant in a few words."""
        place = f"cpu {self.capability}" if self.device == "cpu" else "cuda"
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        attention = ", math attention" if self.attention == "math" else ""
        return f"{place}{threads}{attention}{f', batch in {self.parts}' if self.parts > 1 else ''}"

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that trains so."""
        return {**os.environ, **_ENVIRONMENTS[self.capability]}


def variants_here(batch: int) -> tuple[Variant, ...]:
    """Return the ways to train that this machine has, the plainest first.

    Args:
        batch: samples of a step; an odd one can't be cut in two.
    """
    threads, parts = min(2, os.cpu_count() or 1), 1 + (batch % 2 == 0)
    shapes: list[tuple[int, Attention, int]] = [(1, "default", 1), (threads, "default", 1)]
    shapes += [(1, "math", 1), (1, "default", parts)]
    found = [_on_cpu("native", *shape) for shape in shapes]
    newest = torch.backends.cpu.get_cpu_capability()
    older: list[Capability] = [name for name in ("avx2", "default") if newest in _ABOVE[name]]
    for capability in older:
        found += [_on_cpu(capability, 1, "default", 1), _on_cpu(capability, threads, "math", parts)]
    if torch.cuda.is_available():
        on_cuda: list[tuple[Attention, int]] = [("default", 1), ("math", 1), ("default", parts)]
        found += [
            Variant(device="cuda", capability="native", threads=1, attention=attention, parts=cut)
            for attention, cut in on_cuda
        ]
    return tuple(dict.fromkeys(found))


_ABOVE: Final[Mapping[Capability, tuple[str, ...]]] = {"avx2": ("AVX512",), "default": ("AVX2", "AVX512")}
"""Which newest instruction sets have this one below them, in torch's names."""


def _on_cpu(capability: Capability, threads: int, attention: Attention, parts: int) -> Variant:
    return Variant(device="cpu", capability=capability, threads=threads, attention=attention, parts=parts)


def train_variant(
    config: RunConfig, round_number: int, unit: UnitId, base: Mapping[str, Floats], shards: ShardSet, variant: Variant
) -> dict[str, Floats]:
    """Return the unit's raw delta as this variant trains it; the process must have the variant's environment."""
    set_precision(variant.device, variant.threads)
    kernel: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH) if variant.attention == "math" else nullcontext()
    with kernel:
        result = run_unit(
            unit_spec_of(config, round_number, unit),
            model_config(config),
            base,
            shards,
            device=variant.device,
            on_step=None,
            execution=Execution(parts=variant.parts),
        )
    return result.delta


# --- the process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process is started for: the payload of the run's config, the shards by digest, its variants.

    `without`: of a shard, by digest, the samples that were taken down. `networks`: the folder of the text encoders, for
    runs whose shards hold captions alone.
    """

    config: str
    shards: dict[str, str]
    variants: tuple[Variant, ...]
    without: dict[str, tuple[int, ...]]
    networks: str | None

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read what `write` wrote."""
        members = json.loads(path.read_text())
        return cls(**{**members, "variants": tuple(Variant(**variant) for variant in members["variants"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One unit to train, in every variant of the job.

    Args:
        round, index: which unit.
        base, older_base: files with the weights to start from, and with older ones, if any.
        cheats: attacks to forge too, by name, by somebody who trains as the first variant does.
        out: folder for the results.
    """

    round: int
    index: int
    base: str
    older_base: str | None
    cheats: tuple[str, ...]
    out: str


def delta_file(out: Path, variant: Variant) -> Path:
    """Return where a variant's raw delta is written."""
    return out / f"{variant.name.replace(', ', '-').replace(' ', '_')}.safetensors"


def forged_file(out: Path, cheat: str) -> Path:
    """Return where a cheat's container is written."""
    return out / f"{cheat}.delta"


class _Workbench:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._config = parse_payload(RunConfig, Path(job.config).read_bytes())
        self._digest = digest_of(self._config)

    def fill(self, order: Order) -> None:
        """Write every result that the order asks for."""
        out, base = Path(order.out), _tensors(order.base)
        unit = unit_id(self._digest, order.round, order.index)
        shards = self._shards(order.round, order.index)
        own: dict[str, Floats] | None = None
        for variant in self._job.variants:
            delta = train_variant(self._config, order.round, unit, base, shards, variant)
            write_checkpoint(delta_file(out, variant), delta)
            own = own or delta
        if order.cheats:
            set_precision(self._job.variants[0].device, self._job.variants[0].threads)
            self._forge(order, unit, base, shards, own)

    def _forge(
        self, order: Order, unit: UnitId, base: Mapping[str, Floats], shards: ShardSet, own: Mapping[str, Floats] | None
    ) -> None:
        world = world_of(
            self._config,
            order.round,
            unit,
            base=base,
            older_base=None if order.older_base is None else _tensors(order.older_base),
            shards=shards,
            other_shards=self._shards(order.round, order.index + 1),
            device=self._job.variants[0].device,
            seed=_FORGER_SEED,
            own=own,
        )
        for cheat in order.cheats:
            write_container(forged_file(Path(order.out), cheat), ATTACKS[cheat].forge(world), bytes.fromhex(unit))

    def _shards(self, round_number: int, index: int) -> ShardSet:
        names = unit_shards(self._config, round_number, index)
        networks = None if self._job.networks is None else Path(self._job.networks)
        return shard_set(
            self._config,
            [Shard.open(Path(self._job.shards[name])) for name in names],
            [self._job.without.get(name, ()) for name in names],
            encode_for(self._config, networks, self._job.variants[0].device),
        )


@lru_cache(maxsize=2)
def _tensors(path: str) -> Mapping[str, Floats]:
    return TensorFile.open(Path(path)).load()


def main(arguments: Sequence[str]) -> int:
    """Serve orders until the input ends."""
    bench = _Workbench(Job.read(Path(arguments[0])))
    for line in sys.stdin:
        members = json.loads(line)
        bench.fill(Order(**{**members, "cheats": tuple(members["cheats"])}))
        sys.stdout.write("done\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
