from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diloco.codec import (
    CodecConfig,
    EncodedDelta,
    Scales,
    bf16_to_f32,
    check_codes,
    check_scales,
    decode,
    encode,
)
from diloco.schema import Schema, TensorSpec
from diloco.streams import Stream
from diloco.tables import Floats
from protocol.errors import DeltaCodeIllegal, DeltaNotFinite
from tests.diloco.examples import CODEC, OTHER_SEED, SCHEMA, SEED, delta, encoded

finite = st.floats(min_value=-1e6, max_value=1e6, width=32, allow_subnormal=False)
vectors = hnp.arrays(np.float32, st.integers(1, 700), elements=finite)


def encode_vector(x: Floats, seed: bytes = SEED, codec: CodecConfig = CODEC) -> EncodedDelta:
    schema = Schema(tensors=(TensorSpec(name="x", shape=x.shape),))
    return encode({"x": x}, schema, codec, seed)


def scale_of_each_element(encoded: EncodedDelta, elements: int) -> Floats:
    return np.repeat(bf16_to_f32(encoded.scales["x"]), encoded.codec.block)[:elements]


@given(vectors)
def test_a_decoded_value_is_less_than_one_scale_from_the_truth(x: Floats) -> None:
    coded = encode_vector(x)
    error = np.abs(coded.decoded()["x"].astype(np.float64) - x.astype(np.float64))
    assert np.all(error <= scale_of_each_element(coded, x.size) * (1 + 2.0**-20) + 2.0**-100)


@given(vectors)
def test_whatever_the_encoder_writes_the_reader_finds_legal(x: Floats) -> None:
    coded = encode_vector(x)
    check_scales(coded.scales["x"], "x")
    check_codes(coded.codes["x"], coded.scales["x"], x.size, block=CODEC.block, name="x")


@given(hnp.arrays(np.float32, 64, elements=finite))
@settings(max_examples=25)
def test_codes_are_the_floor_of_the_exact_quotient_plus_dither_up_to_one_rounding(x: Floats) -> None:
    coded = encode_vector(x, codec=CodecConfig(kind="dither4", block=64))
    scale = Fraction(float(bf16_to_f32(coded.scales["x"])[0]))
    if not scale:
        assert np.all(coded.codes["x"] == 0x88)
        return
    dither = Stream(SEED, "dither").u16(0, 0, 64).tolist()
    stored = np.stack([coded.codes["x"] & 15, coded.codes["x"] >> 4], axis=1).reshape(-1).tolist()
    for value, k, code in zip(x.tolist(), dither, stored, strict=True):
        exact = Fraction(value) / scale + Fraction(2 * k + 1, 2**17)
        rounding = Fraction(1, 2**20)  # two fp32 operations on numbers up to 8
        assert floor(exact - rounding) <= code - 8 <= floor(exact + rounding)


@given(st.floats(-7.0, 7.0, width=32))
@settings(max_examples=20)
def test_averaged_over_every_dither_a_code_is_unbiased(quotient: float) -> None:
    u = (np.arange(2**16, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0**-16)
    codes = np.floor(np.float32(quotient) + u).astype(np.float64)
    assert abs(codes.mean() - quotient) <= 2.0**-16
    assert -7 <= codes.min() <= codes.max() <= 7


def test_averaged_over_seeds_the_decoded_delta_approaches_the_delta() -> None:
    x = Stream(SEED, "init/x").normal(0, 0, 1000)
    count = 200
    mean = sum(encode_vector(x, bytes([i]) * 32).decoded()["x"].astype(np.float64) for i in range(count)) / count
    scale = float(scale_of_each_element(encode_vector(x), x.size).max())
    # A code's standard deviation is at most half a scale; 5 standard errors for the worst of 1000 elements.
    assert np.max(np.abs(mean - x)) < 5 * scale / 2 / count**0.5


@given(vectors)
def test_scales_are_the_smallest_bf16_that_reaches_the_largest_magnitude_in_seven_steps(x: Floats) -> None:
    bits = encode_vector(x).scales["x"]
    largest = np.array([np.max(np.abs(x[i : i + 256])) for i in range(0, x.size, 256)], dtype=np.float32)
    quotient = largest / np.float32(7)
    scale = bf16_to_f32(bits)
    positive = bits > 0
    assert np.all(scale[positive] >= quotient[positive])
    assert np.all(bf16_to_f32((bits[positive] - 1).astype(np.uint16)) < quotient[positive])
    assert np.all(largest[~positive] < 2.0**-100)


def test_the_same_seed_gives_the_same_codes_and_another_seed_others() -> None:
    first, again = encode(delta(1), SCHEMA, CODEC, SEED), encode(delta(1), SCHEMA, CODEC, SEED)
    other = encode(delta(1), SCHEMA, CODEC, OTHER_SEED)
    assert first.content_digest() == again.content_digest() != other.content_digest()


def test_a_tensor_longer_than_a_dither_group_decodes_in_parts_as_in_one() -> None:
    coded = encoded(1)
    whole = np.concatenate([values.reshape(-1) for values in coded.decoded().values()])
    assert np.array_equal(np.concatenate(list(coded.decoded_chunks())), whole)


def test_four_bits_of_a_normal_delta_keep_most_of_it() -> None:
    raw, kept = delta(1)["c.long"], encoded(1).decoded()["c.long"]
    # Seeded dither at block 256: sqrt(1/6) of a scale of about 0.42 standard deviations.
    assert 0.15 < float(np.linalg.norm(kept - raw) / np.linalg.norm(raw)) < 0.20


def test_blocks_of_tiny_numbers_become_zero_so_that_no_scale_is_subnormal() -> None:
    x = np.full(256, 2.0**-101, dtype=np.float32)
    coded = encode_vector(x)
    assert coded.scales["x"].tolist() == [0]
    assert np.all(coded.codes["x"] == 0x88)
    assert np.all(coded.decoded()["x"] == 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**101])
