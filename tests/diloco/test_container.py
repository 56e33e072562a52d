import gzip
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from diloco.codec import CodecConfig
from diloco.container import Container, container_size, expected_header, write_container
from diloco.schema import Schema, TensorSpec
from protocol.errors import (
    BytesRefused,
    DeltaCodeIllegal,
    DeltaNotFinite,
    DeltaOversized,
    DeltaSchemaMismatch,
    DeltaTruncated,
)
from tests.diloco.examples import CODEC, SCHEMA, UNIT_ID, container, encoded

SMALL = Schema(tensors=(TensorSpec(name="p", shape=(3, 101)), TensorSpec(name="q", shape=(20,))))


def reopen(path: Path, schema: Schema = SCHEMA) -> Container:
    return Container.open(path, schema, CODEC, UNIT_ID)


def test_what_was_written_is_read_back_with_the_same_identity(tmp_path: Path) -> None:
    opened, coded = container(tmp_path, 1), encoded(1)
    opened.check_finite()
    assert opened.content_digest() == coded.content_digest()
    for name, values in coded.decoded().items():
        assert np.array_equal(opened.tensor(name), values)
    assert np.array_equal(np.concatenate(list(opened.decoded_chunks())), np.concatenate(list(coded.decoded_chunks())))
    assert np.array_equal(opened.decode("c.long", 512, 70_001), coded.decoded()["c.long"].reshape(-1)[512:70_001])


def test_every_delta_of_a_run_has_the_size_that_the_schema_implies(tmp_path: Path) -> None:
    container(tmp_path, 1)
    assert (tmp_path / "1.delta").stat().st_size == container_size(SCHEMA, CODEC, UNIT_ID)


def test_safetensors_itself_can_read_a_container(tmp_path: Path) -> None:
    container(tmp_path, 1)
    tensors = load_file(tmp_path / "1.delta")
    assert np.array_equal(tensors["a.odd.codes"], encoded(1).codes["a.odd"])
    assert np.array_equal(tensors["c.long.scales"], encoded(1).scales["c.long"])


@given(data=st.data())
@settings(max_examples=300)
def test_any_flipped_bit_is_refused_or_makes_another_delta(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.delta"
    write_container(path, encoded(1, SMALL), UNIT_ID)
    raw = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        opened = reopen(path, SMALL)
        opened.check_finite()
    except BytesRefused:
        return
    assert opened.content_digest() != encoded(1, SMALL).content_digest()


@pytest.mark.parametrize("missing", [1, 100, 10_000])
def test_a_truncated_delta_is_refused(tmp_path: Path, missing: int) -> None:
    container(tmp_path, 1)
    path = tmp_path / "1.delta"
    os.truncate(path, path.stat().st_size - missing)
    with pytest.raises(DeltaTruncated, match="implies exactly"):
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


def test_a_gzip_stream_is_refused_whatever_its_size(tmp_path: Path) -> None:
    container(tmp_path, 1)
    path = tmp_path / "1.delta"
    size = path.stat().st_size
    bomb = gzip.compress(bytes(1_000_000))
    path.write_bytes(bomb)
    with pytest.raises(DeltaTruncated):
        reopen(path)
    path.write_bytes(bomb.ljust(size, b"\0"))
    with pytest.raises(DeltaSchemaMismatch):
        reopen(path)


def test_a_header_of_66_megabytes_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write((66_000_000).to_bytes(8, "little") + b'{"a":')
        file.truncate(66_000_008)
    expected_header(SCHEMA, CODEC, UNIT_ID)
    tracemalloc.start()
    try:
        with pytest.raises(DeltaOversized):
            reopen(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_a_header_of_66_megabytes_in_a_file_of_the_right_size_costs_no_memory(tmp_path: Path) -> None:
    schema = Schema(tensors=(TensorSpec(name="big", shape=(140_000_000,)),))
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write((66_000_000).to_bytes(8, "little") + b'{"a":')
        file.truncate(container_size(schema, CODEC, UNIT_ID))
    tracemalloc.start()
    try:
        with pytest.raises(DeltaSchemaMismatch):
            reopen(path, schema)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("schema", "codec", "unit_id"),
    [
        (SCHEMA, CODEC, bytes(32)),
        (SCHEMA, CodecConfig(kind="dither4", block=128), UNIT_ID),
        (Schema(tensors=(*SMALL.tensors[:1], TensorSpec(name="r", shape=(20,)))), CODEC, UNIT_ID),
    ],
    ids=["another unit", "another codec", "another name"],
)
def test_a_delta_for_something_else_is_refused(
    tmp_path: Path, schema: Schema, codec: CodecConfig, unit_id: bytes
) -> None:
    path = tmp_path / "delta"
    write_container(path, encoded(1, SMALL if schema is not SCHEMA else SCHEMA), UNIT_ID)
    with pytest.raises((DeltaSchemaMismatch, DeltaTruncated, DeltaOversized)):
        Container.open(path, schema, codec, unit_id)


def patched(tmp_path: Path, tensor: str, raw: bytes) -> Container:
    """Overwrite the start of a tensor's data in a written container."""
    opened = container(tmp_path, 1)
    path = tmp_path / "1.delta"
    with path.open("r+b") as file:
        file.seek(opened._data_start + opened._starts[tensor])
        file.write(raw)
    return reopen(path)


def test_nan_in_a_scale_is_found_anywhere_in_the_file(tmp_path: Path) -> None:
    for name in SCHEMA.names:
        with pytest.raises(DeltaNotFinite, match=name):
            patched(tmp_path, f"{name}.scales", b"\xc0\x7f").check_finite()


def test_illegal_codes_are_found_anywhere_in_the_file(tmp_path: Path) -> None:
    for name in SCHEMA.names:
        with pytest.raises(DeltaCodeIllegal, match=name):
            patched(tmp_path, f"{name}.codes", b"\x0f").check_finite()


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    opened = container(tmp_path, 1)
    container(tmp_path, 2)
    (tmp_path / "2.delta").replace(tmp_path / "1.delta")
    with pytest.raises(DeltaTruncated, match="was changed while it was being read"):
        opened.tensor("b.short")


def test_ranges_must_start_at_a_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block-aligned"):
        container(tmp_path, 1).decode("c.long", 100, 200)


def test_a_schema_whose_header_is_over_the_limit_is_refused() -> None:
    names = (TensorSpec(name=f"{i:06d}" + "x" * 200, shape=(1,)) for i in range(3000))
    with pytest.raises(ValueError, match="the limit is"):
        expected_header(Schema(tensors=tuple(names)), CODEC, UNIT_ID)
