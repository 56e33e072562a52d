"""Weights and momentum on disk: safetensors with one canonical layout, so that equal tensors are equal files.

Names are sorted, all tensors are fp32, and the only metadata is {"format": "pt"}: with more than one key the usual
libraries do not write the same bytes twice. Files of this form load in diffusers and in safetensors as they are.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from diloco.layout import LENGTH_BYTES, Entry, Layout, parse_layout
from diloco.pinned import PinnedFile
from diloco.tables import Floats
from protocol.errors import CheckpointCorrupt
from protocol.limits import MAX_CHECKPOINT_HEADER_BYTES

METADATA: Final = ("format", "pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """SHA-256 and size in bytes of a file that was written."""

    sha256: bytes
    size: int


class TensorFileWriter:
    """Writes a checkpoint file tensor by tensor, or in parts of one tensor, in the order of the sorted names.

    Use as a context manager; after a clean exit the file is complete, on the disk, and `digest` is known. After an
    exception the unfinished file is left for the caller to remove.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._layout = checkpoint_layout(shapes)
        self._file = path.open("wb")
        self._hasher = hashlib.sha256()
        self._written = 0
        self._end = 0
        self._pending = list(reversed(self._layout.entries))
        self.digest: FileDigest | None = None
        self._put(self._layout.prefix())
        self._end = self._written

    def write(self, name: str, values: Floats) -> None:
        """Append `values` (fp32, any shape) to tensor `name`; parts must come in order.

        Raises:
            ValueError: the tensor is not the next one, or its parts are more than its shape allows.
        """
        if self._written == self._end:
            entry = self._pending.pop() if self._pending else None
            if entry is None or entry.name != name:
                raise ValueError(f"{name} is not the next tensor; next is {entry.name if entry else 'the end'}")
            self._current = name
            self._end += entry.num_bytes
        if values.dtype != np.float32 or name != self._current or self._written + values.nbytes > self._end:
            raise ValueError(f"{values.dtype}{values.shape} does not fit what is left of {self._current}")
        self._put(np.ascontiguousarray(values).astype("<f4", copy=False).reshape(-1).data.cast("B"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def _put(self, raw: bytes | memoryview) -> None:
        self._file.write(raw)
        self._hasher.update(raw)
        self._written += len(raw)

    def _finish(self) -> None:
        if self._pending or self._written != self._end:
            raise ValueError(f"the file is not complete: {len(self._pending)} tensors are missing")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.digest = FileDigest(sha256=self._hasher.digest(), size=self._written)


class TensorFile:
    """A checkpoint file whose header is canonical and whose size fits; tensors are read on demand.

    Holds no open file: see `PinnedFile`.
    """

    __slots__ = ("_data_start", "_file", "_starts", "shapes")

    def __init__(self, file: PinnedFile, layout: Layout) -> None:
        self._file = file
        self._starts = layout.starts()
        self._data_start = len(layout.prefix())
        self.shapes: dict[str, tuple[int, ...]] = {entry.name: entry.shape for entry in layout.entries}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the header of a checkpoint file and hold it to the canonical form.

        Raises:
            CheckpointCorrupt: the header or the size is not what `TensorFileWriter` writes.
        """
        file = PinnedFile(path, CheckpointCorrupt)
        layout = _read_layout(file)
        size = len(layout.prefix()) + layout.data_bytes()
        if size != file.size:
            raise CheckpointCorrupt(f"{path.name} has {file.size:,} bytes; its header implies exactly {size:,}.")
        return cls(file, layout)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(self.shapes)

    def read(self, name: str, start: int, stop: int) -> Floats:
        """Return elements [start, stop) of the flattened tensor, fp32."""
        if not 0 <= start <= stop <= prod(self.shapes[name]):
            raise ValueError(f"elements {start} to {stop} are outside of {name} with shape {self.shapes[name]}")
        (raw,) = self._file.read((self._data_start + self._starts[name] + 4 * start, 4 * (stop - start)))
        return raw.view("<f4").astype(np.float32, copy=False)

    def tensor(self, name: str) -> Floats:
        """Return one whole tensor, fp32 in its shape."""
        return self.read(name, 0, prod(self.shapes[name])).reshape(self.shapes[name])

    def load(self) -> dict[str, Floats]:
        """Return all tensors."""
        return {name: self.tensor(name) for name in self.names}


def checkpoint_layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Return the layout of a checkpoint with these fp32 tensors."""
    entries = tuple(Entry(name=name, dtype="F32", shape=tuple(shapes[name])) for name in sorted(shapes))
    return Layout(entries=entries, metadata=METADATA)


def write_checkpoint(path: Path, tensors: Mapping[str, Floats]) -> FileDigest:
    """Write tensors that are already in memory; return digest and size of the file."""
    with TensorFileWriter(path, {name: tensor.shape for name, tensor in tensors.items()}) as writer:
        for name in sorted(tensors):
            writer.write(name, tensors[name])
    assert writer.digest is not None
    return writer.digest


def read_header(path: Path) -> Sequence[Entry]:
    """Return name, dtype and shape of each tensor of a checkpoint file, sorted by name.

    Raises:
        CheckpointCorrupt: the header is not what `TensorFileWriter` writes.
    """
    return _read_layout(PinnedFile(path, CheckpointCorrupt)).entries


def _read_layout(file: PinnedFile) -> Layout:
    name = file.path.name
    if file.size < LENGTH_BYTES:
        raise CheckpointCorrupt(f"{name} has {file.size} bytes; that is no checkpoint. Fetch it again.")
    (raw_length,) = file.read((0, LENGTH_BYTES))
    length = int.from_bytes(raw_length.tobytes(), "little")
    if length > min(MAX_CHECKPOINT_HEADER_BYTES, file.size - LENGTH_BYTES):
        raise CheckpointCorrupt(
            f"{name} announces a header of {length:,} bytes; at most {MAX_CHECKPOINT_HEADER_BYTES:,} are allowed, "
            f"and the file has {file.size:,}. Fetch it again."
        )
    (header,) = file.read((LENGTH_BYTES, length))
    try:
        layout = parse_layout(header.tobytes())
    except ValueError as error:
        raise CheckpointCorrupt(f"{name} is not a checkpoint of ours: {error}. Fetch it again.") from None
    if layout.metadata != METADATA or any(entry.dtype != "F32" for entry in layout.entries):
        raise CheckpointCorrupt(f'{name} must hold fp32 tensors and only the metadata {{"format": "pt"}}.')
    return layout
