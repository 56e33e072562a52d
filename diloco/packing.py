"""Small whole numbers, several in a byte: five trits, three of five levels, two of up to fifteen, else one.

Numbers from -L to L are digits of base 2 L + 1, each one plus L. A tensor's numbers are cut into cells of 1,024; a cell
is cut into k equal runs, and its first byte holds the first number of each run, so that packing is a few sums of whole
runs and unpacking a few divisions: digit j of byte i is number j * bytes + i of the cell. Where a cell is short of a
byte's last digits these are those of zero. A tensor's last cell may be shorter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

Packed = npt.NDArray[np.uint8]
Signed = npt.NDArray[np.int8]

CELL: Final = 1024
"""Numbers that are packed together; parts of a tensor begin at multiples of it."""
MAX_LEVELS: Final = 127
_BYTE_VALUES: Final = 256


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How numbers from -`levels` to `levels` lie in bytes."""

    levels: int

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= MAX_LEVELS:
            raise ValueError(f"levels is {self.levels}; it must be from 1 to {MAX_LEVELS}")

    @property
    def base(self) -> int:
        """How many values a number has."""
        return 2 * self.levels + 1

    @cached_property
    def digits(self) -> int:
        """How many numbers a byte holds."""
        count = 1
        while self.base ** (count + 1) <= _BYTE_VALUES:
            count += 1
        return count

    @property
    def values(self) -> int:
        """How many values a byte may have; the others stand for nothing."""
        return int(self.base**self.digits)

    def num_bytes(self, elements: int) -> int:
        """Return the bytes of so many numbers from the start of a cell."""
        cells, rest = divmod(elements, CELL)
        return int(cells * self.cell_bytes(CELL) + self.cell_bytes(rest))

    def cell_bytes(self, elements: int) -> int:
        """Return the bytes of a cell of so many numbers."""
        return -(-elements // self.digits)

    def pack(self, numbers: Signed) -> Packed:
        """Return the bytes of a flat array, from the start of a cell."""
        packed = np.empty(self.num_bytes(numbers.size), dtype=np.uint8)
        for cells, places in self._parts(numbers.size):
            shape = (-1, cells.step)
            self._pack_cells(numbers[cells.start : cells.stop].reshape(shape), packed[places])
        return packed

    def unpack(self, packed: Packed, elements: int) -> Signed:
        """Return the numbers that `packed` holds; bytes that stand for nothing give numbers beyond `levels`.

        Args:
            packed: `num_bytes(elements)` bytes, from the start of a cell.
        """
        numbers = np.empty(elements, dtype=np.int8)
        for cells, places in self._parts(elements):
            self._unpack_cells(packed[places], numbers[cells.start : cells.stop].reshape(-1, cells.step))
        return numbers

    def padding(self, packed: Packed, elements: int) -> Packed:
        """Return what the digits behind the last number of each cell say, plus `levels`; of right bytes: `levels`."""
        found = [
            self._last_digits(packed[places].reshape(-1, self.cell_bytes(cells.step)), cells.step)
            for cells, places in self._parts(elements)
        ]
        return np.concatenate(found) if found else np.empty(0, dtype=np.uint8)

    def _parts(self, elements: int) -> Iterator[tuple[range, slice]]:
        """Yield the whole cells, then the short one: their numbers (the step is a cell's length) and their bytes."""
        whole = elements // CELL * CELL
        if whole:
            yield range(0, whole, CELL), slice(0, self.num_bytes(whole))
        if whole < elements:
            yield range(whole, elements, elements - whole), slice(self.num_bytes(whole), self.num_bytes(elements))

    def _pack_cells(self, numbers_CE: Signed, packed: Packed) -> None:
        width = numbers_CE.shape[1]
        bytes_CP = packed.reshape(len(numbers_CE), -1)
        # Modulo 256, adding the levels to a number below zero gives its digit.
        digits_CE = np.add(numbers_CE.view(np.uint8), np.uint8(self.levels))
        bytes_CP[...] = 0
        for place in reversed(range(self.digits)):
            np.multiply(bytes_CP, np.uint8(self.base % _BYTE_VALUES), out=bytes_CP)
            start, stop = self._run(place, width)
            np.add(bytes_CP[:, : stop - start], digits_CE[:, start:stop], out=bytes_CP[:, : stop - start])
            if stop - start < bytes_CP.shape[1]:
                short = bytes_CP[:, stop - start :]
                np.add(short, np.uint8(self.levels), out=short)

    def _unpack_cells(self, packed: Packed, numbers_CE: Signed) -> None:
        width = numbers_CE.shape[1]
        left_CP = packed.reshape(len(numbers_CE), -1)
        digits_CE = numbers_CE.view(np.uint8)
        for place in range(self.digits):
            start, stop = self._run(place, width)
            left_CP, digit_CP = self._next_digit(left_CP, place)
            digits_CE[:, start:stop] = digit_CP[:, : stop - start]
        np.subtract(digits_CE, np.uint8(self.levels), out=digits_CE)

    def _last_digits(self, packed_CP: Packed, width: int) -> Packed:
        found = []
        left_CP = packed_CP
        for place in range(self.digits):
            start, stop = self._run(place, width)
            left_CP, digit_CP = self._next_digit(left_CP, place)
            found.append(digit_CP[:, stop - start :].reshape(-1))
        return np.concatenate(found)

    def _next_digit(self, left: Packed, place: int) -> tuple[Packed, Packed]:
        """Split off the lowest digit; the last one is all that is left."""
        if place == self.digits - 1:
            return left, left
        rest = np.floor_divide(left, np.uint8(self.base))
        digit = np.multiply(rest, np.uint8(self.base))
        return rest, np.subtract(left, digit, out=digit)

    def _run(self, place: int, width: int) -> tuple[int, int]:
        size = self.cell_bytes(width)
        return min(place * size, width), min((place + 1) * size, width)
