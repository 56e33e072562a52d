"""How a machine carries out a unit: its own choice, by the memory that it has. None of it changes what is computed."""

from dataclasses import dataclass
from typing import Final, Literal

Keeping = Literal["whole", "narrow", "host"]
"""Where the fp32 weights, their gradients and AdamW's moments are while a unit is trained; see `Execution`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What a device with little memory may do about it; results differ by rounding only.

    Args:
        parts: equal parts of each batch that pass through the model one after another. Their gradients are added up in
            fp32: the same sums in another order.
        checkpointing: keep what enters each block, and compute the block once more on the way back. A fourth to a third
            more work, for a small part of the memory of the activations.
        keeping: "whole": all on the device, all tensors updated in one call. "narrow": the device computes on copies in
            the run's precision, whose gradients stay in that precision until their tensor's turn to be updated comes
            (in several parts they are added up in fp32 all the same). "host": as narrow, and fp32 weights, gradients
            and moments are in main memory; the update is done there. The device holds no more than the copies.

    Raises:
        ValueError: fewer parts than one.
    """

    parts: int = 1
    checkpointing: bool = False
    keeping: Keeping = "whole"

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"parts is {self.parts}; it must be at least 1")


PLAIN: Final = Execution()
"""All at once, all on the device: the quickest, where it fits."""
