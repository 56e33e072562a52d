"""From the options of `data prepare` to what makes numbers of captions and pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from commonweight.data.encoders import EmbeddedEncoder, Encoder, NetworkEncoder
from mmdit.components import describe_encoders, describe_vae, encoders_in
from mmdit.conditioning import ConditioningConfig
from mmdit.config import MMDiTConfig
from mmdit.encoders import ENCODER_NAMES, Conditioning, Padding
from mmdit.space import PixelSpace, Space
from protocol.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedText:
    """What was asked for captions.

    Args:
        kind: the embedded encoder, with four bytes a token or one, or text encoders.
        max_tokens: of the embedded encoder.
        encoders: which text encoders, by name; none are all that are there.
        padding: of the text encoders.
        t5_tokens: tokens of T5.
        stored: whether shards hold what text encoders make of captions.
        source: where others get the text encoders.
    """

    kind: Literal["byte-patch", "bytes", "encoders"]
    max_tokens: int
    encoders: tuple[str, ...]
    padding: Padding
    t5_tokens: int
    stored: bool
    source: str


def conditioning_for(shape: MMDiTConfig, asked: AskedText, components: Path | None) -> Conditioning:
    """Return how captions become numbers.

    Raises:
        UsageError: networks are asked for and not named, or an encoder is not known.
        ValueError: the folder does not hold them, or they do not fit the model.
    """
    if asked.kind != "encoders":
        return ConditioningConfig(
            kind=asked.kind,
            max_tokens=asked.max_tokens,
            token_dim=shape.joint_attention_dim,
            pooled_dim=shape.pooled_projection_dim,
        )
    if components is None:
        raise UsageError("--text encoders needs the text encoders: name their folder with --components.")
    if unknown := [name for name in asked.encoders if name not in ENCODER_NAMES]:
        raise UsageError(f"--encoders names {unknown[0][:40]!r}; it must be of {', '.join(ENCODER_NAMES)}.")
    named = tuple(name for name in ENCODER_NAMES if name in asked.encoders)
    return describe_encoders(
        components,
        named or encoders_in(components),
        token_dim=shape.joint_attention_dim,
        pooled_dim=shape.pooled_projection_dim,
        padding=asked.padding,
        t5_tokens=asked.t5_tokens,
        stored=asked.stored,
        source=asked.source,
    )


def space_for(shape: MMDiTConfig, preset: str, components: Path | None) -> Space:
    """Return the space that a model paints in, of the model's own size.

    Raises:
        UsageError: it paints in latents, and there is no autoencoder for them.
        ValueError: the folder does not hold one.
    """
    side = shape.sample_size
    if shape.in_channels in (1, 3):
        return PixelSpace(channels=shape.in_channels, height=side, width=side, shift=-1.0, scale=2.0)
    if components is None:
        raise UsageError(
            f"{preset} paints in the {shape.in_channels} latent channels of an autoencoder: name its folder with "
            "--components, or choose a model that paints in pixels."
        )
    space = describe_vae(components, pixel_height=side, pixel_width=side)
    if space.channels != shape.in_channels:
        raise UsageError(
            f"{preset} paints in {shape.in_channels} latent channels, but the autoencoder in {components} has "
            f"{space.channels}."
        )
    return describe_vae(components, pixel_height=side * space.factor, pixel_width=side * space.factor)


def encoder_for(space: Space, conditioning: Conditioning, components: Path | None, device: str) -> Encoder:
    """Return what encodes pictures and captions; without networks the embedded encoder."""
    if isinstance(space, PixelSpace) and isinstance(conditioning, ConditioningConfig):
        return EmbeddedEncoder(space=space, conditioning=conditioning)
    assert components is not None  # anything else was refused
    return NetworkEncoder(components=components, space=space, conditioning=conditioning, device=device)
