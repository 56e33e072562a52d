"""What turns pictures and captions into the numbers of a shard. One process makes one of these and uses it for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from commonweight.data.fetched import text_bytes
from commonweight.data.pictures import Bucket
from diloco.shards import Halves
from mmdit.components import Autoencoder, TextEncoders, load_encoders, load_vae
from mmdit.conditioning import ConditioningConfig, Encoded
from mmdit.encoders import Conditioning, EncodersConfig, conditioning_to_json
from mmdit.space import ByteImages, PixelSpace, Space, VaeSpace, space_to_json


class Encoder(Protocol):
    """Pictures and captions in, numbers out; the same numbers each time."""

    @property
    def channels(self) -> int:
        """Colour channels of the pictures that it wants: 1 or 3."""
        ...

    def sample_bytes(self, caption: str, bucket: Bucket) -> int:
        """Return what one sample takes in a shard, about."""
        ...

    def latents(self, pictures_NHWC: ByteImages) -> Halves:
        """Encode pictures of one bucket: fp16 [N, C, H, W]."""
        ...

    @property
    def captions_only(self) -> bool:
        """Whether shards that are trained on hold captions alone; the held-out one has `texts` all the same."""
        ...

    def texts(self, captions: Sequence[str]) -> Mapping[str, Sequence[Encoded]]:
        """Encode captions; one more text, of the empty caption, stands at the end of each encoder's. Empty: none is."""
        ...

    def described(self) -> dict[str, Any]:
        """Return what a manifest says of it: kinds, sizes, and the digests of the weights of any networks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedEncoder:
    """Pixels as they are, and captions as they are: who trains makes tokens of their bytes.

    Nothing to download, and the same bits on every machine.
    """

    space: PixelSpace
    conditioning: ConditioningConfig

    @property
    def channels(self) -> int:
        """Colour channels of its pixel space."""
        return self.space.channels

    def sample_bytes(self, caption: str, bucket: Bucket) -> int:
        """Pixels in fp16, the caption, and an offset."""
        return 2 * bucket.height * bucket.width * self.space.channels + len(caption.encode()) + 8

    def latents(self, pictures_NHWC: ByteImages) -> Halves:
        """Move pixels into the space."""
        return _pixel_latents(self.space, pictures_NHWC)

    @property
    def captions_only(self) -> bool:
        """They do."""
        return True

    def texts(self, captions: Sequence[str]) -> Mapping[str, Sequence[Encoded]]:  # noqa: ARG002  they stay captions
        """None: captions are enough."""
        return {}

    def described(self) -> dict[str, Any]:
        """The space and the conditioning, as a run config has them."""
        return {"space": space_to_json(self.space), "conditioning": conditioning_to_json(self.conditioning)}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkEncoder:
    """Pictures through an autoencoder, captions through text encoders; either may be the embedded one instead.

    Args:
        components: the folder of the networks.
        space: of an autoencoder, or pixels.
        conditioning: of text encoders, or the embedded one.
        device: where they run.
    """

    components: Path
    space: Space
    conditioning: Conditioning
    device: str = field(default="cpu")

    @property
    def channels(self) -> int:
        """Colour channels of the pictures."""
        return self.space.pixel_channels

    def sample_bytes(self, caption: str, bucket: Bucket) -> int:
        """Latents in fp16, the caption, and the text of each encoder, as if it filled all its rows."""
        latent = bucket.height * bucket.width // self.space.factor**2 * self.space.channels
        conditioning = self.conditioning
        networks = () if isinstance(conditioning, ConditioningConfig) or self.captions_only else conditioning.encoders
        return 2 * latent + sum(text_bytes(one, one.tokens) for one in networks) + len(caption.encode()) + 8

    def latents(self, pictures_NHWC: ByteImages) -> Halves:
        """Encode pictures."""
        if isinstance(self.space, PixelSpace):
            return _pixel_latents(self.space, pictures_NHWC)
        return _autoencoder(self.components, self.space, self.device).encode(pictures_NHWC).astype(np.float16)

    @property
    def captions_only(self) -> bool:
        """If captions are embedded, or heard where training is."""
        return not (isinstance(self.conditioning, EncodersConfig) and self.conditioning.stored)

    def texts(self, captions: Sequence[str]) -> Mapping[str, Sequence[Encoded]]:
        """Encode captions, and the empty one after them."""
        if isinstance(self.conditioning, ConditioningConfig):
            return {}
        encoded = _encoders(self.components, self.conditioning, self.device).encode([*captions, ""])
        columns: dict[str, list[Encoded]] = {}
        for number, encoder in enumerate(self.conditioning.encoders):
            texts = [texts[number] for texts in encoded]
            columns[encoder.name] = [text for text in texts if text is not None]
        return columns

    def described(self) -> dict[str, Any]:
        """The space and the conditioning, as a run config has them."""
        return {"space": space_to_json(self.space), "conditioning": conditioning_to_json(self.conditioning)}


def _pixel_latents(space: PixelSpace, pictures_NHWC: ByteImages) -> Halves:
    sized = replace(space, height=pictures_NHWC.shape[1], width=pictures_NHWC.shape[2])
    return sized.encode(pictures_NHWC).astype(np.float16)


# A process that prepares loads each network once; they don't travel with the recipe.
@cache
def _encoders(components: Path, conditioning: EncodersConfig, device: str) -> TextEncoders:
    return load_encoders(components, conditioning, device)


@cache
def _autoencoder(components: Path, space: VaeSpace, device: str) -> Autoencoder:
    return load_vae(components, space, device)
