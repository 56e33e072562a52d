"""The space that the model paints in. Pixel space is the embedded one: small pictures, no autoencoder to download."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

FloatImages = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
ByteImages = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

_LARGEST_SIDE: Final = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelSpace:
    """Latents are pixels, moved and scaled: latent = pixel * scale + shift with pixel in 0..1.

    Args:
        channels: 1 for grey, 3 for RGB.
        height: rows of a picture.
        width: columns of a picture.
        shift: added after scaling; -1 with scale 2 puts pixels into -1..1.
        scale: not zero.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    channels: int
    height: int
    width: int
    shift: float
    scale: float

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width"):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_SIDE:
                raise ValueError(f"{name} is {value!r}; it must be a whole number between 1 and {_LARGEST_SIDE}")
        for name in ("shift", "scale"):
            number: object = getattr(self, name)
            if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"{name} is {number!r}; it must be a finite number")
        if self.scale == 0:
            raise ValueError("scale is 0; every picture would become the same latent")

    def encode(self, images_BHWC: ByteImages | FloatImages) -> FloatImages:
        """Pictures [B, H, W, C], bytes or floats in 0..1, to latents [B, C, H, W] in fp32.

        Raises:
            ValueError: another shape or dtype, or floats outside 0..1.
        """
        if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != (self.height, self.width, self.channels):
            raise ValueError(
                f"pictures of shape {images_BHWC.shape[1:]} do not fit: this space holds height x width x channels = "
                f"{self.height} x {self.width} x {self.channels}"
            )
        if images_BHWC.dtype == np.uint8:
            pixels = images_BHWC.astype(np.float32) / np.float32(255)
        elif images_BHWC.dtype == np.float32:
            pixels = images_BHWC.astype(np.float32)
            if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
                raise ValueError(f"pixels run from {pixels.min()} to {pixels.max()}; floats must lie in 0..1")
        else:
            raise ValueError(f"pictures are {images_BHWC.dtype}; they must be uint8, or float32 in 0..1")
        latents_BHWC = pixels * np.float32(self.scale) + np.float32(self.shift)
        return np.ascontiguousarray(latents_BHWC.transpose(0, 3, 1, 2))

    def decode(self, latents_BCHW: FloatImages) -> ByteImages:
        """Latents [B, C, H, W] to pictures [B, H, W, C], clipped to 0..255.

        Raises:
            ValueError: the channels differ.
        """
        if latents_BCHW.ndim != 4 or latents_BCHW.shape[1] != self.channels:
            raise ValueError(f"latents of shape {latents_BCHW.shape} do not have this space's {self.channels} channels")
        pixels = (latents_BCHW.astype(np.float32) - np.float32(self.shift)) / np.float32(self.scale)
        bytes_BCHW = np.rint(np.clip(pixels, 0, 1) * np.float32(255)).astype(np.uint8)
        return np.ascontiguousarray(bytes_BCHW.transpose(0, 2, 3, 1))
