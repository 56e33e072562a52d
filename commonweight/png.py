"""Writing a PNG file. About thirty lines instead of a dependency, since writing is all that the base install needs."""

import struct
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from mmdit.space import ByteImages

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2
_COLOUR_TYPES: Final = {1: _GREY, 3: _RGB}


def png_bytes(picture_HWC: ByteImages, texts: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Return a picture [height, width, 1 or 3], uint8, as the bytes of a PNG file (ISO/IEC 15948).

    Args:
        picture_HWC: the pixels.
        texts: what the file says about itself, by keyword (ASCII, 1 to 79 characters).

    Raises:
        ValueError: another shape or dtype.
    """
    if picture_HWC.ndim != 3 or picture_HWC.shape[2] not in _COLOUR_TYPES or picture_HWC.dtype != np.uint8:
        raise ValueError(f"a PNG holds uint8 [height, width, 1 or 3], not {picture_HWC.dtype} {picture_HWC.shape}")
    height, width, channels = picture_HWC.shape
    # Each row starts with its filter; 0 is none.
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    rows[:, 1:] = picture_HWC.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 9)
    said = b"".join(_chunk(b"iTXt", _text(keyword, text)) for keyword, text in texts.items())
    return _SIGNATURE + _chunk(b"IHDR", header) + said + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _text(keyword: str, text: str) -> bytes:
    """Keyword, not compressed, no language, no translated keyword, text."""
    return keyword.encode("ascii") + b"\0\0\0\0\0" + text.replace("\0", "").encode("utf-8")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
