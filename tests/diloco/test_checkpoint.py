import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diloco.checkpoint import TensorFile, TensorFileWriter, read_header, write_checkpoint
from protocol.errors import CheckpointCorrupt
from tests.diloco.examples import normals

TENSORS = {"b": normals("b", (3, 4)), "a.weight": normals("a", (7,)), "c": normals("c", ())}


def with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_tensors_come_back_bit_for_bit_and_the_digest_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    digest = write_checkpoint(path, TENSORS)
    raw = path.read_bytes()
    assert (digest.sha256, digest.size) == (hashlib.sha256(raw).digest(), len(raw))
    opened = TensorFile.open(path)
    assert opened.names == ("a.weight", "b", "c")
    for name, values in opened.load().items():
        assert np.array_equal(values, TENSORS[name])
        assert values.shape == TENSORS[name].shape
    assert np.array_equal(opened.read("b", 5, 9), TENSORS["b"].reshape(-1)[5:9])


def test_safetensors_reads_our_files_with_their_one_metadata_key(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_checkpoint(path, TENSORS)
    assert {name: values.tolist() for name, values in load_file(path).items()} == {
        name: values.tolist() for name, values in TENSORS.items()
    }
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_may_be_written_in_parts_with_the_same_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole", TENSORS)
    with TensorFileWriter(tmp_path / "parts", {name: values.shape for name, values in TENSORS.items()}) as writer:
        writer.write("a.weight", TENSORS["a.weight"][:3])
        writer.write("a.weight", TENSORS["a.weight"][3:])
        writer.write("b", TENSORS["b"][:1])
        writer.write("b", TENSORS["b"][1:])
        writer.write("c", TENSORS["c"])
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_tensors_out_of_order_missing_or_too_long_are_refused(tmp_path: Path) -> None:
    shapes = {"a": (2,), "b": (2,)}
    two, three = np.zeros(2, dtype=np.float32), np.zeros(3, dtype=np.float32)
    with (
        pytest.raises(ValueError, match="b is not the next tensor; next is a"),
        TensorFileWriter(tmp_path / "x", shapes) as writer,
    ):
        writer.write("b", two)
    with pytest.raises(ValueError, match="does not fit"), TensorFileWriter(tmp_path / "x", shapes) as writer:
        writer.write("a", three)
    with pytest.raises(ValueError, match="not complete"), TensorFileWriter(tmp_path / "x", shapes) as writer:
        writer.write("a", two)
    with TensorFileWriter(tmp_path / "x", {"a": (2,)}) as writer:
        writer.write("a", two)
        with pytest.raises(ValueError, match="next is the end"):
            writer.write("a", two)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


PT = {"format": "pt"}


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": PT, "a": entry(0, 8, [1])},
        {"__metadata__": PT, "a": entry(4, 8, [1])},
        {"__metadata__": PT, "a": entry(0, 4, [-1])},
        {"__metadata__": PT, "a": entry(0, 2, [1], "F16")},
        {"__metadata__": PT, "a": entry(0, 4, [1], "F8")},
        {"__metadata__": PT, "a": entry(0, 4, [1 << 60])},
        {"__metadata__": PT, "a": entry(0, 4, [True])},
        {"__metadata__": PT, "a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"__metadata__": PT, "a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"__metadata__": PT, "a": [1, 2, 3]},
        {"__metadata__": {"format": "pt", "more": "x"}, "a": entry(0, 4, [1])},
        {"__metadata__": {"format": "np"}, "a": entry(0, 4, [1])},
        {"__metadata__": {"format": 1}, "a": entry(0, 4, [1])},
        {"a": entry(0, 4, [1])},
        [],
        7,
    ],
    ids=str,
)
def test_headers_that_we_would_not_write_are_refused(tmp_path: Path, header: object) -> None:
    raw = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    raw += b" " * (-len(raw) % 8)
    path = with_header(tmp_path / "weights", raw, bytes(4))
    with pytest.raises(CheckpointCorrupt):
        TensorFile.open(path)


@pytest.mark.parametrize(
    "header", [b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"a":' + b"9" * 5000 + b"}", b'{"a":1,"a":2}', b"NaN"]
)
def test_headers_that_are_no_json_are_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CheckpointCorrupt, match="not a checkpoint of ours"):
        read_header(with_header(tmp_path / "weights", header))


def test_absurd_header_lengths_and_short_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for raw in (
        b"",
        b"1234567",
        (66_000_000).to_bytes(8, "little") + bytes(100),
        (101).to_bytes(8, "little") + bytes(100),
    ):
        path.write_bytes(raw)
        with pytest.raises(CheckpointCorrupt, match="Fetch it again"):
            TensorFile.open(path)


def test_a_file_that_is_cut_or_continued_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_checkpoint(path, TENSORS)
    raw = path.read_bytes()
    for wrong in (raw[:-1], raw + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointCorrupt, match="implies exactly"):
            TensorFile.open(path)


def test_files_of_another_writer_are_refused_rather_than_read_loosely(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_file({"z": np.zeros(2, dtype=np.float32), "a": np.zeros(2, dtype=np.float32)}, path)
    with pytest.raises(CheckpointCorrupt):
        TensorFile.open(path)
