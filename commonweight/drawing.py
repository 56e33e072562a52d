"""Pictures from a checkpoint: captions and a seed in, pixels out. A seed gives the same starting noise anywhere."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diloco.streams import Stream
from mmdit.components import Autoencoder, TextEncoders, load_encoders, load_vae
from mmdit.conditioning import ConditioningConfig, encode
from mmdit.encoders import Conditioning, EncodersConfig, TextEncoder
from mmdit.export import Loaded
from mmdit.flow import VelocityModel, shift_for
from mmdit.network_files import ComponentsMissing
from mmdit.sample import Guidance, Start, Text, sample
from mmdit.space import ByteImages, FloatImages, PixelSpace, Space, VaeSpace
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
        without: text encoders that are not to be heard, by name.
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
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """The frozen networks that a checkpoint may need beside its own weights."""

    encoders: TextEncoders | None = None
    autoencoder: Autoencoder | None = None


def load_networks(
    checkpoint: Loaded, components: Path | None, device: str, *, without: Collection[str] = ()
) -> Networks:
    """Load what a checkpoint needs to draw.

    Args:
        checkpoint: read already.
        components: a folder as `StableDiffusion3Pipeline` has it.
        device: where they are to run.
        without: text encoders that are not to be heard, and need not be there.

    Raises:
        ComponentsMissing: something is not there.
    """
    conditioning, space = checkpoint.conditioning, checkpoint.space
    by_network, latent = isinstance(conditioning, EncodersConfig), isinstance(space, VaeSpace)
    if (by_network or latent) and components is None:
        needed = [*(encoder.name for encoder in _encoders_of(conditioning)), *(["an autoencoder"] if latent else [])]
        raise ComponentsMissing(
            f"the checkpoint draws with networks of others ({', '.join(needed)}); name their folder with --components"
        )
    encoders = autoencoder = None
    if isinstance(conditioning, EncodersConfig) and components is not None:
        encoders = load_encoders(components, conditioning, device, without=without)
    if isinstance(space, VaeSpace) and components is not None:
        autoencoder = load_vae(components, space, device)
    return Networks(encoders=encoders, autoencoder=autoencoder)


def _encoders_of(conditioning: Conditioning) -> tuple[TextEncoder, ...]:
    return conditioning.encoders if isinstance(conditioning, EncodersConfig) else ()


def draw(
    checkpoint: Loaded,
    captions: Sequence[str],
    drawing: Drawing,
    *,
    guide: Loaded | None = None,
    networks: Networks | None = None,
    device: str = "cpu",
) -> ByteImages:
    """Return one picture for each caption: uint8 [N, height, width, channels].

    Args:
        checkpoint: read by `mmdit.export.load_checkpoint` onto `device`.
        captions: what to draw.
        drawing: how.
        guide: an older checkpoint of the same run, on the same device, to lead away from instead of from no caption.
        networks: what the checkpoint needs beside its weights; of `load_networks`.
        device: where the model is.

    Raises:
        CheckpointCorrupt: what comes out is no picture: its weights hold NaN or infinities, or lead to them.
        ValueError: a caption is no Unicode text, or the pictures have a size that the model can't draw.
    """
    networks = networks or Networks()
    space = _sized(checkpoint, drawing)
    shift = shift_for(checkpoint.shift, checkpoint.config.sample_size, space.height, space.width)
    shape = (space.channels, space.height, space.width)
    stream = Stream(hashlib.sha256(b"commonweight/draw/v1\0%d" % drawing.seed).digest(), "noise")
    pictures = []
    for first in range(0, len(captions), drawing.batch):
        part = captions[first : first + drawing.batch]
        noise = np.stack([stream.normal(0, first + i, int(np.prod(shape))).reshape(shape) for i in range(len(part))])
        latents = sample(
            checkpoint.model,
            _text(checkpoint, part, networks, drawing, device),
            torch.from_numpy(noise).to(device),
            steps=drawing.steps,
            shift=shift,
            guidance=drawing.guidance,
            avoid=_text(checkpoint, [drawing.avoid] * len(part), networks, drawing, device) if drawing.avoid else None,
            guide=_model(guide),
            start=_start(space, networks, drawing, len(part), device),
        )
        drawn = latents.cpu().numpy()
        if not np.isfinite(drawn).all():
            raise CheckpointCorrupt(
                "The checkpoint draws numbers that are not finite (NaN or infinity): its weights are damaged, or its "
                "training has diverged. Fetch it again, or take an older one."
            )
        pictures.append(_decoded(space, networks, drawn))
    return np.concatenate(pictures)


def _model(guide: Loaded | None) -> VelocityModel | None:
    return None if guide is None else guide.model


def _sized(checkpoint: Loaded, drawing: Drawing) -> Space:
    """Return the space of the wanted size; raise ValueError if the model can't draw it."""
    space, config = checkpoint.space, checkpoint.config
    height, width = drawing.height or space.pixel_height, drawing.width or space.pixel_width
    step, largest = config.patch_size * space.factor, config.pos_embed_max_size * config.patch_size * space.factor
    for name, side in (("height", height), ("width", width)):
        if side % step or side > largest:
            raise ValueError(
                f"a {name} of {side} can't be drawn by this model: it must be a multiple of {step}, at most {largest}"
            )
    return replace(space, height=height // space.factor, width=width // space.factor)


def _decoded(space: Space, networks: Networks, latents: FloatImages) -> ByteImages:
    if isinstance(space, PixelSpace):
        return space.decode(latents)
    if networks.autoencoder is None:
        raise ValueError("the checkpoint paints in the latents of an autoencoder, which is not there")
    return networks.autoencoder.decode(latents)


def _text(checkpoint: Loaded, captions: Sequence[str], networks: Networks, drawing: Drawing, device: str) -> Text:
    conditioning = checkpoint.conditioning
    if isinstance(conditioning, ConditioningConfig):
        if drawing.without:
            raise ValueError("the checkpoint has one text encoder, its own; there is none to leave out")
        tokens, pooled = (array.astype(np.float32) for array in encode(captions, conditioning))
    elif networks.encoders is None:
        raise ValueError("the checkpoint hears captions through text encoders, which are not there")
    else:
        known = [part.name for part in conditioning.layout.parts]
        if unknown := sorted(set(drawing.without) - set(known)):
            raise ValueError(f"{unknown[0]!r} is none of the checkpoint's text encoders, {', '.join(known)}")
        tokens, pooled = conditioning.layout.assemble(networks.encoders.encode(captions))
    return Text(tokens=torch.from_numpy(tokens).to(device), pooled=torch.from_numpy(pooled).to(device))


def _start(space: Space, networks: Networks, drawing: Drawing, count: int, device: str) -> Start | None:
    if drawing.init is None:
        return None
    if isinstance(space, PixelSpace):
        encoded = space.encode(drawing.init[None])
    elif networks.autoencoder is None:
        raise ValueError("the checkpoint paints in the latents of an autoencoder, which is not there")
    else:
        encoded = networks.autoencoder.encode(drawing.init[None])
    latent = torch.from_numpy(encoded).to(device)
    return Start(latent=latent.expand(count, -1, -1, -1), strength=drawing.strength)
