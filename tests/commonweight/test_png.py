import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from commonweight.png import png_bytes


def _chunks(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    position = 8
    while position < len(raw):
        (length,) = struct.unpack_from(">I", raw, position)
        kind, data = raw[position + 4 : position + 8], raw[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", raw, position + 8 + length)
        assert checksum == zlib.crc32(kind + data)
        yield kind, data
        position += 12 + length


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (3, 2)])
def test_a_png_holds_the_picture(channels: int, colour_type: int) -> None:
    picture = np.arange(5 * 7 * channels, dtype=np.uint8).reshape(5, 7, channels)
    chunks = list(_chunks(png_bytes(picture)))
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[0][1]) == (7, 5, 8, colour_type, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[1][1]), dtype=np.uint8).reshape(5, 1 + 7 * channels)
    assert not rows[:, 0].any()
    assert np.array_equal(rows[:, 1:].reshape(picture.shape), picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_another_reader_sees_the_same_pixels(channels: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow comes with the demo extra")
    picture = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (9, 4, channels), dtype=np.uint8)
    path = tmp_path_factory.mktemp("png") / "picture.png"
    path.write_bytes(png_bytes(picture))
    with image.open(path) as opened:
        assert np.array_equal(np.asarray(opened).reshape(picture.shape), picture)


@pytest.mark.parametrize(
    "picture",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 1), np.float32)],
)
def test_what_a_png_cannot_hold_is_refused(picture: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> None:
    with pytest.raises(ValueError, match="a PNG holds uint8"):
        png_bytes(picture)


def test_what_a_file_says_about_itself_comes_before_its_pixels_in_any_alphabet() -> None:
    raw = png_bytes(np.zeros((1, 1, 1), dtype=np.uint8), {"parameters": "eine Sieben — 七\0\nSteps: 3"})
    chunks = list(_chunks(raw))
    assert [kind for kind, _ in chunks] == [b"IHDR", b"iTXt", b"IDAT", b"IEND"]
    assert chunks[1][1] == b"parameters\0\0\0\0\0" + "eine Sieben — 七\nSteps: 3".encode()
