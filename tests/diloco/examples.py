"""Small real parts that several tests use: a tiny model, its shards, a unit, deltas."""

from pathlib import Path

import numpy as np

from diloco.codec import CodecConfig, EncodedDelta, encode
from diloco.container import Container, write_container
from diloco.schema import Schema, TensorSpec
from diloco.shards import Shard, ShardInfo, ShardSet, write_shard
from diloco.streams import Stream
from diloco.tables import Floats
from diloco.unit import TrainingSpec, UnitSpec
from mmdit.config import MMDiTConfig

SEED = bytes(range(32))
OTHER_SEED = bytes(range(1, 33))
UNIT_ID = bytes([7]) * 32
CODEC = CodecConfig(kind="dither", levels=1, block=256, reach=704, width=128)
FINE = CodecConfig(kind="dither", levels=7, block=256, reach=1280, width=256)
INFO = ShardInfo(licence="CC0-1.0", source="made for a test")

TINY = MMDiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=8,
    pos_embed_max_size=2,
    qk_norm="rms_norm",
    dual_attention_layers=(),
)

TRAINING = TrainingSpec(
    steps=12,
    batch=8,
    lr=5e-3,
    warmup_steps=3,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.01,
    grad_clip=1.0,
    text_dropout=1 << 13,
    shift=1.0,
    max_tokens=4,
    segment_steps=5,
    precision="fp32",
    optimizer="adamw",
)
UNIT = UnitSpec(seed=SEED, training=TRAINING, lr_scale=1.0)

# An odd count, less than a block, more than a dither group, and a scalar, so that every edge of the codec is met.
SCHEMA = Schema(
    tensors=(
        TensorSpec(name="a.odd", shape=(3, 7, 31)),
        TensorSpec(name="b.short", shape=(5,)),
        TensorSpec(name="c.long", shape=(300, 301)),
        TensorSpec(name="d.scalar", shape=()),
    )
)


def normals(name: str, shape: tuple[int, ...], scale: float = 1.0, seed: bytes = SEED) -> Floats:
    """Return fp32 normal numbers that are the same on every machine."""
    values = Stream(seed, f"init/{name}").normal(0, 0, int(np.prod(shape))) * np.float32(scale)
    return values.reshape(shape)


def shard_bytes(number: int, n: int) -> bytes:
    """Return a shard for `TINY` whose pictures are one pattern in two signs, told apart by the text."""
    signs = np.where(np.arange(n) % 2, -1, 1).astype(np.float32)
    pattern = normals("pattern", (1, 1, 4, 4))
    latent = signs[:, None, None, None] * pattern + normals(f"latent{number}", (n, 1, 4, 4), 0.1)
    texts = [(signs[i] * np.ones((1 + i % 4, 12))).astype(np.float16) for i in range(n)]
    pooled = (signs[:, None] * np.ones((n, 8))).astype(np.float16)
    return write_shard(latent.astype(np.float16), texts, pooled, INFO)


def shard_set() -> ShardSet:
    """Return two shards of 20 and 13 samples as one set."""
    return ShardSet([Shard.open(shard_bytes(0, 20)), Shard.open(shard_bytes(1, 13))])


def delta(number: int, schema: Schema = SCHEMA, scale: float = 1e-3) -> dict[str, Floats]:
    """Return a delta with `schema`'s tensors."""
    return {spec.name: normals(f"{spec.name}/{number}", spec.shape, scale) for spec in schema.tensors}


def encoded(number: int, schema: Schema = SCHEMA, codec: CodecConfig = CODEC) -> EncodedDelta:
    """Return the encoded form of `delta(number)`, with a seed of its own."""
    return encode(delta(number, schema), schema, codec, bytes([number]) * 32)


def container(directory: Path, number: int, schema: Schema = SCHEMA, codec: CodecConfig = CODEC) -> Container:
    """Write and open the container of `delta(number)`."""
    path = directory / f"{number}.delta"
    write_container(path, encoded(number, schema, codec), UNIT_ID)
    return Container.open(path, schema, codec, UNIT_ID)
