"""Named model shapes.

The large ones keep the rule by which ComfyUI recognises a Stable Diffusion 3 file: depth d has d layers, d heads of
width 64, and 16 latent channels.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from mmdit.config import MMDiTConfig


def of_depth(depth: int, *, dual: int = 0) -> MMDiTConfig:
    """Return Stable Diffusion 3's transformer of a depth (arXiv 2403.03206, section 5.3).

    Args:
        depth: layers, and heads of width 64.
        dual: so many first layers have a second, image-only attention, as in Stable Diffusion 3.5 medium.
    """
    return MMDiTConfig(
        sample_size=32,  # 256 x 256 pixels through an 8-fold autoencoder
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=depth,
        joint_attention_dim=4096,
        caption_projection_dim=64 * depth,
        pooled_projection_dim=2048,
        # Positions a third apart, as Stable Diffusion 3 has them, up to 768 x 768 pixels. Its own table of 192 x 192
        # would add 226 MB to every published d24 checkpoint.
        pos_embed_max_size=48,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(dual)),
    )


# 8 x 8 grey pictures in pixel space, 0.44 million parameters. Of the shapes of 0.4 to 0.6 million that were tried, this
# one learns to write recognisable digits in the fewest core-seconds; width serves it better than depth.
_DIGITS: Final = MMDiTConfig(
    sample_size=8,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=5,
    joint_attention_dim=64,
    caption_projection_dim=80,
    pooled_projection_dim=64,
    pos_embed_max_size=4,
    qk_norm="rms_norm",
    dual_attention_layers=(),
)

# 16 x 16 RGB pictures in pixel space, up to 32 x 32, 0.6 million parameters: for trying a whole run out, and for tests.
_RGB16: Final = MMDiTConfig(
    sample_size=16,
    patch_size=2,
    in_channels=3,
    out_channels=3,
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=3,
    joint_attention_dim=64,
    caption_projection_dim=96,
    pooled_projection_dim=128,
    pos_embed_max_size=16,
    qk_norm="rms_norm",
    dual_attention_layers=(),
)

# 32 x 32 RGB pictures in pixel space, 32 million parameters: a run between the digits and the large models.
_RGB32: Final = MMDiTConfig(
    sample_size=32,
    patch_size=2,
    in_channels=3,
    out_channels=3,
    num_layers=6,
    attention_head_dim=64,
    num_attention_heads=6,
    joint_attention_dim=64,
    caption_projection_dim=384,
    pooled_projection_dim=256,
    pos_embed_max_size=16,
    qk_norm="rms_norm",
    dual_attention_layers=(),
)

PRESETS: Final[Mapping[str, MMDiTConfig]] = MappingProxyType(
    {
        "d12": of_depth(12),
        "d15": of_depth(15),
        "d18": of_depth(18),
        "d24": of_depth(24),
        "d24-dual": of_depth(24, dual=13),
        "d30": of_depth(30),
        "d38": of_depth(38),
        "digits": _DIGITS,
        "rgb16": _RGB16,
        "rgb32": _RGB32,
    }
)
