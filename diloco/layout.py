"""The one byte layout of every safetensors file that we write: canonical JSON header, no gaps, one metadata key.

Readers do not interpret a foreign header: they rebuild the header that must be there and compare bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from protocol.canonical import canonical_json, parse_json
from protocol.errors import PayloadInvalid

LENGTH_BYTES: Final = 8
"""Every safetensors file starts with the header's length, an unsigned little-endian 64-bit integer."""
_ALIGNMENT: Final = 8
_METADATA: Final = "__metadata__"
_MAX_EXTENT: Final = 1 << 48
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor in a file: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Tensors in file order and the one metadata pair; everything about the file but its data."""

    entries: tuple[Entry, ...]
    metadata: tuple[str, str]

    def prefix(self) -> bytes:
        """Return the bytes before the data: length, then canonical JSON padded with spaces to a multiple of 8."""
        header: dict[str, object] = {_METADATA: {self.metadata[0]: self.metadata[1]}}
        start = 0
        for entry in self.entries:
            end = start + entry.num_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
            start = end
        if len(header) != len(self.entries) + 1:
            raise ValueError("a file cannot hold two tensors of one name")
        encoded = canonical_json(header)
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        return len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded

    def data_bytes(self) -> int:
        """Return the number of bytes after the prefix."""
        return sum(entry.num_bytes for entry in self.entries)

    def starts(self) -> dict[str, int]:
        """Return for each tensor its offset in the data section."""
        starts: dict[str, int] = {}
        position = 0
        for entry in self.entries:
            starts[entry.name] = position
            position += entry.num_bytes
        return starts


def parse_layout(header: bytes, order: Sequence[str] | None = None) -> Layout:
    """Return the layout that `header` (without the length) describes, if it is exactly what we would have written.

    Args:
        header: the JSON header with its padding.
        order: names in file order; None means sorted by name.

    Raises:
        ValueError: malformed, or not byte for byte canonical. The message says what is wrong.
    """
    try:
        layout = _read_layout(parse_json(header), order)
        rebuilt = layout.prefix()
    except PayloadInvalid as error:
        raise ValueError(error.message) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is not that of a safetensors file ({error})") from None
    if rebuilt[LENGTH_BYTES:] != header:
        raise ValueError("its header is not in canonical form")
    return layout


def _read_layout(parsed: Any, order: Sequence[str] | None) -> Layout:
    pairs: Iterable[tuple[str, str]] = parsed[_METADATA].items()
    metadata = tuple(pairs)
    if len(metadata) != 1 or not isinstance(metadata[0][1], str):
        raise ValueError("its header must hold exactly one metadata key")
    names = sorted(name for name in parsed if name != _METADATA)
    if order is not None and sorted(order) != names:
        raise ValueError(f"it must hold the tensors {', '.join(sorted(order))}, not {', '.join(names) or 'none'}")
    entries = tuple(_read_entry(name, parsed[name]) for name in (names if order is None else order))
    return Layout(entries=entries, metadata=metadata[0])


def _read_entry(name: str, described: Any) -> Entry:
    dtype, shape = described["dtype"], described["shape"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {dtype}, which we never write")
    if any(type(extent) is not int or not 0 <= extent <= _MAX_EXTENT for extent in shape):
        raise ValueError(f"tensor {name} has the impossible shape {shape}")
    return Entry(name=name, dtype=dtype, shape=tuple(shape))
