import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.streams import Stream
from tests.diloco.examples import OTHER_SEED, SEED

MASK = (1 << 64) - 1


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """The generator as its paper defines it (Salmon et al., SC 2011), in integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low0, high0 = c[0] * 0xD2E7470EE14C6C93 & MASK, c[0] * 0xD2E7470EE14C6C93 >> 64
        low1, high1 = c[2] * 0xCA5A826395121157 & MASK, c[2] * 0xCA5A826395121157 >> 64
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


@given(step=st.integers(0, 2**40), sample=st.integers(0, 2**40))
def test_words_are_philox_at_the_counter_of_step_and_sample(step: int, sample: int) -> None:
    digest = hashlib.sha256(b"commonweight/stream/v1\0" + SEED + b"\0" + b"noise").digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
    # numpy increments the block word before it generates: the first block is 1.
    expected = [word for block in (1, 2) for word in philox_4x64_10([block, sample, step, 0], key)]
    assert Stream(SEED, "noise").words(step, sample, 8).tolist() == expected


def test_a_draw_does_not_depend_on_what_was_drawn_before() -> None:
    busy, fresh = Stream(SEED, "noise"), Stream(SEED, "noise")
    for sample in range(5):
        busy.u16(1, sample, 3 + sample)
    assert busy.u16(9, 4, 10).tolist() == fresh.u16(9, 4, 10).tolist()


def test_sixteen_bit_draws_are_the_quarters_of_words_lowest_first() -> None:
    stream = Stream(SEED, "dither")
    words = stream.words(2, 3, 2).tolist()
    quarters = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    assert stream.u16(2, 3, 7).tolist() == quarters[:7]
    assert stream.word(2, 3) == words[0]


def test_seed_name_step_and_sample_each_change_the_draw() -> None:
    draws = {
        tuple(Stream(seed, name).u16(step, sample, 8).tolist())
        for seed in (SEED, OTHER_SEED)
        for name in ("order", "noise")
        for step in (0, 1)
        for sample in (0, 1)
    }
    assert len(draws) == 16


def test_normal_draws_look_normal() -> None:
    values = Stream(SEED, "noise").normal(0, 0, 100_000)
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1.0) < 0.02


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="a seed has 32 bytes, this one has 5"):
        Stream(b"short", "noise")
