"""Which tensors a delta has: their names and shapes, in the one order in which everything canonical visits them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Final

from mmdit.config import MMDiTConfig
from protocol.canonical import canonical_json

_DOMAIN: Final = b"commonweight/schema/v1\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name and shape of one trainable fp32 tensor."""

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.name or not self.name.isascii() or not self.name.isprintable() or self.name == "__metadata__":
            raise ValueError(f"{self.name!r} cannot be the name of a tensor: printable ASCII, and not __metadata__")
        if any(extent < 1 for extent in self.shape):
            raise ValueError(f"{self.name} has shape {self.shape}: every extent must be at least 1")

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The trainable tensors of a run's model, sorted by name."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.tensors]
        if not names:
            raise ValueError("a schema needs at least one tensor")
        if names != sorted(set(names)):
            raise ValueError("the tensors of a schema must be sorted by name, each name once")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical list of names and shapes."""
        listing = [[spec.name, list(spec.shape)] for spec in self.tensors]
        return hashlib.sha256(_DOMAIN + canonical_json(listing)).digest()

    @cached_property
    def num_elements(self) -> int:
        """Number of trainable parameters."""
        return sum(spec.num_elements for spec in self.tensors)

    @cached_property
    def elements_of(self) -> Mapping[str, int]:
        """Number of elements of each tensor, by name."""
        return MappingProxyType({spec.name: spec.num_elements for spec in self.tensors})

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in order."""
        return tuple(spec.name for spec in self.tensors)


def schema_of(config: MMDiTConfig) -> Schema:
    """Return the schema of the model that `config` describes: its parameters, without the position-embedding buffer."""
    # torch is loaded only for this: merging, decoding and checking deltas need numpy alone.
    from mmdit.transformer import trainable_schema

    return Schema(tensors=tuple(TensorSpec(name=name, shape=shape) for name, shape in trainable_schema(config)))
