import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from diloco.codec import DECODE_CHUNK, CodecConfig, encode
from diloco.container import (
    Container,
    container_size,
    data_starts,
    expected_header,
    largest_container,
    write_container,
)
from diloco.frames import FRAME, FramedFile, num_frames, write_frames
from diloco.schema import Schema, TensorSpec
from protocol.errors import (
    BytesRefused,
    DeltaCodeIllegal,
    DeltaNotFinite,
    DeltaOversized,
    DeltaSchemaMismatch,
    DeltaStreamCorrupt,
    DeltaTruncated,
)
from tests.diloco.examples import CODEC, FINE, SCHEMA, UNIT_ID, container, delta, encoded

SMALL = Schema(tensors=(TensorSpec(name="p", shape=(3, 101)), TensorSpec(name="q", shape=(20,))))
LONG = Schema(tensors=(TensorSpec(name="long", shape=(1100, 601)), TensorSpec(name="short", shape=(33,))))
"""More codes than one frame holds, and more elements than are decoded at once."""
each_codec = pytest.mark.parametrize("codec", [CODEC, FINE], ids=["ternary", "7 levels"])


def reopen(path: Path, schema: Schema = SCHEMA, codec: CodecConfig = CODEC) -> Container:
    return Container.open(path, schema, codec, UNIT_ID)


def unpacked(path: Path, schema: Schema = SCHEMA, codec: CodecConfig = CODEC) -> bytes:
    file = FramedFile.open(path, container_size(schema, codec, UNIT_ID))
    return b"".join(bytes(piece) for piece in file.pieces())


@each_codec
@pytest.mark.parametrize("schema", [SCHEMA, LONG], ids=["odd", "long"])
def test_what_was_written_is_read_back_with_the_same_identity(
    tmp_path: Path, schema: Schema, codec: CodecConfig
) -> None:
    opened, coded = container(tmp_path, 1, schema, codec), encoded(1, schema, codec)
    opened.check_finite()
    assert opened.content_digest() == coded.content_digest()
    for name, values in coded.decoded().items():
        assert np.array_equal(opened.tensor(name), values)
    assert np.array_equal(np.concatenate(list(opened.decoded_chunks())), np.concatenate(list(coded.decoded_chunks())))


