"""Does a run's training step fit this machine, and how? From `diloco.memory`, before anything is allocated."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from diloco.execution import Execution
from diloco.memory import CUDA_OVERHEAD, DeviceKind, Footprint, Work, drawn_bytes, footprint, unit_host_bytes
from protocol.documents import RunConfig
from protocol.errors import MemoryTooSmall

GB: Final = 1e9
SPARE: Final = 0.05
"""Share of a device's memory that is left alone: for what the allocator can't use, and for the count's own error."""
_MEMORY_INFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory that training may have.

    Args:
        kind: of the device.
        device: bytes on it; on a GPU with CUDA's own.
        host: bytes of main memory; on a CPU the same ones.
    """

    kind: DeviceKind
    device: int
    host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a unit is trained here, and what that takes."""

    execution: Execution
    footprint: Footprint
    device_bytes: int
    host_bytes: int

    def sentence(self) -> str:
        """Return the plan as a sentence for a person."""
        execution, means = self.execution, []
        if execution.parts > 1:
            means.append(f"each batch in {execution.parts} parts")
        if execution.checkpointing:
            means.append("activations computed twice")
        if execution.keeping == "narrow":
            means.append("weights updated one tensor at a time")
        if execution.keeping == "host":
            means.append("weights and moments in main memory")
        how = f", with {' and '.join(_listed(means))}" if means else ""
        return f"A training step takes {self.device_bytes / GB:.2f} GB{how}."


def _listed(words: list[str]) -> list[str]:
    return words if len(words) < 3 else [", ".join(words[:-1]), words[-1]]


def room_of(device: str) -> Room:
    """Return what is free on this machine now, with what this process has taken already and can use again.

    Args:
        device: "cpu" or "cuda".
    """
    host = _available_bytes()
    if device == "cpu":
        return Room(kind="cpu", device=host, host=host)
    import torch

    free, total = torch.cuda.mem_get_info()  # CUDA's own share is taken by this very call
    again = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return Room(kind="cuda", device=min(total, free + again + CUDA_OVERHEAD), host=host)


def _available_bytes() -> int:
    """Main memory that can be had without swapping; without Linux's word for it, as much as anybody wants."""
    try:
        lines = _MEMORY_INFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 1 << 62
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return 1 << 62 if found is None else int(found) * 1024


def work_of(config: RunConfig) -> Work:
    """Return what a step of the run's units does at most: with its largest pictures.

    Raises:
        PayloadInvalid: the config describes no model.
    """
    from verify.replay import conditioning_config, model_config

    model = model_config(config)
    return Work(
        config=model,
        image_tokens=max(shard.height * shard.width for shard in config.data.shards) // model.patch_size**2,
        text_tokens=conditioning_config(config).max_tokens,
        batch=config.training.batch,
        precision=config.training.precision,
        optimizer=config.training.optimizer,
    )


def plan_unit(work: Work, room: Room) -> Plan:
    """Return the quickest way to train that fits.

    Raises:
        MemoryTooSmall: nothing does.
    """
    least: Plan | None = None
    for execution in _executions(work, room.kind):
        plan = planned(work, execution, room.kind)
        if fits(plan, room):
            return plan
        if least is None or plan.device_bytes < least.device_bytes:
            least = plan
    assert least is not None
    where = "this card" if room.kind == "cuda" else "this machine"
    raise MemoryTooSmall(
        f"This run's units take at least {least.device_bytes / GB:.2f} GB and {least.host_bytes / GB:.2f} GB of main "
        f"memory; {where} has {room.device / GB:.2f} GB free, and {room.host / GB:.2f} GB of main memory. Close other "
        "programs, or join a run with a smaller model: `commonweight worker doctor` says which fit."
    )


def planned(work: Work, execution: Execution, kind: DeviceKind) -> Plan:
    """Return what one way of training takes."""
    found = footprint(work, execution, kind, widened=kind == "cpu" and holds_wide())
    host = found.host + unit_host_bytes(work.config) + drawn_bytes(work, kind) + (found.device if kind == "cpu" else 0)
    return Plan(execution=execution, footprint=found, device_bytes=found.device, host_bytes=host)


@cache
def holds_wide() -> bool:
    """Return whether this machine's processor multiplies bf16 numbers in fp32, and so holds them."""
    import torch

    from mmdit.products import in_fp32

    return in_fp32(torch.device("cpu"))


def fits(plan: Plan, room: Room) -> bool:
    """Return whether there is room for it, with some to spare."""
    return plan.device_bytes <= (1 - SPARE) * room.device and plan.host_bytes <= (1 - SPARE) * room.host


def _executions(work: Work, kind: DeviceKind) -> Iterator[Execution]:
    """Every way to train, the quickest first: parts cost least, then computing twice, then a way to main memory."""
    ways = [
        Execution(checkpointing=checkpointing, keeping=keeping)
        for checkpointing in (False, True)
        for keeping in ("whole", "narrow")
    ]
    if kind == "cuda":  # a CPU's memory is main memory
        ways += [Execution(checkpointing=checkpointing, keeping="host") for checkpointing in (False, True)]
    for way in ways:
        for parts in range(1, work.batch + 1):
            if work.batch % parts == 0:
                yield Execution(parts=parts, checkpointing=way.checkpointing, keeping=way.keeping)
