import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.packing import CELL, MAX_LEVELS, Packing, Signed

levels = st.integers(1, MAX_LEVELS)
few_or_many_to_a_byte = st.sampled_from([1, 2, 3, 7, 8, 31, 127]) | levels
lengths = st.integers(0, 40) | st.builds(lambda cells, rest: cells * CELL + rest, st.integers(1, 3), st.integers(-6, 6))


def numbers_of(levels: int, count: int, seed: int = 0) -> Signed:
    return np.random.default_rng(seed).integers(-levels, levels + 1, count).astype(np.int8)


def packed_as_described(numbers: Signed, packing: Packing) -> list[int]:
    """The module's description: digit j of byte i is number j * bytes + i of the cell."""
    found = []
    for start in range(0, numbers.size, CELL):
        cell = numbers[start : start + CELL].tolist()
        size = -(-len(cell) // packing.digits)
        for i in range(size):
            places = [j * size + i for j in range(packing.digits)]
            digits = [(cell[place] if place < len(cell) else 0) + packing.levels for place in places]
            found.append(sum(digit * packing.base**j for j, digit in enumerate(digits)))
    return found


@given(levels=few_or_many_to_a_byte, count=lengths, seed=st.integers(0, 2**32))
def test_numbers_come_back_as_they_were(levels: int, count: int, seed: int) -> None:
    packing = Packing(levels=levels)
    numbers = numbers_of(levels, count, seed)
    packed = packing.pack(numbers)
    assert packed.size == packing.num_bytes(count)
    assert packing.unpack(packed, count).tolist() == numbers.tolist()


@given(levels=few_or_many_to_a_byte, count=lengths)
def test_the_bytes_are_those_of_the_description(levels: int, count: int) -> None:
    packing = Packing(levels=levels)
    numbers = numbers_of(levels, count)
    assert packing.pack(numbers).tolist() == packed_as_described(numbers, packing)


@given(levels=few_or_many_to_a_byte, count=lengths)
def test_whatever_is_packed_has_only_bytes_that_stand_for_something_and_zeros_behind(levels: int, count: int) -> None:
    packing = Packing(levels=levels)
    packed = packing.pack(numbers_of(levels, count))
    assert np.all(packed < packing.values)
    cells, rest = divmod(count, CELL)
    behind = cells * (-CELL % packing.digits) + -rest % packing.digits
    assert packing.padding(packed, count).tolist() == [levels] * behind


@pytest.mark.parametrize("extreme", [-1, 1])
def test_the_largest_numbers_of_either_sign_fit_for_all_levels(extreme: int) -> None:
    for levels in range(1, MAX_LEVELS + 1):
        packing = Packing(levels=levels)
        numbers = np.full(CELL + 7, extreme * levels, dtype=np.int8)
        assert packing.unpack(packing.pack(numbers), numbers.size).tolist() == numbers.tolist()


@pytest.mark.parametrize(
    ("levels", "digits", "values"),
    [(1, 5, 243), (2, 3, 125), (3, 2, 49), (7, 2, 225), (8, 1, 17), (31, 1, 63), (127, 1, 255)],
)
def test_a_byte_holds_as_many_numbers_as_it_has_room_for(levels: int, digits: int, values: int) -> None:
    packing = Packing(levels=levels)
    assert (packing.digits, packing.values) == (digits, values)
    assert packing.values <= 256 < packing.values * packing.base


@given(levels=few_or_many_to_a_byte, cells=st.integers(0, 3), rest=st.integers(0, CELL), more=st.integers(0, 3))
def test_a_part_that_begins_at_a_cell_unpacks_alone_as_it_does_in_the_whole(
    levels: int, cells: int, rest: int, more: int
) -> None:
    packing = Packing(levels=levels)
    start, stop = cells * CELL, (cells + more) * CELL
    count = stop + rest
    packed = packing.pack(numbers_of(levels, count))
    whole = packing.unpack(packed, count)
    part = packed[packing.num_bytes(start) : packing.num_bytes(stop)]
    assert np.array_equal(packing.unpack(part, stop - start), whole[start:stop])
    tail = packed[packing.num_bytes(start) :]
    assert np.array_equal(packing.unpack(tail, count - start), whole[start:])


@pytest.mark.parametrize("levels", [1, 2, 7, 31, 127])
def test_bytes_that_stand_for_nothing_unpack_to_what_no_encoder_writes(levels: int) -> None:
    packing = Packing(levels=levels)
    for byte in range(packing.values, 256):
        assert np.abs(packing.unpack(np.full(1, byte, dtype=np.uint8), packing.digits).astype(int)).max() > levels


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_digits_behind_the_last_number_are_told_whatever_they_say(levels: int) -> None:
    packing = Packing(levels=levels)
    for byte in range(packing.values):
        digits = [byte // packing.base**j % packing.base for j in range(packing.digits)]
        padding = packing.padding(np.full(1, byte, dtype=np.uint8), 1)
        assert padding.tolist() == digits[1:]


@pytest.mark.parametrize("levels", [-1, 0, 128])
def test_levels_that_do_not_fit_a_byte_are_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=f"levels is {levels}"):
        Packing(levels=levels)