def test_values_that_are_not_finite_or_too_large_are_not_encoded(value: float) -> None:
    x = np.zeros(300, dtype=np.float32)
    x[299] = value
    with pytest.raises(DeltaNotFinite, match="Tensor x of the delta"):
        encode_vector(x)


def test_a_delta_of_another_shape_is_refused() -> None:
    wrong = {**delta(1), "b.short": np.zeros(6, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"b.short is float32\(6,\); the schema says float32\(5,\)"):
        encode(wrong, SCHEMA, CODEC, SEED)


def bits(*values: int) -> Scales:
    return np.array(values, dtype=np.uint16)


@pytest.mark.parametrize("scale", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F7F], ids=hex)
def test_infinite_nan_and_absurd_scales_are_not_finite(scale: int) -> None:
    with pytest.raises(DeltaNotFinite):
        check_scales(bits(0x3F80, scale), "x")


@pytest.mark.parametrize("scale", [0xBF80, 0x8000, 0x0001, 0x007F, 0x0080], ids=hex)
def test_negative_subnormal_and_too_small_scales_are_illegal(scale: int) -> None:
    with pytest.raises(DeltaCodeIllegal):
        check_scales(bits(0x3F80, scale), "x")


def test_the_largest_and_smallest_legal_scales_are_those_the_encoder_can_write() -> None:
    for value in (2.0**100, 2.0**-100):
        coded = encode_vector(np.full(16, value, dtype=np.float32))
        check_scales(coded.scales["x"], "x")
        assert np.all(np.isfinite(coded.decoded()["x"]))


@pytest.mark.parametrize("byte", [0x08, 0x80, 0x00])
def test_the_code_minus_eight_is_illegal(byte: int) -> None:
    codes = np.full(128, 0x88, dtype=np.uint8)
    codes[100] = byte
    with pytest.raises(DeltaCodeIllegal, match="code -8"):
        check_codes(codes, bits(0x3F80), 256, block=256, name="x")


def test_padding_after_an_odd_count_must_be_zero() -> None:
    with pytest.raises(DeltaCodeIllegal, match="padding"):
        check_codes(np.array([0x99, 0x98], dtype=np.uint8), bits(0x3F80), 3, block=256, name="x")


def test_codes_under_a_zero_scale_must_be_zero() -> None:
    codes = np.full(256, 0x88, dtype=np.uint8)
    codes[130] = 0x89
    check_codes(codes, bits(0, 0x3F80), 512, block=256, name="x")
    with pytest.raises(DeltaCodeIllegal, match="scale of zero"):
        check_codes(codes, bits(0x3F80, 0), 512, block=256, name="x")


def test_nibbles_decode_low_half_first() -> None:
    assert decode(np.array([0xF1, 0x88], dtype=np.uint8), bits(0x4000), 3, block=256).tolist() == [-14.0, 14.0, 0.0]


@pytest.mark.parametrize(("kind", "block"), [("ternary", 256), ("dither4", 100), ("dither4", 8), ("dither4", 1 << 17)])
def test_unknown_kinds_and_odd_blocks_are_refused_naming_the_value(kind: str, block: int) -> None:
    with pytest.raises(ValueError, match=f"{kind}|{block}"):
        CodecConfig(kind=kind, block=block)
