import io
import os
import resource
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.frames import FRAME, FramedFile, largest_file, num_frames, write_frames
from protocol.errors import BytesRefused, DeltaOversized, DeltaStreamCorrupt, DeltaTruncated

PREFIX = 8
MIB = 1 << 20


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that hypothesis may write again and again."""
    return tmp_path_factory.mktemp("frames") / "file"


def mixed(size: int, seed: int = 0) -> bytes:
    """Content of which some parts compress and others do not."""
    random = np.random.default_rng(seed)
    content = random.integers(0, 256, size, dtype=np.uint8)
    content[: size // 3] = content[: size // 3] % 3
    content[size // 3 : size // 2] = 0
    return content.tobytes()


CONTENT = mixed(2 * FRAME + 1000)


def written(path: Path, content: bytes = CONTENT) -> Path:
    write_frames(path, len(content), [content])
    return path


def frames_of(path: Path, size: int = len(CONTENT)) -> list[bytes]:
    """Take a file apart as its description says."""
    raw = path.read_bytes()
    lengths = struct.unpack_from(f"<{num_frames(size)}I", raw, PREFIX)
    starts = np.cumsum([PREFIX + 4 * len(lengths), *lengths]).tolist()
    return [raw[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def assembled(path: Path, frames: list[bytes], table: list[int] | None = None) -> Path:
    """Write a file of these frames, with a table that says so or another one."""
    lengths = [len(frame) for frame in frames] if table is None else table
    head = struct.pack("<II", 0x184D2A50, 4 * len(lengths)) + struct.pack(f"<{len(lengths)}I", *lengths)
    path.write_bytes(head + b"".join(frames))
    return path


def everything(path: Path, size: int = len(CONTENT)) -> bytes:
    return b"".join(bytes(piece) for piece in FramedFile.open(path, size).pieces())


def refused(path: Path, kind: type[BytesRefused], said: str, size: int = len(CONTENT)) -> None:
    with pytest.raises(kind, match=said):
        everything(path, size)


# --- what was written -------------------------------------------------------------------------------------------


@given(parts=st.lists(st.binary(max_size=300), max_size=5), stretch=st.integers(1, 900), data=st.data())
@settings(max_examples=60)
def test_any_part_of_any_content_is_read_back_however_it_was_handed_over(
    scratch: Path, parts: list[bytes], stretch: int, data: st.DataObject
) -> None:
    parts = [part * stretch for part in parts]
    content = b"".join(parts)
    write_frames(scratch, len(content), parts)
    file = FramedFile.open(scratch, len(content))
    offsets = st.integers(0, len(content))
    pairs = data.draw(st.lists(st.tuples(offsets, offsets), max_size=4))
    spans = [(min(pair), max(pair) - min(pair)) for pair in pairs]
    found = [part.tobytes() for part in file.read(*spans)]
    assert found == [content[offset : offset + length] for offset, length in spans]
    assert b"".join(bytes(piece) for piece in file.pieces()) == content


@pytest.mark.parametrize("size", [1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME])
def test_spans_at_and_across_the_edges_of_frames_are_read_back(tmp_path: Path, size: int) -> None:
    content = mixed(size)
    file = FramedFile.open(written(tmp_path / "file", content), size)
    edges = sorted({max(0, min(size, at + by)) for at in range(0, size + 1, FRAME) for by in (-1, 0, 1)})
    spans = [(start, stop - start) for start in edges for stop in edges if start <= stop]
    for (offset, length), part in zip(spans, file.read(*spans), strict=True):
        assert part.tobytes() == content[offset : offset + length]


def test_the_file_is_a_plain_zstd_file_to_everybody_else(tmp_path: Path) -> None:
    raw = written(tmp_path / "file").read_bytes()
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw), read_across_frames=True)
    assert reader.read() == CONTENT


@given(size=st.integers(1, 3 * FRAME), seed=st.integers(0, 2**32), values=st.sampled_from([1, 2, 3, 200, 256]))
@settings(max_examples=60)
def test_no_content_makes_a_file_longer_than_the_bound(scratch: Path, size: int, seed: int, values: int) -> None:
    content = np.random.default_rng(seed).integers(0, values, size, dtype=np.uint8).tobytes()
    assert written(scratch, content).stat().st_size <= largest_file(size)
    assert everything(scratch, size) == content


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1, len(CONTENT) - FRAME, len(CONTENT) + FRAME])
def test_a_writer_notices_when_it_is_handed_more_or_less_than_was_announced(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"the parts have {len(CONTENT)} bytes, not the {size}"):
        write_frames(tmp_path / "file", size, [CONTENT])


# --- what strangers send ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 19, 20, 21, 1000])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    os.truncate(written(tmp_path / "file"), kept)
    refused(tmp_path / "file", DeltaTruncated, f"The file has {kept:,} bytes")


def test_a_file_without_its_last_byte_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    os.truncate(path, path.stat().st_size - 1)
    refused(path, DeltaTruncated, "its table says")


@pytest.mark.parametrize("more", [1, 100, FRAME, 100 * MIB])
def test_an_oversized_file_is_refused(tmp_path: Path, more: int) -> None:
    path = written(tmp_path / "file")
    os.truncate(path, path.stat().st_size + more)
    refused(path, DeltaOversized, "its table says|the most that it can have")


@pytest.mark.parametrize("size", [1, len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_file_of_other_content_than_the_reader_expects_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(BytesRefused):
        everything(written(tmp_path / "file"), size)


@pytest.mark.parametrize("position", range(8))
def test_a_file_that_does_not_begin_with_the_table_s_frame_is_refused(tmp_path: Path, position: int) -> None:
    path = written(tmp_path / "file")
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(raw)
    refused(path, DeltaStreamCorrupt, "does not begin with the table")


def test_a_table_that_cuts_the_frames_elsewhere_is_refused(tmp_path: Path) -> None:
    frames = frames_of(written(tmp_path / "file"))
    for lent in (1, -1, 5):
        table = [len(frames[0]) + lent, len(frames[1]) - lent, len(frames[2])]
        refused(assembled(tmp_path / "file", frames, table), DeltaStreamCorrupt, "Frame 0 .* does not unpack")


def test_a_table_whose_lengths_are_too_large_for_any_file_is_refused(tmp_path: Path) -> None:
    frames = frames_of(written(tmp_path / "file"))
    refused(assembled(tmp_path / "file", frames, [2**32 - 1] * 3), DeltaTruncated, "its table says")


def test_frames_of_no_bytes_are_refused(tmp_path: Path) -> None:
    frames = frames_of(written(tmp_path / "file"))
    refused(assembled(tmp_path / "file", [b"", *frames[1:]]), DeltaStreamCorrupt, "Frame 0 .* does not unpack")


def test_swapped_frames_make_other_content_and_so_another_identity(tmp_path: Path) -> None:
    first, second, last = frames_of(written(tmp_path / "file"))
    assert everything(assembled(tmp_path / "file", [second, first, last])) != CONTENT
    refused(assembled(tmp_path / "file", [first, last, second]), DeltaStreamCorrupt, "Frame 2 of the file is longer")
    refused(assembled(tmp_path / "file", [last, second, first[:100]]), DeltaStreamCorrupt, "Frame 0 .* another content")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_frame_of_another_length_is_refused(tmp_path: Path, number: int) -> None:
    frames = frames_of(written(tmp_path / "file"))
    right = FRAME if number < 2 else 1000
    for size in (0, 1, right - 1, right + 1, 2 * right):
        frames[number] = zstandard.ZstdCompressor().compress(bytes(size))
        path = assembled(tmp_path / "file", frames)
        refused(path, DeltaStreamCorrupt, f"Frame {number} of the file announces another content")


def test_a_frame_that_does_not_say_how_much_it_holds_is_refused(tmp_path: Path) -> None:
    frames = frames_of(written(tmp_path / "file"))
    frames[1] = zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT[FRAME : 2 * FRAME])
    refused(assembled(tmp_path / "file", frames), DeltaStreamCorrupt, "Frame 1 of the file announces another")


def test_a_frame_with_something_behind_it_is_refused(tmp_path: Path) -> None:
    for behind in (b"\0", frames_of(written(tmp_path / "file"))[2], struct.pack("<II", 0x184D2A50, 0)):
        frames = frames_of(written(tmp_path / "file", CONTENT))
        frames[2] += behind
        path = assembled(tmp_path / "file", frames)
        with pytest.raises(DeltaStreamCorrupt, match=r"Frame 2 of the file (does not unpack|is longer)"):
            everything(path)


def test_a_frame_that_readers_skip_holds_nothing_whatever_it_announces(tmp_path: Path) -> None:
    frames = frames_of(written(tmp_path / "file"))
    frames[0] = struct.pack("<II", 0x184D2A50, FRAME) + bytes(FRAME)
    refused(assembled(tmp_path / "file", frames), DeltaStreamCorrupt, "Frame 0")


def test_a_frame_that_needs_a_dictionary_is_refused(tmp_path: Path) -> None:
    frames = frames_of(written(tmp_path / "file"))
    samples: list[bytes | bytearray | memoryview] = [mixed(4000, seed) for seed in range(100)]
    dictionary = zstandard.train_dictionary(8000, samples, dict_id=7)
    frames[0] = zstandard.ZstdCompressor(dict_data=dictionary).compress(CONTENT[:FRAME])
    assert zstandard.get_frame_parameters(frames[0]).dict_id == 7
    refused(assembled(tmp_path / "file", frames), DeltaStreamCorrupt, "Frame 0 of the file announces another")


# A zstd frame by hand: magic number, descriptor, window, content size; then blocks of one repeated byte, or of nothing.
def frame(announced: int, blocks: bytes, *, descriptor: int = 0b1000_0000, window: int = 17 << 3) -> bytes:
    return struct.pack("<IBBI", 0xFD2FB528, descriptor, window, announced) + blocks


def repeated(count: int, *, last: bool) -> bytes:
    return (count << 3 | 1 << 1 | last).to_bytes(3, "little") + b"\0"


NOTHING = bytes(3)


@contextmanager
def little_memory_and_time() -> Iterator[None]:
    """Fail if what is done takes more than a few MiB, in Python or in zstd, or more than two seconds of processor.

    What zstd takes is seen only where it exceeds all that the process ever took.
    """
    resident, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, os.times().user
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 16 * 1024
    assert os.times().user - used < 2.0


def test_a_hand_made_frame_of_the_right_length_is_read(tmp_path: Path) -> None:
    path = assembled(tmp_path / "file", [frame(FRAME, repeated(FRAME, last=True))])
    assert everything(path, FRAME) == bytes(FRAME)


@pytest.mark.parametrize(
    ("announced", "said"), [(FRAME, "does not unpack"), (2**30, "announces another"), (2**32 - 1, "announces another")]
)
def test_a_bomb_is_refused_at_the_cost_of_one_frame(tmp_path: Path, announced: int, said: str) -> None:
    bomb = frame(announced, repeated(128 * 1024, last=False) * (8 * 1024) + repeated(1, last=True))
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(frame(2**30 + 1, bomb[10:])))
    assert sum(len(part) for part in iter(lambda: reader.read(MIB), b"")) == 2**30 + 1, "it would unpack to a gigabyte"
    path = assembled(tmp_path / "file", [bomb])
    with little_memory_and_time():
        refused(path, DeltaStreamCorrupt, said, FRAME)


def test_a_frame_that_would_unpack_to_less_than_it_announces_is_refused(tmp_path: Path) -> None:
    path = assembled(tmp_path / "file", [frame(FRAME, repeated(FRAME - 1, last=True))])
    refused(path, DeltaStreamCorrupt, "does not unpack", FRAME)


@pytest.mark.parametrize("window", [17 << 3, 21 << 3, 255])
def test_a_frame_cannot_make_the_reader_set_aside_a_large_window(tmp_path: Path, window: int) -> None:
    path = assembled(tmp_path / "file", [frame(FRAME, repeated(FRAME, last=True), window=window)])
    with little_memory_and_time():
        try:
            assert everything(path, FRAME) == bytes(FRAME)
        except DeltaStreamCorrupt:
            assert window == 255


def test_a_frame_stuffed_with_blocks_of_nothing_is_refused_unread(tmp_path: Path) -> None:
    """It would be legal zstd, and its reader would hold the whole file in memory for a few bytes of content."""
    size = 400 * FRAME
    frames = [frame(FRAME, repeated(FRAME, last=True))] * 400
    frames[7] = frame(FRAME, NOTHING * (5 * MIB) + repeated(FRAME, last=True))
    path = assembled(tmp_path / "file", frames)
    assert path.stat().st_size < largest_file(size)
    with little_memory_and_time():
        refused(path, DeltaStreamCorrupt, "Frame 7 of the file is longer than any", size)


def test_the_last_frame_is_bounded_by_its_own_content(tmp_path: Path) -> None:
    size = FRAME + 10
    first = frame(FRAME, repeated(FRAME, last=True))
    for stuffing, fits in ((0, True), (20, True), (21, False), (1000, False)):
        path = assembled(tmp_path / "file", [first, frame(10, NOTHING * stuffing + repeated(10, last=True))])
        if fits:
            assert everything(path, size) == bytes(size)
        else:
            refused(path, DeltaStreamCorrupt, "Frame 1 of the file is longer", size)


def test_what_a_large_file_costs_to_open_does_not_grow_with_it(tmp_path: Path) -> None:
    size = 1 << 30
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    with little_memory_and_time():
        refused(tmp_path / "file", DeltaStreamCorrupt, "does not begin", size)
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2 * size)
    with little_memory_and_time():
        refused(tmp_path / "file", DeltaOversized, "the most that it can have", size)


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    file = FramedFile.open(written(tmp_path / "file"), len(CONTENT))
    written(tmp_path / "other", mixed(len(CONTENT), 1)).replace(tmp_path / "file")
    with pytest.raises(DeltaTruncated, match="was changed"):
        file.read((0, 10))


# --- what nobody thought of -------------------------------------------------------------------------------------


def found(path: Path, size: int) -> bytes | None:
    """What the reader says: all of the content, or None if it refuses it. It does nothing else."""
    try:
        content = everything(path, size)
    except BytesRefused:
        return None
    assert len(content) == size
    return content


@given(raw=st.binary(max_size=2000), size=st.integers(0, 3 * FRAME))
@settings(max_examples=300)
def test_random_bytes_are_refused(scratch: Path, raw: bytes, size: int) -> None:
    scratch.write_bytes(raw)
    assert found(scratch, size) is None or (size == 0 and len(raw) == PREFIX)


@given(data=st.data())
@settings(max_examples=300)
def test_random_bytes_behind_a_right_table_are_refused_or_are_content(scratch: Path, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 2 * FRAME))
    frames = [
        data.draw(
            st.binary(max_size=60)
            | st.builds(
                frame, st.just(min(FRAME, size)), st.binary(max_size=40), descriptor=st.integers(0, 255),
                window=st.integers(0, 255),
            )
        )
        for _ in range(num_frames(size))
    ]  # fmt: skip
    found(assembled(scratch, frames), size)


def test_whatever_byte_is_changed_the_reader_refuses_the_file_or_reads_as_much_as_it_must(scratch: Path) -> None:
    content = mixed(600)
    raw = written(scratch, content).read_bytes()
    refusals = 0
    for position in range(len(raw)):
        for flipped in (0x01, 0x80, 0xFF):
            changed = bytearray(raw)
            changed[position] ^= flipped
            scratch.write_bytes(changed)
            refusals += found(scratch, len(content)) is None
    # Frames have no checksum of their own: that is what the digests of file and content are for.
    assert refusals >= 3 * (PREFIX + 4)


@given(data=st.data())
@settings(max_examples=300)
def test_a_flipped_bit_of_a_file_of_several_frames_is_refused_or_stays_within_its_frame(
    scratch: Path, data: st.DataObject
) -> None:
    raw = bytearray(written(scratch).read_bytes())
    position = data.draw(st.integers(0, PREFIX + 40) | st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    scratch.write_bytes(raw)
    content = found(scratch, len(CONTENT))
    if content is not None:
        pieces = [slice(start, start + FRAME) for start in range(0, len(CONTENT), FRAME)]
        assert sum(content[piece] != CONTENT[piece] for piece in pieces) <= 1
        assert position >= PREFIX + 4 * num_frames(len(CONTENT)), "nothing of the table may be changed unnoticed"
