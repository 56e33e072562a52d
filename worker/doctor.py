"""What fits this machine: for each model shape, how many samples may pass at once, by how weights are kept."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from diloco.execution import Execution
from diloco.memory import DeviceKind, Precision, Work, parameters
from diloco.optimizers import OptimizerName
from mmdit.config import MMDiTConfig
from worker.plan import SPARE, Plan, Room, fits, planned

_HOST: Final = "host"
_WAYS: Final[Mapping[str, Execution]] = {
    "plain": Execution(),
    "recomputed": Execution(checkpointing=True),
    "narrow": Execution(checkpointing=True, keeping="narrow"),
    _HOST: Execution(checkpointing=True, keeping="host"),
}


def ways(kind: DeviceKind) -> Mapping[str, Execution]:
    """Return what the doctor tries, by the word that stands for it; a processor has no memory beside main memory."""
    return {way: execution for way, execution in _WAYS.items() if kind == "cuda" or way != _HOST}


LARGEST_BATCH: Final = 4096
_AUTOENCODER: Final = 8
"""Pixels of a picture's side to one of its latent, in Stable Diffusion 3."""
_LATENT_TEXT: Final = 154
_PIXEL_TEXT: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One model in one way.

    Args:
        samples: the most that may pass at once; 0 if not even one fits.
        device_bytes, host_bytes: what one sample takes, on the device and in main memory.
        device_short, host_short: bytes that are missing for one sample, there and there.
    """

    samples: int
    device_bytes: int
    host_bytes: int
    device_short: int
    host_short: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One model shape: its parameters, the side of its pictures in pixels, and how it fits in each of `ways`."""

    model: str
    parameters: int
    pixels: int
    fits: Mapping[str, Fit]

    @property
    def trainable(self) -> bool:
        """Whether it fits in some way."""
        return any(fit.samples for fit in self.fits.values())

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` writes."""
        return {**asdict(self), "fits": {way: asdict(fit) for way, fit in self.fits.items()}}


def diagnose(
    presets: Mapping[str, MMDiTConfig], room: Room, *, pixels: int, precision: Precision, optimizer: OptimizerName
) -> Iterable[Diagnosis]:
    """Yield every shape's diagnosis, the smallest first.

    Args:
        pixels: side of the pictures of models that paint in latents; those that paint in pixels have a size of theirs.
    """
    for name, config in sorted(presets.items(), key=lambda item: parameters(item[1])):
        latent = config.in_channels > 3
        side = pixels // _AUTOENCODER if latent else config.sample_size
        work = Work(
            config=config,
            image_tokens=(side // config.patch_size) ** 2,
            text_tokens=_LATENT_TEXT if latent else _PIXEL_TEXT,
            batch=1,
            precision=precision,
            optimizer=optimizer,
        )
        yield Diagnosis(
            model=name,
            parameters=parameters(config),
            pixels=pixels if latent else side,
            fits={way: _fit(work, execution, room) for way, execution in ways(room.kind).items()},
        )


def _fit(work: Work, execution: Execution, room: Room) -> Fit:
    one = planned(work, execution, room.kind)
    samples = 0
    if fits(one, room):
        samples, step = 1, LARGEST_BATCH
        while step:  # the largest that fits, bit by bit
            more = samples + step
            if more <= LARGEST_BATCH and fits(planned(replace(work, batch=more), execution, room.kind), room):
                samples = more
            step //= 2
    return Fit(
        samples=samples,
        device_bytes=one.device_bytes,
        host_bytes=one.host_bytes,
        device_short=_short(one, room.device, host=False),
        host_short=_short(one, room.host, host=True),
    )


def _short(plan: Plan, there: int, *, host: bool) -> int:
    return max(0, (plan.host_bytes if host else plan.device_bytes) - int((1 - SPARE) * there))
