"""What volunteers will fetch for each picture, by what a data set could say of its captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mmdit.encoders import CLIPS, EncodersConfig, TextEncoder
from mmdit.space import Space

_NO_DIGEST: Final = "0" * 64
STABLE_DIFFUSION_3: Final = (
    TextEncoder(name="clip_l", tokens=77, width=768, pooled=768, sha256=_NO_DIGEST),
    TextEncoder(name="clip_g", tokens=77, width=1280, pooled=1280, sha256=_NO_DIGEST),
    TextEncoder(name="t5", tokens=77, width=4096, pooled=0, sha256=_NO_DIGEST),
)
"""Stable Diffusion 3's text encoders, for comparison where a data set has none of its own."""
_CHARACTERS_A_TOKEN: Final = 4
_START_AND_END: Final = 2
_HALF: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to give volunteers captions, and the bytes of a picture with it.

    Args:
        name: for people.
        options: of `data prepare` that ask for it.
        picture_bytes: latent and text of one.
        own: whether the data set was prepared so.
    """

    name: str
    options: str
    picture_bytes: int
    own: bool


def choices(space: Space, conditioning: EncodersConfig | None, caption_characters: float) -> Sequence[Choice]:
    """Return what a picture takes in a shard for each choice; the latent and the caption are in all of them.

    Args:
        space: of the latents.
        conditioning: the data set's own encoders; None compares with those of Stable Diffusion 3.
        caption_characters: of a typical caption; a token of the encoders is about four of them.
    """
    encoders = STABLE_DIFFUSION_3 if conditioning is None else conditioning.encoders
    base = _HALF * space.height * space.width * space.channels + round(caption_characters)
    tokens = round(caption_characters / _CHARACTERS_A_TOKEN) + _START_AND_END
    found = [
        Choice(
            name="captions, for encoders where training is",
            options="--text encoders --captions-only" + (", or none" if conditioning is None else ""),
            picture_bytes=base,
            own=conditioning is None or not conditioning.stored,  # the embedded encoder reads captions too
        )
    ]
    clips = [encoder for encoder in encoders if encoder.name in CLIPS]
    own = None if conditioning is None or not conditioning.stored else conditioning.padding
    for name, heard in (("text of the CLIPs", clips), ("text of all encoders", encoders)):
        if not heard or (heard is not clips and len(clips) == len(encoders)):
            continue
        whole = len(heard) == len(encoders)
        options = "--text encoders" + (
            "" if heard is encoders else f" --encoders {','.join(one.name for one in heard)}"
        )
        found.append(
            Choice(
                name=name,
                options=options,
                picture_bytes=base + sum(text_bytes(one, one.tokens) for one in heard),
                own=whole and own == "encoder",
            )
        )
        found.append(
            Choice(
                name=f"{name}, without padding, about",
                options=f"{options} --padding zeros",
                picture_bytes=base + sum(text_bytes(one, min(tokens, one.tokens)) for one in heard),
                own=whole and own == "zeros",
            )
        )
    return found


def text_bytes(encoder: TextEncoder, tokens: int) -> int:
    """Return what an encoder's text of so many tokens takes in a shard."""
    return _HALF * (tokens * encoder.width + encoder.pooled)
