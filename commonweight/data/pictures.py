"""From a picture file to pixels of a bucket: decoded, turned upright, resized and cut in the middle."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from commonweight.extras import not_installed
from mmdit.space import ByteImages

FORMATS: Final = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Others have decoders that start programs (EPS runs Ghostscript) or that hardly anybody has tried on hostile files."""
_MOST_PIXELS: Final = 256_000_000
_HASH_SIDE: Final = 8


class PictureSkipped(Exception):
    """A picture that is left out, never fatal: `reason` is one of few words, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def known_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this machine's Pillow can read."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Bucket:
    """A size that pictures are brought to, in pixels; all pictures of a shard have one."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


def buckets(side: int, *, step: int, largest: int, most_aspect: float) -> tuple[Bucket, ...]:
    """Return sizes of about `side` x `side` pixels and every shape up to an aspect ratio, as SDXL and SD3 have them.

    Args:
        side: of the square one.
        step: sides are multiples of it: the patch, in pixels.
        largest: no side is longer.
        most_aspect: 1 gives the square alone, 2 also shapes up to 2 : 1 and 1 : 2.

    Raises:
        ValueError: `side` is no multiple of `step`, or the aspect ratio is below 1.
    """
    if side % step or not 0 < side <= largest:
        raise ValueError(f"a side of {side} pixels must be a multiple of {step}, at most {largest}")
    if not 1.0 <= most_aspect <= 16.0:
        raise ValueError(f"an aspect ratio of {most_aspect} must lie between 1 and 16")
    found = {Bucket(height=side, width=side)}
    for width in range(step, largest + 1, step):
        height = side * side // width // step * step  # never more pixels than the square
        shape = max(width / height, height / width) if height else 0.0
        if 0 < height <= largest and shape <= most_aspect:
            found.add(Bucket(height=height, width=width))
    return tuple(sorted(found))


def closest(width: int, height: int, among: tuple[Bucket, ...]) -> Bucket:
    """Return the bucket that keeps most of a picture; of equal ones the first."""
    return max(among, key=lambda bucket: min(bucket.aspect / (width / height), (width / height) / bucket.aspect))


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A decoded picture, cut to its bucket: uint8 [height, width, channels], and its size before."""

    pixels: ByteImages
    bucket: Bucket
    width: int
    height: int


def decode(content: bytes, among: tuple[Bucket, ...], *, channels: int, least_side: int) -> Picture:
    """Decode a picture file and bring it to the bucket that suits it.

    Args:
        content: the file: JPEG, PNG, WebP, ...; only its first frame is used.
        among: the buckets to choose from.
        channels: 1 for grey, 3 for RGB; what is transparent becomes white.
        least_side: pictures whose shorter side has fewer pixels are skipped: enlarged ones teach blur.

    Raises:
        PictureSkipped: "corrupt" or "too small".
        PackageMissing: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise not_installed("Pictures are read with Pillow", "data") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=known_formats()) as opened:
                if opened.width * opened.height > _MOST_PIXELS:
                    raise PictureSkipped("corrupt", f"{opened.width} x {opened.height} pixels are too many")
                upright = ImageOps.exif_transpose(opened)
                flat = _flat(Image, upright, "L" if channels == 1 else "RGB")
    except PictureSkipped:
        raise
    except Exception as error:  # whatever a decoder raises over hostile bytes is about this one picture
        raise PictureSkipped("corrupt", _trouble(error)) from None
    width, height = flat.size
    if min(width, height) < least_side:
        raise PictureSkipped("too small", f"{width} x {height}")
    bucket = closest(width, height, among)
    fitted = ImageOps.fit(flat, (bucket.width, bucket.height), Image.Resampling.LANCZOS)
    pixels = np.asarray(fitted, dtype=np.uint8).reshape(bucket.height, bucket.width, channels)
    return Picture(pixels=pixels, bucket=bucket, width=width, height=height)


def _trouble(error: Exception) -> str:
    """Say what is wrong with a file, by the kind of what a decoder has raised.

    Not in its own words: they may hold addresses, and the same source must give the same report.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of a format that is not read"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "ends too early"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "too many pixels"
    return f"what is in it can't be decoded ({type(error).__name__})"


def _flat(module: Any, picture: Any, mode: str) -> Any:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = module.new("RGBA", layered.size, (255, 255, 255, 255))
        picture = module.alpha_composite(white, layered)
    return picture.convert(mode)


def pixel_digest(pixels: ByteImages) -> str:
    """Return the SHA-256 of a picture's pixels and size: equal for what looks the same to the last bit."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def look_hash(pixels: ByteImages) -> str:
    """Return 64 bits, in hex, that pictures which look nearly the same mostly share (a difference hash).

    Of a 9 x 8 grey miniature: whether each pixel is brighter than its neighbour on the left.
    """
    grey = pixels.astype(np.float32).mean(axis=2)
    rows, columns = (_cells(size, count) for size, count in zip(grey.shape, (_HASH_SIDE, _HASH_SIDE + 1), strict=True))
    small = np.array([[grey[top:bottom, left:right].mean() for left, right in columns] for top, bottom in rows])
    bits: npt.NDArray[np.uint8] = np.packbits(small[:, 1:] > small[:, :-1] + 1e-3)
    return bits.tobytes().hex()


def _cells(size: int, count: int) -> list[tuple[int, int]]:
    """Cut `size` pixels into `count` cells of at least one pixel, which overlap if there are too few."""
    return [(start := i * size // count, max(start + 1, (i + 1) * size // count)) for i in range(count)]
