"""What turns pictures and captions into the numbers of a shard. One process makes one of these and uses it for all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from commonweight.data.pictures import Bucket
from diloco.shards import Halves
from mmdit.conditioning import ConditioningConfig, encode_caption
from mmdit.space import ByteImages, PixelSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Some pictures with their captions, fp16: latents [N, C, H, W], texts [L, D] each, pooled [N, P]."""

    latents: Halves
    texts: list[Halves]
    pooled: Halves


class Encoder(Protocol):
    """Pictures and captions in, numbers out; the same numbers each time."""

    @property
    def channels(self) -> int:
        """Colour channels of the pictures that it wants: 1 or 3."""
        ...

    def sample_bytes(self, caption: str, bucket: Bucket) -> int:
        """Return what one sample takes in a shard."""
        ...

    def encode(self, pictures_NHWC: ByteImages, captions: Sequence[str]) -> Encoded:
        """Encode pictures of one bucket."""
        ...

    def described(self) -> dict[str, Any]:
        """Return what a manifest says of it: kinds, sizes, and the digests of the weights of any networks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedEncoder:
    """Pixels as they are and captions as bytes: nothing to download, and the same bits on every machine."""

    space: PixelSpace
    conditioning: ConditioningConfig

    @property
    def channels(self) -> int:
        """Colour channels of its pixel space."""
        return self.space.channels

    def sample_bytes(self, caption: str, bucket: Bucket) -> int:
        """Pixels and text in fp16, and an offset."""
        tokens = min(-(-len(caption.encode()) // self.conditioning.bytes_a_token), self.conditioning.max_tokens)
        pixels = bucket.height * bucket.width * self.space.channels
        return 2 * (pixels + tokens * self.conditioning.token_dim + self.conditioning.pooled_dim) + 8

    def encode(self, pictures_NHWC: ByteImages, captions: Sequence[str]) -> Encoded:
        """Move pixels into the space; make tokens of bytes."""
        sized = replace(self.space, height=pictures_NHWC.shape[1], width=pictures_NHWC.shape[2])
        pairs = [encode_caption(caption, self.conditioning) for caption in captions]
        return Encoded(
            latents=sized.encode(pictures_NHWC).astype(np.float16),
            texts=[tokens for tokens, _ in pairs],
            pooled=np.stack([pooled for _, pooled in pairs]),
        )

    def described(self) -> dict[str, Any]:
        """The space and the conditioning, as a run config has them."""
        return {"space": {"kind": "pixel", **asdict(self.space)}, "conditioning": asdict(self.conditioning)}
