"""The text encoders of Stable Diffusion 3 as a run's choice: CLIP-L, CLIP-G and T5, any of them, or others alike.

Here stands what they are; `mmdit.components` loads and runs them. The two CLIPs share the first rows of the sequence,
side by side in the columns; T5 has the rows after them; the pooled vectors of the CLIPs stand one after the other
(arXiv 2403.03206, section 4). Each is dropped by itself in training, so that a checkpoint can be used without any of
them.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, cast

from mmdit.conditioning import ConditioningConfig, TextLayout, TextPart

EncoderName = Literal["clip_l", "clip_g", "t5"]
CLIPS: Final[tuple[EncoderName, ...]] = ("clip_l", "clip_g")
ENCODER_NAMES: Final[tuple[EncoderName, ...]] = (*CLIPS, "t5")
Padding = Literal["encoder", "zeros"]
_MOST_TOKENS: Final = 4096
_WIDEST: Final = 65536
_LONGEST_SOURCE: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """One frozen text encoder.

    Args:
        name: its place in Stable Diffusion 3: "clip_l", "clip_g" or "t5".
        tokens: rows of the sequence that it has; longer captions are cut by its tokenizer.
        width: of its tokens.
        pooled: width of its pooled vector; 0 for T5.
        sha256: digest of its files (`mmdit.components.folder_digest`), tokenizer included.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    name: EncoderName
    tokens: int
    width: int
    pooled: int
    sha256: str

    def __post_init__(self) -> None:
        if self.name not in ENCODER_NAMES:
            raise ValueError(f"encoder {self.name!r} is not known; this version has {', '.join(ENCODER_NAMES)}")
        for name, least, most in (("tokens", 1, _MOST_TOKENS), ("width", 1, _WIDEST), ("pooled", 0, _WIDEST)):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{self.name}.{name} is {value!r}; it must be a whole number from {least} to {most}")
        if (self.pooled == 0) != (self.name == "t5"):
            raise ValueError(f"{self.name} has a pooled vector of {self.pooled}; the CLIPs have one, and T5 has none")
        if not isinstance(self.sha256, str) or re.fullmatch("[0-9a-f]{64}", self.sha256) is None:
            raise ValueError(f"{self.name}.sha256 is {self.sha256!r}; it must be 64 hex digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodersConfig:
    """Captions through frozen networks.

    Args:
        encoders: which, in the order of Stable Diffusion 3.
        token_dim: width of a token as the model takes it; what no encoder fills is zero.
        pooled_dim: width of the pooled vector as the model takes it.
        padding: what stands in the rows after a caption's end: "encoder", what the encoder makes of its padding, as
            `StableDiffusion3Pipeline` has it; or "zeros", so that they need not be stored or fetched.
        stored: whether the shards that are trained on hold what the encoders make of their captions. If not, they hold
            captions alone, and whoever trains runs the encoders.
        source: where others get these very networks, as whoever prepared the data says: OWNER/NAME@REVISION of a model
            hub, or an address. It is told and never followed; the digests say whether they are the ones.

    Raises:
        ValueError: the encoders do not fit into the model's widths, or stand in another order.
    """

    encoders: tuple[TextEncoder, ...]
    token_dim: int
    pooled_dim: int
    padding: Padding
    stored: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        names = [encoder.name for encoder in self.encoders]
        if not names or names != [name for name in ENCODER_NAMES if name in names]:
            raise ValueError(
                f"the encoders are {', '.join(names) or 'none'}; they must be of {', '.join(ENCODER_NAMES)}"
            )
        if self.padding not in ("encoder", "zeros"):
            raise ValueError(f'padding is {self.padding!r}; it must be "encoder" or "zeros"')
        if not isinstance(self.stored, bool):
            raise ValueError(f"stored is {self.stored!r}; it must be true or false")
        if not isinstance(self.source, str) or len(self.source) > _LONGEST_SOURCE or not self.source.isprintable():
            raise ValueError(
                f"source is {self.source!r:.80}; it must be a text of at most {_LONGEST_SOURCE} characters on one line"
            )
        for name in ("token_dim", "pooled_dim"):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _WIDEST:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {_WIDEST}")
        if len({encoder.tokens for encoder in self.encoders if encoder.name in CLIPS}) > 1:
            raise ValueError("the two CLIPs have different numbers of tokens; they stand side by side")
        for part in self.layout.parts:
            if part.column + part.width > self.token_dim or part.pooled_at + part.pooled > self.pooled_dim:
                raise ValueError(
                    f"{part.name} with tokens of {part.width} and a pooled vector of {part.pooled} does not fit into "
                    f"the model's {self.token_dim} and {self.pooled_dim}"
                )

    @property
    def max_tokens(self) -> int:
        """Rows of the sequence: those of the CLIPs, then those of T5."""
        return self.layout.rows

    @property
    def layout(self) -> TextLayout:
        """Where each encoder's numbers go."""
        parts: list[TextPart] = []
        clip_rows = max((encoder.tokens for encoder in self.encoders if encoder.name in CLIPS), default=0)
        column = pooled_at = 0
        for encoder in self.encoders:
            clip = encoder.name in CLIPS
            parts.append(
                TextPart(
                    name=encoder.name,
                    row=0 if clip else clip_rows,
                    rows=encoder.tokens,
                    column=column if clip else 0,
                    width=encoder.width,
                    pooled_at=pooled_at,
                    pooled=encoder.pooled,
                )
            )
            if clip:
                column, pooled_at = column + encoder.width, pooled_at + encoder.pooled
        rows = max(part.row + part.rows for part in parts)
        return TextLayout(parts=tuple(parts), rows=rows, token_dim=self.token_dim, pooled_dim=self.pooled_dim)


Conditioning = ConditioningConfig | EncodersConfig
"""How captions become numbers: by the embedded encoder, or by networks."""


def conditioning_to_json(conditioning: Conditioning) -> dict[str, Any]:
    """Return the object that a run config, a checkpoint and a data set's manifest carry."""
    if isinstance(conditioning, ConditioningConfig):
        return asdict(conditioning)
    values = asdict(conditioning)
    return {**values, "encoders": list(values["encoders"]), "kind": "encoders"}


def conditioning_from_json(values: Mapping[str, object]) -> Conditioning:
    """Read what `conditioning_to_json` gives.

    Raises:
        ValueError: a key is missing or unknown, or a value is out of range.
    """
    try:
        if values.get("kind") != "encoders":
            return ConditioningConfig(**cast("Any", values))
        rest = {name: value for name, value in values.items() if name not in ("kind", "encoders")}
        listed = values.get("encoders")
        if not isinstance(listed, list | tuple) or not all(isinstance(entry, Mapping) for entry in listed):
            raise ValueError("encoders must be a list of objects")
        return EncodersConfig(encoders=tuple(TextEncoder(**entry) for entry in listed), **cast("Any", rest))
    except TypeError as error:  # a key too many or too few
        raise ValueError(str(error)) from error
