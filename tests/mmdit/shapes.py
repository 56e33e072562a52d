"""A shape small enough to compare in milliseconds, with every width different from the others."""

from dataclasses import replace
from typing import Final

from mmdit.presets import PRESETS

SMALL: Final = replace(
    PRESETS["d12"],
    sample_size=16,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    caption_projection_dim=64,
    joint_attention_dim=40,
    pooled_projection_dim=24,
    in_channels=4,
    out_channels=4,
    pos_embed_max_size=12,
)
