from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diloco.codec import (
    DITHER_GROUP,
    LARGEST_SCALE,
    MAX_REACH,
    SMALLEST_SCALE,
    UNIT,
    CodecConfig,
    EncodedDelta,
    Scales,
    bf16_to_f32,
    check_codes,
    check_scales,
    content_digest,
    decode,
    dither,
    encode,
)
from diloco.packing import CELL, Signed
from diloco.schema import Schema, TensorSpec
from diloco.streams import Stream
from diloco.tables import Floats
from protocol.errors import DeltaCodeIllegal, DeltaNotFinite
from tests.diloco.examples import CODEC, FINE, OTHER_SEED, SCHEMA, SEED, delta, encoded

LEVELS = (1, 2, 7, 31, 127)
each_level = pytest.mark.parametrize("levels", LEVELS)
finite = st.floats(min_value=-1e6, max_value=1e6, width=32, allow_subnormal=False)
vectors = hnp.arrays(np.float32, st.integers(1, 700), elements=finite)


def codec_of(levels: int, block: int = 256, reach: int = 4 * UNIT, width: int = UNIT) -> CodecConfig:
    """Unless told otherwise, without bias up to four mean magnitudes."""
    return CodecConfig(kind="dither", levels=levels, block=block, reach=reach, width=width)


def encode_vector(x: Floats, seed: bytes = SEED, codec: CodecConfig = CODEC) -> EncodedDelta:
    schema = Schema(tensors=(TensorSpec(name="x", shape=x.shape),))
    return encode({"x": x}, schema, codec, seed)


def scale_of_each_element(encoded: EncodedDelta, elements: int) -> Floats:
    return np.repeat(bf16_to_f32(encoded.scales["x"]), encoded.codec.block)[:elements]


def numbers_of(encoded: EncodedDelta, elements: int) -> Signed:
    return encoded.codec.packing.unpack(encoded.codes["x"], elements)


@each_level
@pytest.mark.parametrize("width", [0, 128, UNIT])
@given(x=vectors)
@settings(max_examples=50)
def test_a_decoded_value_within_reach_is_less_than_one_scale_from_the_truth(levels: int, width: int, x: Floats) -> None:
    coded = encode_vector(x, codec=codec_of(levels, width=width))
    scale = scale_of_each_element(coded, x.size).astype(np.float64)
    most = scale * levels
    error = np.abs(coded.decoded()["x"].astype(np.float64) - np.clip(x.astype(np.float64), -most, most))
    # A dither of no width rounds to the nearest.
    assert np.all(error <= scale * (0.5 + 0.5 * width / UNIT + levels * 2.0**-22) + 2.0**-92)


@each_level
@given(x=vectors)
@settings(max_examples=50)
def test_whatever_the_encoder_writes_the_reader_finds_legal(levels: int, x: Floats) -> None:
    codec = codec_of(levels)
    coded = encode_vector(x, codec=codec)
    check_scales(coded.scales["x"], "x")
    check_codes(coded.codes["x"], coded.scales["x"], x.size, codec=codec, name="x")
    assert np.all(np.abs(numbers_of(coded, x.size).astype(int)) <= levels)


@each_level
@pytest.mark.parametrize("width", [0, 100, 128, UNIT])
@given(x=hnp.arrays(np.float32, 64, elements=finite))
@settings(max_examples=25)
def test_codes_are_the_floor_of_the_exact_quotient_plus_dither_up_to_rounding(
    levels: int, width: int, x: Floats
) -> None:
    coded = encode_vector(x, codec=codec_of(levels, 64, width=width))
    scale = Fraction(float(bf16_to_f32(coded.scales["x"])[0]))
    codes = numbers_of(coded, 64).tolist()
    if not scale:
        assert not any(codes)
        return
    drawn = Stream(SEED, "dither").u16(0, 0, 64).tolist()
    for value, k, code in zip(x.tolist(), drawn, codes, strict=True):
        exact = (
            Fraction(value) / scale
            + Fraction(1, 2)
            + Fraction(width, UNIT) * (Fraction(2 * k + 1, 2**17) - Fraction(1, 2))
        )
        rounding = (levels + 2) * Fraction(1, 2**22)  # some fp32 operations on numbers up to levels + 1, or clipped
        lowest, highest = (max(-levels, min(levels, floor(edge))) for edge in (exact - rounding, exact + rounding))
        assert lowest <= code <= highest


