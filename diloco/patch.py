"""The way down: each outer step is published as a patch of about a bit a parameter, and what it leaves out comes later.

    t     = e + step              e: what all patches before left out, the residual
    P     = Q(t)                  each element 0, or plus or minus its block's scale
    e     = t - P
    theta = theta - P

The canonical weights move by the patch itself, so whoever has checkpoint r - 1 and the patch has checkpoint r, every
byte of it. The rounding is deterministic and its error is fed back in public: the residual is part of the round's
state, with the momentum. (Feeding back the error of a *dithered* rounding adds noise upon noise; so no dither here.)

Q keeps what exceeds `threshold` times the block's mean magnitude, and its scale is the mean magnitude of what it keeps.
All of it is separate fp32 operations and sums by halves: the same bytes on every machine.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import numpy as np

from diloco.checkpoint import FileDigest, TensorFile, TensorFileWriter
from diloco.codec import (
    DEAD_ZONE,
    LARGEST_STEP,
    SMALLEST_SCALE,
    UNIT,
    CodecConfig,
    Scales,
    bf16_to_f32,
    bf16_upward,
    chunk_ranges,
    in_blocks,
    mean_rows,
    sum_rows,
)
from diloco.container import Container, container_size, expected_header
from diloco.frames import write_frames
from diloco.packing import Packed, Signed
from diloco.schema import Schema
from diloco.tables import Floats
from protocol.errors import CheckpointCorrupt, DeltaNotFinite

_SPOOL_READ: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchConfig:
    """How patches are rounded in a run.

    Args:
        block: elements that share a scale, a power of two.
        threshold: share of a block's mean magnitude, in units of 2^-8, above which an element is kept. With a lower one
            patches are larger, with a higher one more waits.
    """

    block: int
    threshold: int

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 4 * UNIT:
            raise ValueError(f"patch threshold is {self.threshold}; it must be from 1 to {4 * UNIT}")
        _ = self.codec  # refuses a block that is none

    @property
    def codec(self) -> CodecConfig:
        """How a patch's numbers lie in its file."""
        return CodecConfig(kind=DEAD_ZONE, levels=1, block=self.block, reach=UNIT, width=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A part of a patch: packed numbers and scales, the patch itself in fp32, and the residual that it leaves."""

    packed: Packed
    scales: Scales
    patch: Floats
    residual: Floats


def round_step(total: Floats, config: PatchConfig, name: str) -> Rounded:
    """Round a flat part of residual plus step; it begins at a multiple of `config.codec.alignment` of its tensor.

    Args:
        name: of the tensor, for the message.

    Raises:
        DeltaNotFinite: a value is NaN, infinite, or beyond 2^100.
    """
    codec = config.codec
    x_GB = in_blocks(total, config.block)
    magnitude_GB = np.abs(x_GB)
    if not np.max(magnitude_GB) <= LARGEST_STEP:  # NaN is not <= anything
        raise DeltaNotFinite(f"The step of {name} is not finite or beyond 2^100; the round cannot be published so.")
    mean_G = mean_rows(magnitude_GB, total.size)
    kept_GB = magnitude_GB > np.multiply(mean_G, np.float32(config.threshold / UNIT))[:, None]
    count_G = np.add.reduce(kept_GB, axis=1, dtype=np.int32)
    np.multiply(magnitude_GB, kept_GB, out=magnitude_GB)
    wanted_G = np.divide(sum_rows(magnitude_GB), np.maximum(count_G, 1).astype(np.float32))
    scales = bf16_upward(wanted_G)
    scales[scales < SMALLEST_SCALE] = 0
    kept_GB &= (scales > 0)[:, None]
    numbers_GB: Signed = kept_GB.view(np.int8) * np.where(x_GB < 0, np.int8(-1), np.int8(1))
    patch = np.multiply(numbers_GB, bf16_to_f32(scales)[:, None], dtype=np.float32).reshape(-1)[: total.size]
    return Rounded(
        packed=codec.packing.pack(numbers_GB.reshape(-1)[: total.size]),
        scales=scales,
        patch=patch,
        residual=np.subtract(total, patch),
    )


class PatchWriter:
    """Writes a patch part by part, in the order of the schema's tensors; a context manager.

    Scales are kept in memory, packed numbers in a temporary file beside the patch, since a file has all scales first.
    After a clean exit the patch is complete and on the disk.

    Args:
        base_sha256: of the weights that the patch applies to, 32 bytes; it stands in the file's header.
    """

    def __init__(self, path: Path, schema: Schema, config: PatchConfig, base_sha256: bytes) -> None:
        self._path = path
        self._schema = schema
        self._codec = config.codec
        self._label = base_sha256
        self._scales: list[Scales] = []
        self._packed: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  closed by __exit__

    def write(self, part: Rounded) -> None:
        """Append a part."""
        self._scales.append(part.scales)
        self._packed.write(part.packed.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._packed:
            if kind is None:
                write_frames(self._path, container_size(self._schema, self._codec, self._label), self._parts())

    def _parts(self) -> Iterator[bytes | memoryview]:
        yield expected_header(self._schema, self._codec, self._label)
        for scales in self._scales:
            yield scales.astype("<u2", copy=False).data.cast("B")
        self._packed.seek(0)
        while part := self._packed.read(_SPOOL_READ):
            yield part


def open_patch(path: Path, schema: Schema, config: PatchConfig, base_sha256: bytes) -> Container:
    """Open a patch of these weights and check all that it holds.

    Raises:
        BytesRefused: it is none.
    """
    patch = Container.open(path, schema, config.codec, base_sha256)
    patch.check_finite()
    return patch


def apply_patches(base_path: Path, patches: Sequence[Container], out: Path) -> FileDigest:
    """Write the weights that follow on those at `base_path` after some patches, the oldest first; in one pass.

    Returns the digest of the file, which the last checkpoint's manifest names: whether the patches were the right ones
    is for the caller to see by that.

    Raises:
        CheckpointCorrupt: the base does not have the schema's tensors.
    """
    base = TensorFile.open(base_path)
    specs = {spec.name: spec for patch in patches for spec in patch.schema.tensors}
    if any(base.shapes.get(name) != spec.shape for name, spec in specs.items()):
        raise CheckpointCorrupt(f"{base_path.name} does not have the tensors that the patch changes.")
    with TensorFileWriter(out, base.shapes) as writer:
        for name in base.names:
            if name not in specs:
                writer.write(name, base.tensor(name))
                continue
            for start, stop in chunk_ranges(specs[name].num_elements):
                theta = base.read(name, start, stop)
                for patch in patches:
                    np.subtract(theta, patch.decode(name, start, stop), out=theta)
                writer.write(name, theta)
    assert writer.digest is not None
    return writer.digest
