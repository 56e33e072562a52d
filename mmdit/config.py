"""The shape of one MMDiT, in the words of `diffusers.SD3Transformer2DModel`'s config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final, Literal, cast

DIFFUSERS_CLASS: Final = "SD3Transformer2DModel"

QkNorm = Literal["rms_norm"] | None

# A checkpoint's config.json comes from the network, and a model is built from it before any weight is read. These are
# far above any model of this family, and low enough that building one from a hostile file ends quickly.
_LARGEST: Final[Mapping[str, int]] = {
    "sample_size": 4096,
    "patch_size": 64,
    "in_channels": 1024,
    "out_channels": 1024,
    "num_layers": 128,
    "attention_head_dim": 512,
    "num_attention_heads": 128,
    "joint_attention_dim": 65536,
    "caption_projection_dim": 65536,
    "pooled_projection_dim": 65536,
    "pos_embed_max_size": 1024,
}
# config.json files of Stable Diffusion 3 medium are older than these two keys; their absence has one meaning.
_ABSENT: Final[Mapping[str, object]] = {"dual_attention_layers": (), "qk_norm": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class MMDiTConfig:
    """Everything that fixes the names and shapes of a transformer's weights, and what it computes.

    Args:
        sample_size: side of the latent the model is made for, in latent pixels; sets the scale of the position table.
        patch_size: side of a patch in latent pixels; one patch is one token.
        in_channels: channels of the latent that comes in.
        out_channels: channels of the velocity that goes out.
        num_layers: joint blocks; the last one updates only the image stream.
        attention_head_dim: width of one attention head.
        num_attention_heads: heads; heads x head width is the width of both streams.
        joint_attention_dim: width of a text token as the encoder gives it.
        caption_projection_dim: width after the text projection; must be the width of the streams.
        pooled_projection_dim: width of the pooled text vector.
        pos_embed_max_size: side of the position table in patches; latents up to this side can be used.
        qk_norm: "rms_norm" normalises queries and keys per head, None does not.
        dual_attention_layers: blocks with a second, image-only attention (Stable Diffusion 3.5 medium), ascending.

    Raises:
        ValueError: two values do not fit each other, or one is out of range; the message names them.
    """

    sample_size: int
    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    pos_embed_max_size: int
    qk_norm: QkNorm
    dual_attention_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value: object = getattr(self, name)
            if not _is_int(value):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
            if not 1 <= cast("int", value) <= largest:
                raise ValueError(f"{name} is {value}; it must lie between 1 and {largest}")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f'qk_norm is {self.qk_norm!r}; it must be "rms_norm" or None')
        self._check_sizes()
        self._check_dual_layers()

    def _check_sizes(self) -> None:
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")
        if self.base_size > self.pos_embed_max_size:
            raise ValueError(
                f"sample_size {self.sample_size} is {self.base_size} patches of {self.patch_size}, "
                f"more than pos_embed_max_size {self.pos_embed_max_size}"
            )
        if self.caption_projection_dim != self.hidden_size:
            raise ValueError(
                f"caption_projection_dim {self.caption_projection_dim} must equal num_attention_heads x "
                f"attention_head_dim = {self.num_attention_heads} x {self.attention_head_dim} = {self.hidden_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"num_attention_heads x attention_head_dim = {self.num_attention_heads} x {self.attention_head_dim} = "
                f"{self.hidden_size} is not a multiple of 4, which the position table needs"
            )

    def _check_dual_layers(self) -> None:
        layers = self.dual_attention_layers
        if not isinstance(layers, tuple) or not all(_is_int(layer) for layer in layers):
            raise ValueError(f"dual_attention_layers must be a tuple of whole numbers, not {layers!r}")
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"dual_attention_layers {layers} must be ascending, without repeats")
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"dual_attention_layers names layer {layer}, but num_layers is {self.num_layers}")

    @property
    def hidden_size(self) -> int:
        """Width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def base_size(self) -> int:
        """Side of a `sample_size` latent in patches."""
        return self.sample_size // self.patch_size

    def to_diffusers(self) -> dict[str, object]:
        """The object that `SD3Transformer2DModel.from_pretrained` reads from config.json."""
        values: dict[str, object] = {"_class_name": DIFFUSERS_CLASS}
        for field in fields(self):
            value: object = getattr(self, field.name)
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_diffusers(cls, values: Mapping[str, object]) -> "MMDiTConfig":
        """Read a config.json object, ours or diffusers'.

        Raises:
            ValueError: another class's config, a key missing or unknown, or values that do not fit.
        """
        class_name = values.get("_class_name")
        if class_name != DIFFUSERS_CLASS:
            raise ValueError(f"this config.json is for {class_name!r}, not for {DIFFUSERS_CLASS!r}")
        given = {**_ABSENT, **{key: value for key, value in values.items() if not key.startswith("_")}}
        names = {field.name for field in fields(cls)}
        if missing := sorted(names - given.keys()):
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        if unknown := sorted(given.keys() - names):
            raise ValueError(f"config.json has keys that this version does not know: {', '.join(unknown)}")
        layers = given["dual_attention_layers"]
        if isinstance(layers, list):
            given["dual_attention_layers"] = tuple(layers)
        # __post_init__ looks at the type and range of every value.
        return cls(**given)  # type: ignore[arg-type]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