@each_level
@given(share=st.floats(-1.0, 1.0, width=32))
@settings(max_examples=20)
def test_averaged_over_every_dither_a_code_is_unbiased(levels: int, share: float) -> None:
    u = (np.arange(2**16, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0**-16)
    quotient = np.float32(share) * np.float32(levels)
    codes = np.clip(np.floor(quotient + u).astype(np.float64), -levels, levels)
    assert abs(codes.mean() - float(quotient)) <= 2.0**-15


@each_level
def test_what_is_beyond_reach_gets_the_largest_code(levels: int) -> None:
    x = np.array([100.0, -100.0] + [1.0, -1.0] * 127, dtype=np.float32)
    assert numbers_of(encode_vector(x, codec=codec_of(levels)), x.size)[:2].tolist() == [levels, -levels]


@each_level
def test_averaged_over_seeds_the_decoded_delta_approaches_the_delta(levels: int) -> None:
    x = Stream(SEED, "init/x").normal(0, 0, 1000)
    count, codec = 200, codec_of(levels, reach=6 * UNIT)
    seeds = [bytes([i]) * 32 for i in range(count)]
    mean = sum(encode_vector(x, seed, codec).decoded()["x"].astype(np.float64) for seed in seeds) / count
    scale = float(scale_of_each_element(encode_vector(x, codec=codec), x.size).max())
    # A code's standard deviation is at most half a scale; 5 standard errors for the worst of 1000 elements.
    assert np.max(np.abs(mean - x)) < 5 * scale / 2 / count**0.5


@each_level
@pytest.mark.parametrize("reach", [UNIT, 704, 5 * UNIT])
@given(x=vectors)
@settings(max_examples=50)
def test_scales_are_the_smallest_bf16_by_which_the_levels_reach_so_many_mean_magnitudes(
    levels: int, reach: int, x: Floats
) -> None:
    bits = encode_vector(x, codec=codec_of(levels, reach=reach)).scales["x"]
    blocks = [np.abs(x[i : i + 256].astype(np.float64)) for i in range(0, x.size, 256)]
    mean = np.array([float(block.mean()) for block in blocks])
    wanted = mean * (reach / UNIT) / levels
    positive = bits > 0
    assert np.all(bf16_to_f32(bits)[positive] >= wanted[positive] * (1 - 2.0**-20))
    assert np.all(bf16_to_f32((bits[positive] - 1).astype(np.uint16)) < wanted[positive] * (1 + 2.0**-20))
    assert np.all(mean[~positive] < 2.0**-100)


@pytest.mark.parametrize("codec", [CODEC, FINE], ids=["ternary", "7 levels"])
def test_the_same_seed_gives_the_same_codes_and_another_seed_others(codec: CodecConfig) -> None:
    first, again = encode(delta(1), SCHEMA, codec, SEED), encode(delta(1), SCHEMA, codec, SEED)
    other = encode(delta(1), SCHEMA, codec, OTHER_SEED)
    assert first.content_digest() == again.content_digest() != other.content_digest()


def test_a_delta_s_identity_tells_how_it_was_coded() -> None:
    data = [part.tobytes() for part in encoded(1).data()]
    codecs = [CODEC, codec_of(2), codec_of(1, 512)]
    assert len({content_digest(SCHEMA, codec, map(memoryview, data)) for codec in codecs}) == len(codecs)


@each_level
def test_the_dither_of_a_tensor_goes_on_from_group_to_group(levels: int) -> None:
    codec = codec_of(levels)
    x = Stream(SEED, "init/x").normal(0, 0, 2 * DITHER_GROUP + 300)
    coded = encode_vector(x, codec=codec)
    stream = Stream(SEED, "dither")
    for group, start in enumerate(range(0, x.size, DITHER_GROUP)):
        part = x[start : start + DITHER_GROUP]
        steps = scale_of_each_element(coded, x.size)[start : start + DITHER_GROUP]
        expected = np.floor(part / steps + dither(stream, 0, group, -(-part.size // 256) * 256, UNIT)[: part.size])
        expected = np.clip(expected, -levels, levels)
        assert np.array_equal(numbers_of(coded, x.size)[start : start + DITHER_GROUP], expected)


@each_level
def test_a_tensor_longer_than_a_dither_group_decodes_in_parts_as_in_one(levels: int) -> None:
    coded = encoded(1, codec=codec_of(levels))
    whole = np.concatenate([values.reshape(-1) for values in coded.decoded().values()])
    assert np.array_equal(np.concatenate(list(coded.decoded_chunks())), whole)


@pytest.mark.parametrize("block", [16, 512, 1024, 4096, 65_536])
@each_level
def test_a_part_that_begins_at_a_block_and_a_cell_decodes_as_it_does_in_the_whole(levels: int, block: int) -> None:
    codec = codec_of(levels, block)
    x = Stream(SEED, "init/x").normal(0, 0, 2 * 65_536 + 777)
    coded = encode_vector(x, codec=codec)
    whole = coded.decoded()["x"]
    assert codec.alignment == max(block, CELL)
    for start in (codec.alignment, 2 * codec.alignment):
        codes = coded.codes["x"][codec.packing.num_bytes(start) :]
        found = decode(codes, coded.scales["x"][start // block :], x.size - start, codec=codec)
        assert np.array_equal(found, whole[start:])


@pytest.mark.parametrize(
    ("codec", "least", "most"),
    [
        (codec_of(1, reach=4 * UNIT), 1.1, 1.3),
        (codec_of(1, reach=704, width=128), 0.6, 0.75),
        (codec_of(2), 0.6, 0.75),
        (codec_of(7, reach=5 * UNIT), 0.2, 0.26),
        (codec_of(127, reach=6 * UNIT), 0.0, 0.02),
    ],
)
def test_more_levels_and_a_narrower_dither_disturb_a_normal_delta_less(
    codec: CodecConfig, least: float, most: float
) -> None:
    raw, kept = delta(1)["c.long"], encoded(1, codec=codec).decoded()["c.long"]
    assert least < float(np.linalg.norm(kept - raw) / np.linalg.norm(raw)) < most


@each_level
def test_blocks_of_tiny_numbers_become_zero_so_that_no_scale_is_subnormal(levels: int) -> None:
    x = np.full(256, 2.0**-101, dtype=np.float32)
    coded = encode_vector(x, codec=codec_of(levels))
    assert coded.scales["x"].tolist() == [0]
    assert not numbers_of(coded, x.size).any()
    assert not coded.decoded()["x"].any()


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


@each_level
@pytest.mark.parametrize("reach", [UNIT, MAX_REACH])
def test_every_scale_that_the_encoder_can_write_is_legal_and_decodes_to_normal_numbers(levels: int, reach: int) -> None:
    for value in (2.0**60, 2.0**-100):
        coded = encode_vector(np.full(16, value, dtype=np.float32), codec=codec_of(levels, reach=reach))
        check_scales(coded.scales["x"], "x")
        assert coded.scales["x"][0] > 0
        most = float(bf16_to_f32(coded.scales["x"])[0]) * levels
        assert 2.0**-126 < most / levels <= most < 2.0**80


def test_the_scales_just_beyond_the_legal_ones_are_refused() -> None:
    check_scales(bits(int(SMALLEST_SCALE), int(LARGEST_SCALE)), "x")
    with pytest.raises(DeltaNotFinite):
        check_scales(bits(int(LARGEST_SCALE) + 1), "x")
    with pytest.raises(DeltaCodeIllegal):
        check_scales(bits(int(SMALLEST_SCALE) - 1), "x")


@each_level
def test_a_byte_that_stands_for_no_codes_is_illegal(levels: int) -> None:
    codec = codec_of(levels)
    elements = CELL + 256
    for byte in range(codec.packing.values, 256):
        codes = codec.packing.pack(np.zeros(elements, dtype=np.int8))
        check_codes(codes, bits(*[0x3F80] * 5), elements, codec=codec, name="x")
        codes[byte % codes.size] = byte
        with pytest.raises(DeltaCodeIllegal, match="stands for no codes"):
            check_codes(codes, bits(*[0x3F80] * 5), elements, codec=codec, name="x")


@pytest.mark.parametrize("elements", [1, 255, CELL - 1, CELL, CELL + 1])
@pytest.mark.parametrize("levels", [1, 2, 7])
def test_padding_behind_the_last_code_of_any_cell_must_be_zero(levels: int, elements: int) -> None:
    codec = codec_of(levels)
    packing, scales = codec.packing, bits(*[0x3F80] * codec.num_blocks(elements))
    honest = packing.pack(np.full(elements, levels, dtype=np.int8))
    padded = 0
    for place in range(honest.size):
        for digit in range(packing.digits):
            codes = honest.copy()
            codes[place] -= packing.base**digit  # one less than the largest, or than zero: always a legal byte
            if np.array_equal(packing.unpack(codes, elements), packing.unpack(honest, elements)):
                padded += 1
                with pytest.raises(DeltaCodeIllegal, match="padding"):
                    check_codes(codes, scales, elements, codec=codec, name="x")
            else:
                check_codes(codes, scales, elements, codec=codec, name="x")
    cells, rest = divmod(elements, CELL)
    assert padded == cells * (-CELL % packing.digits) + -rest % packing.digits


@each_level
def test_codes_under_a_zero_scale_must_be_zero(levels: int) -> None:
    codec = codec_of(levels)
    for elements, loud in ((512, 256), (512, 511), (300, 256), (300, 299), (2 * CELL + 257, 2 * CELL + 256)):
        numbers = np.zeros(elements, dtype=np.int8)
        numbers[loud] = 1
        codes = codec.packing.pack(numbers)
        scales = np.zeros(codec.num_blocks(elements), dtype=np.uint16)
        scales[loud // 256] = 0x3F80
        check_codes(codes, scales, elements, codec=codec, name="x")
        with pytest.raises(DeltaCodeIllegal, match="scale of zero"):
            check_codes(codes, scales[::-1].copy(), elements, codec=codec, name="x")


def test_codes_are_numbers_of_scales() -> None:
    trits = CODEC.packing.pack(np.array([-1, 1, 0, 1, 1, -1, 0], dtype=np.int8))
    assert decode(trits, bits(0x4000), 7, codec=CODEC).tolist() == [-2.0, 2.0, 0.0, 2.0, 2.0, -2.0, 0.0]
    # Two bytes, of the trits -1, 0, 1, 0 and 1, 1, -1, each one plus one and the lowest first; what is missing is zero.
    assert trits.tolist() == [0 + 3 * 1 + 9 * 2 + 27 * 1 + 81 * 1, 2 + 3 * 2 + 9 * 0 + 27 * 1 + 81 * 1]
    fine = FINE.packing.pack(np.array([-7, 7, 0], dtype=np.int8))
    assert decode(fine, bits(0x4000), 3, codec=FINE).tolist() == [-14.0, 14.0, 0.0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "ternary"}, "ternary"),
        ({"levels": 0}, "levels is 0"),
        ({"levels": 128}, "levels is 128"),
        ({"block": 100}, "block is 100"),
        ({"block": 8}, "block is 8"),
        ({"block": 1 << 17}, "block is 131072"),
        ({"reach": 255}, "reach is 255"),
        ({"reach": MAX_REACH + 1}, "reach is"),
        ({"width": -1}, "width is -1"),
        ({"width": 257}, "width is 257"),
    ],
)
def test_settings_out_of_range_are_refused_naming_the_value(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(CODEC, **change)
