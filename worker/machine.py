"""What computes here, and in whose name: the device, its coarse class, this version, and the key that signs."""

import importlib.metadata
from dataclasses import dataclass

from protocol.keys import PrivateKey
from worker.hardware import DeviceChoice, device_class, resolve_device, resolve_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What trains here, and the key that signs what comes of it: a device's, or an auditor's."""

    device: str
    threads: int
    device_class: str
    trainer_version: str
    key: PrivateKey


def this_machine(choice: DeviceChoice, threads: int | None, key: PrivateKey) -> Machine:
    """Return this machine, set up as its owner chose.

    Raises:
        DeviceUnavailable: see `worker.hardware.resolve_device`.
    """
    device, count = resolve_device(choice), resolve_threads(threads)
    return Machine(
        device=device,
        threads=count,
        device_class=device_class(device, count),
        trainer_version=trainer_version(),
        key=key,
    )


def trainer_version() -> str:
    """Return what this worker says of its own version."""
    try:
        return f"commonweight {importlib.metadata.version('commonweight')}"
    except importlib.metadata.PackageNotFoundError:
        return "commonweight, not installed"
