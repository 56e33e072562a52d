"""A unit's trail: what its weights were at the end of each segment, committed to by one Merkle root.

A referee who replays a unit compares segment by segment, and stops at the first that differs.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_LEAF: Final = b"\x00"
_NODE: Final = b"\x01"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """End of one segment: SHA-256 of the trainable weights (raw fp32 in schema order) and the segment's mean loss."""

    weights_digest: bytes
    mean_loss: float

    def leaf(self) -> bytes:
        """Return the bytes that the tree commits to: the digest, then the loss as a little-endian double."""
        return self.weights_digest + struct.pack("<d", self.mean_loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """All segments of a unit, in order."""

    segments: tuple[Segment, ...]

    @property
    def root(self) -> bytes:
        """Merkle root over the segments' leaves."""
        return merkle_root([segment.leaf() for segment in self.segments])


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Return the tree hash of RFC 6962, section 2.1: SHA-256, with different prefixes for leaves and inner nodes."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(_LEAF + leaves[0]).digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(_NODE + merkle_root(leaves[:split]) + merkle_root(leaves[split:])).digest()