@each_codec
@given(data=st.data())
@settings(max_examples=60)
def test_any_aligned_part_of_a_tensor_is_read_without_the_rest(
    tmp_path_factory: pytest.TempPathFactory, codec: CodecConfig, data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp() / f"parts of {codec.levels}"
    if not directory.exists():
        directory.mkdir()
        container(directory, 1, LONG, codec)
    opened, elements = reopen(directory / "1.delta", LONG, codec), LONG.tensors[0].num_elements
    unit = codec.alignment
    start = unit * data.draw(st.integers(0, elements // unit))
    stop = data.draw(st.sampled_from([elements, min(start + DECODE_CHUNK, elements // unit * unit)]))
    whole = encoded(1, LONG, codec).decoded()["long"].reshape(-1)
    assert np.array_equal(opened.decode("long", start, max(start, stop)), whole[start : max(start, stop)])


@each_codec
def test_unpacked_every_delta_of_a_run_has_the_size_that_the_schema_implies_and_packed_at_most_the_bound(
    tmp_path: Path, codec: CodecConfig
) -> None:
    for number, scale in enumerate((0.0, 1e-3, 1e16)):
        path = tmp_path / str(number)
        write_container(path, encode(delta(1, LONG, scale), LONG, codec, bytes(32)), UNIT_ID)
        raw = path.read_bytes()
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw), read_across_frames=True)
        assert len(reader.read()) == container_size(LONG, codec, UNIT_ID)
        assert len(raw) <= largest_container(LONG, codec)


def test_a_ternary_delta_takes_little_more_than_a_bit_for_each_parameter(tmp_path: Path) -> None:
    bits = {}
    for codec in (CODEC, FINE):
        container(tmp_path, 1, LONG, codec)
        bits[codec.levels] = 8 * (tmp_path / "1.delta").stat().st_size / LONG.num_elements
    assert 1.0 < bits[1] < 1.4
    assert 2.8 < bits[7] < 3.8


@each_codec
def test_safetensors_itself_can_read_what_zstd_unpacks(tmp_path: Path, codec: CodecConfig) -> None:
    container(tmp_path, 1, codec=codec)
    raw = (tmp_path / "1.delta").read_bytes()
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw), read_across_frames=True)
    tensors = load(reader.read())
    assert np.array_equal(tensors["a.odd.codes"], encoded(1, codec=codec).codes["a.odd"])
    assert np.array_equal(tensors["c.long.scales"], encoded(1, codec=codec).scales["c.long"])


def test_any_flipped_bit_is_refused_or_makes_another_delta_but_for_a_few_that_say_nothing(tmp_path: Path) -> None:
    path, honest = tmp_path / "flipped.delta", encoded(1, SMALL)
    write_container(path, honest, UNIT_ID)
    raw = path.read_bytes()
    unnoticed, tried = [], 0
    for position in range(len(raw)):
        for bit in range(8) if position < 64 else (position % 8,):
            tried += 1
            changed = bytearray(raw)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            try:
                opened = reopen(path, SMALL)
                opened.check_finite()
            except BytesRefused:
                continue
            if opened.content_digest() == honest.content_digest():
                unnoticed.append(position)
    # zstd's own headers have bits that decoders must not look at, or that are of no use to this content.
    assert len(unnoticed) < 0.03 * tried
    assert all(position >= 8 + 4 * 1 + 4 for position in unnoticed), "nothing of the table, nor a frame's magic number"


@pytest.mark.parametrize("missing", [1, 100, 10_000])
def test_a_truncated_delta_is_refused(tmp_path: Path, missing: int) -> None:
    container(tmp_path, 1)
    path = tmp_path / "1.delta"
    os.truncate(path, path.stat().st_size - missing)
    with pytest.raises(DeltaTruncated, match="its table says"):
        reopen(path)


def test_an_empty_file_is_a_truncated_delta(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(DeltaTruncated):
        reopen(tmp_path / "empty")


def test_one_byte_too_many_is_refused(tmp_path: Path) -> None:
    container(tmp_path, 1)
    with (tmp_path / "1.delta").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DeltaOversized):
        reopen(tmp_path / "1.delta")


def test_a_plain_safetensors_file_is_refused_whatever_its_size(tmp_path: Path) -> None:
    container(tmp_path, 1)
    path = tmp_path / "1.delta"
    content, size = unpacked(path), path.stat().st_size
    for raw in (content, content[:size], content[:10].ljust(size, b"\0")):
        path.write_bytes(raw)
        with pytest.raises((DeltaOversized, DeltaStreamCorrupt)):
            reopen(path)


def test_one_stream_of_all_the_content_is_refused(tmp_path: Path) -> None:
    container(tmp_path, 1)
    path = tmp_path / "1.delta"
    path.write_bytes(zstandard.ZstdCompressor().compress(unpacked(path)))
    with pytest.raises(DeltaStreamCorrupt, match="does not begin with the table"):
        reopen(path)


def test_a_header_of_66_megabytes_costs_no_memory(tmp_path: Path) -> None:
    content = (66_000_000).to_bytes(8, "little") + b'{"a":'
    for name, size in (("implied", container_size(SCHEMA, CODEC, UNIT_ID)), ("own", 66_000_008)):
        write_frames(tmp_path / name, size, [content, bytes(size - len(content))])
    expected_header(SCHEMA, CODEC, UNIT_ID)
    for name, refusals in (("implied", DeltaSchemaMismatch), ("own", DeltaOversized)):
        tracemalloc.start()
        try:
            with pytest.raises(refusals):
                reopen(tmp_path / name)
            assert tracemalloc.get_traced_memory()[1] < 400_000
        finally:
            tracemalloc.stop()


def test_a_large_delta_is_opened_at_the_cost_of_its_table_and_one_frame(tmp_path: Path) -> None:
    schema = Schema(tensors=(TensorSpec(name="big", shape=(140_000_000,)),))
    size = container_size(schema, CODEC, UNIT_ID)
    header = expected_header(schema, CODEC, UNIT_ID)
    pieces = [bytes(FRAME)] * (size // FRAME)
    write_frames(tmp_path / "big", size, [header, bytes(FRAME - len(header)), *pieces[1:], bytes(size % FRAME)])
    tracemalloc.start()
    try:
        opened = reopen(tmp_path / "big", schema)
        assert tracemalloc.get_traced_memory()[1] < 400_000
        # A byte of zeros is trits of minus one.
        with pytest.raises(DeltaCodeIllegal, match="padding"):
            opened.check_finite()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("schema", "codec", "unit_id"),
    [
        (SCHEMA, CODEC, bytes(32)),
        (SCHEMA, CodecConfig(kind="dither", levels=1, block=128, reach=704, width=128), UNIT_ID),
        (SCHEMA, FINE, UNIT_ID),
        (Schema(tensors=(*SMALL.tensors[:1], TensorSpec(name="r", shape=(20,)))), CODEC, UNIT_ID),
    ],
    ids=["another unit", "another block", "other levels", "another name"],
)
def test_a_delta_for_something_else_is_refused(
    tmp_path: Path, schema: Schema, codec: CodecConfig, unit_id: bytes
) -> None:
    path = tmp_path / "delta"
    write_container(path, encoded(1, SMALL if schema is not SCHEMA else SCHEMA), UNIT_ID)
    with pytest.raises((DeltaSchemaMismatch, DeltaStreamCorrupt)):
        Container.open(path, schema, codec, unit_id)


def patched(tmp_path: Path, tensor: str, raw: bytes, codec: CodecConfig) -> Container:
    """Overwrite the start of a tensor's data in a written container."""
    container(tmp_path, 1, codec=codec)
    path = tmp_path / "1.delta"
    content = bytearray(unpacked(path, codec=codec))
    start = len(expected_header(SCHEMA, codec, UNIT_ID)) + data_starts(SCHEMA, codec)[tensor]
    content[start : start + len(raw)] = raw
    write_frames(path, len(content), [bytes(content)])
    return reopen(path, codec=codec)


@each_codec
def test_nan_in_a_scale_is_found_anywhere_in_the_file(tmp_path: Path, codec: CodecConfig) -> None:
    for name in SCHEMA.names:
        with pytest.raises(DeltaNotFinite, match=name):
            patched(tmp_path, f"{name}.scales", b"\xc0\x7f", codec).check_finite()


@each_codec
def test_illegal_codes_are_found_anywhere_in_the_file(tmp_path: Path, codec: CodecConfig) -> None:
    for name in SCHEMA.names:
        for byte in (codec.packing.values, 255):
            with pytest.raises(DeltaCodeIllegal, match=f"{name} of the delta holds a byte that stands for no codes"):
                patched(tmp_path, f"{name}.codes", bytes([byte]), codec).check_finite()


@each_codec
def test_padding_that_is_not_zero_and_codes_under_a_zero_scale_are_found(tmp_path: Path, codec: CodecConfig) -> None:
    # A scalar's byte is nearly all padding; a byte of zeros says minus the most, digit for digit.
    with pytest.raises(DeltaCodeIllegal, match=r"d\.scalar of the delta has padding"):
        patched(tmp_path, "d.scalar.codes", b"\0", codec).check_finite()
    with pytest.raises(DeltaCodeIllegal, match=r"c\.long of the delta has codes other than zero under a scale of zero"):
        patched(tmp_path, "c.long.scales", b"\0\0", codec).check_finite()


def test_a_frame_that_does_not_unpack_is_found_when_it_is_read_and_not_before(tmp_path: Path) -> None:
    container(tmp_path, 1, LONG)
    path = tmp_path / "1.delta"
    raw = bytearray(path.read_bytes())
    assert num_frames(container_size(LONG, CODEC, UNIT_ID)) > 2
    last = raw.rindex(zstandard.FRAME_HEADER)
    raw[last : last + 4] = bytes(4)
    path.write_bytes(raw)
    opened = reopen(path, LONG)
    opened.decode("long", 0, 1024)
    for read in (opened.check_finite, opened.content_digest, lambda: opened.tensor("long")):
        with pytest.raises(DeltaStreamCorrupt, match="does not unpack"):
            read()


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    opened = container(tmp_path, 1)
    container(tmp_path, 2)
    (tmp_path / "2.delta").replace(tmp_path / "1.delta")
    with pytest.raises(DeltaTruncated, match="was changed while it was being read"):
        opened.tensor("b.short")


@pytest.mark.parametrize(
    ("start", "stop", "said"),
    [(256, 1024, "not an aligned range"), (0, 90_301, "not an aligned range"), (0, 1500, "nor that of a cell")],
)
def test_ranges_must_start_at_a_block_and_a_cell_and_end_with_a_cell(
    tmp_path: Path, start: int, stop: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        container(tmp_path, 1).decode("c.long", start, stop)


def test_a_schema_whose_header_is_over_the_limit_is_refused() -> None:
    names = (TensorSpec(name=f"{i:06d}" + "x" * 200, shape=(1,)) for i in range(3000))
    with pytest.raises(ValueError, match="the limit is"):
        expected_header(Schema(tensors=tuple(names)), CODEC, UNIT_ID)
