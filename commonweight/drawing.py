"""Pictures from a checkpoint: captions and a seed in, pixels out. A seed gives the same starting noise anywhere."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from diloco.streams import Stream
from mmdit.conditioning import encode
from mmdit.export import Loaded
from mmdit.sample import sample
from mmdit.space import ByteImages
from protocol.errors import CheckpointCorrupt

STEPS = 30
GUIDANCE = 3.0
BATCH = 50


def draw(
    checkpoint: Loaded,
    captions: Sequence[str],
    *,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    device: str = "cpu",
) -> ByteImages:
    """Return one picture for each caption: uint8 [N, height, width, channels].

    Args:
        checkpoint: read by `mmdit.export.load_checkpoint` onto `device`.
        captions: what to draw; picture i starts from the i-th noise of the seed.
        seed: any whole number.
        steps: Euler steps.
        guidance: how much the caption is exaggerated; 1 is not at all.
        device: where the model is.

    Raises:
        CheckpointCorrupt: what comes out is no picture: its weights hold NaN or infinities, or lead to them.
        ValueError: a caption is no Unicode text.
    """
    space = checkpoint.space
    shape = (space.channels, space.height, space.width)
    stream = Stream(hashlib.sha256(b"commonweight/draw/v1\0%d" % seed).digest(), "noise")
    pictures = []
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        text, pooled = encode(part, checkpoint.conditioning)
        noise = np.stack([stream.normal(0, start + i, int(np.prod(shape))).reshape(shape) for i in range(len(part))])
        latents = sample(
            checkpoint.model,
            torch.from_numpy(text.astype(np.float32)).to(device),
            torch.from_numpy(pooled.astype(np.float32)).to(device),
            torch.from_numpy(noise).to(device),
            steps=steps,
            guidance=guidance,
            shift=checkpoint.shift,
        )
        drawn = latents.cpu().numpy()
        if not np.isfinite(drawn).all():
            raise CheckpointCorrupt(
                "The checkpoint draws numbers that are not finite (NaN or infinity): its weights are damaged, or its "
                "training has diverged. Fetch it again, or take an older one."
            )
        pictures.append(space.decode(drawn))
    return np.concatenate(pictures)
