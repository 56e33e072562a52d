"""The space that the model paints in: pixels, or the latents of an autoencoder.

Pixel space is the embedded one: small pictures, no autoencoder to download.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

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
            _check_count(name, getattr(self, name))
        for name in ("shift", "scale"):
            _check_number(name, getattr(self, name))
        if self.scale == 0:
            raise ValueError("scale is 0; every picture would become the same latent")

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent pixel."""
        return 1

    @property
    def pixel_channels(self) -> int:
        """Channels of a picture."""
        return self.channels

    @property
    def pixel_height(self) -> int:
        """Rows of a picture."""
        return self.height

    @property
    def pixel_width(self) -> int:
        """Columns of a picture."""
        return self.width

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


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSpace:
    """Latents are those of an autoencoder (diffusers' `AutoencoderKL`): (encoded - shift) * scale, its mean.

    Args:
        channels: of the latents.
        height, width: of the latents that the model was made for.
        factor: pixels along a side of one latent pixel.
        pixel_channels: 1 for grey pictures, 3 for RGB.
        shift, scale: as `shift_factor` and `scaling_factor` stand in the autoencoder's config.json.
        sha256: digest of its files (`mmdit.components.folder_digest`).

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    channels: int
    height: int
    width: int
    factor: int
    pixel_channels: int
    shift: float
    scale: float
    sha256: str

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width", "factor"):
            _check_count(name, getattr(self, name))
        for name in ("shift", "scale"):
            _check_number(name, getattr(self, name))
        if self.scale == 0:
            raise ValueError("scale is 0; every picture would become the same latent")
        if self.pixel_channels not in (1, 3):
            raise ValueError(f"pixel_channels is {self.pixel_channels!r}; it must be 1 or 3")
        if not isinstance(self.sha256, str) or re.fullmatch("[0-9a-f]{64}", self.sha256) is None:
            raise ValueError(f"sha256 is {self.sha256!r}; it must be 64 hex digits")

    @property
    def pixel_height(self) -> int:
        """Rows of a picture."""
        return self.height * self.factor

    @property
    def pixel_width(self) -> int:
        """Columns of a picture."""
        return self.width * self.factor


Space = PixelSpace | VaeSpace
_KINDS: Final[Mapping[str, type[PixelSpace] | type[VaeSpace]]] = {"pixel": PixelSpace, "vae": VaeSpace}


def space_to_json(space: Space) -> dict[str, Any]:
    """Return the object that a run config, a checkpoint and a data set's manifest carry."""
    return {"kind": "pixel" if isinstance(space, PixelSpace) else "vae", **asdict(space)}


def space_from_json(values: Mapping[str, object]) -> Space:
    """Read what `space_to_json` gives.

    Raises:
        ValueError: the kind is unknown, a key is missing or unknown, or a value is out of range.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        known = " and ".join(f'"{name}"' for name in _KINDS)
        raise ValueError(f"space kind is {kind!r}, this version knows {known}")
    rest = {name: value for name, value in values.items() if name != "kind"}
    try:
        return _KINDS[kind](**cast("Any", rest))
    except TypeError as error:  # a key too many or too few
        raise ValueError(str(error)) from error


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_SIDE:
        raise ValueError(f"{name} is {value!r}; it must be a whole number between 1 and {_LARGEST_SIDE}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
