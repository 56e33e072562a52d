"""Pictures from a checkpoint: captions and a seed in, pixels out. A seed gives the same starting noise anywhere."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diloco.streams import Stream
from mmdit.conditioning import encode
from mmdit.export import Loaded
from mmdit.flow import VelocityModel
from mmdit.sample import Guidance, Start, Text, sample
from mmdit.space import ByteImages, PixelSpace
from protocol.errors import CheckpointCorrupt

STEPS = 30
GUIDANCE = Guidance(scale=3.0)
BATCH = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How pictures are drawn.

    Args:
        seed: any whole number; picture i starts from the i-th noise of the seed.
        steps: Euler steps.
        guidance: how much the caption is exaggerated, and when.
        avoid: a caption to lead away from; none is no caption.
        height, width: of the pictures in pixels; None is what the checkpoint was made for.
        init: a picture to start from, uint8 [height, width, channels].
        strength: how much of the way to noise `init` is taken back.
        batch: pictures drawn at once.
    """

    seed: int = 0
    steps: int = STEPS
    guidance: Guidance = GUIDANCE
    avoid: str = ""
    height: int | None = None
    width: int | None = None
    init: ByteImages | None = None
    strength: float = 0.6
    batch: int = BATCH


def draw(
    checkpoint: Loaded,
    captions: Sequence[str],
    drawing: Drawing,
    *,
    guide: Loaded | None = None,
    device: str = "cpu",
) -> ByteImages:
    """Return one picture for each caption: uint8 [N, height, width, channels].

    Args:
        checkpoint: read by `mmdit.export.load_checkpoint` onto `device`.
        captions: what to draw.
        drawing: how.
        guide: an older checkpoint of the same run, on the same device, to lead away from instead of from no caption.
        device: where the model is.

    Raises:
        CheckpointCorrupt: what comes out is no picture: its weights hold NaN or infinities, or lead to them.
        ValueError: a caption is no Unicode text, or the pictures have a size that the model can't draw.
    """
    space = _sized(checkpoint, drawing)
    shape = (space.channels, space.height, space.width)
    stream = Stream(hashlib.sha256(b"commonweight/draw/v1\0%d" % drawing.seed).digest(), "noise")
    pictures = []
    for first in range(0, len(captions), drawing.batch):
        part = captions[first : first + drawing.batch]
        noise = np.stack([stream.normal(0, first + i, int(np.prod(shape))).reshape(shape) for i in range(len(part))])
        latents = sample(
            checkpoint.model,
            _text(checkpoint, part, device),
            torch.from_numpy(noise).to(device),
            steps=drawing.steps,
            shift=checkpoint.shift,
            guidance=drawing.guidance,
            avoid=_text(checkpoint, [drawing.avoid] * len(part), device) if drawing.avoid else None,
            guide=_model(guide),
            start=_start(space, drawing, len(part), device),
        )
        drawn = latents.cpu().numpy()
        if not np.isfinite(drawn).all():
            raise CheckpointCorrupt(
                "The checkpoint draws numbers that are not finite (NaN or infinity): its weights are damaged, or its "
                "training has diverged. Fetch it again, or take an older one."
            )
        pictures.append(space.decode(drawn))
    return np.concatenate(pictures)


def _model(guide: Loaded | None) -> VelocityModel | None:
    return None if guide is None else guide.model


def _sized(checkpoint: Loaded, drawing: Drawing) -> PixelSpace:
    """Return the space of the wanted size; raise ValueError if the model can't draw it."""
    space, config = checkpoint.space, checkpoint.config
    sized = replace(space, height=drawing.height or space.height, width=drawing.width or space.width)
    largest = config.pos_embed_max_size * config.patch_size
    for name, side in (("height", sized.height), ("width", sized.width)):
        if side % config.patch_size or side > largest:
            raise ValueError(
                f"a {name} of {side} can't be drawn by this model: it must be a multiple of {config.patch_size}, "
                f"at most {largest}"
            )
    return sized


def _text(checkpoint: Loaded, captions: Sequence[str], device: str) -> Text:
    tokens, pooled = encode(captions, checkpoint.conditioning)
    return Text(
        tokens=torch.from_numpy(tokens.astype(np.float32)).to(device),
        pooled=torch.from_numpy(pooled.astype(np.float32)).to(device),
    )


def _start(space: PixelSpace, drawing: Drawing, count: int, device: str) -> Start | None:
    if drawing.init is None:
        return None
    latent = torch.from_numpy(space.encode(drawing.init[None])).to(device)
    return Start(latent=latent.expand(count, -1, -1, -1), strength=drawing.strength)
