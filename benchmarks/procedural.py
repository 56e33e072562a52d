"""A run sized for two cores: a model of 0.08 million parameters and pictures that are drawn, not collected.

Each picture is 8 x 8 grey pixels with one shape in it (disc, square, cross, bars or rails), its centre, size and
brightness drawn at random, and a caption that says which, roughly where and how bright: "disc top left bright". There
are as many pictures as one asks for, so a run can train on each once and memorises none; scanned digits, 1,437 of them,
would be known by heart after a few rounds. Every pixel follows from a seed by separate fp32 operations.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np

from diloco import NUMERICS
from diloco.checkpoint import write_checkpoint
from diloco.genesis import initial_state
from diloco.shards import Halves, Shard, ShardInfo, ShardSet, write_shard
from diloco.streams import Stream
from diloco.tables import Floats
from diloco.trail import merkle_root
from diloco.unit import UnitSpec, run_unit
from mmdit.conditioning import ConditioningConfig, encode_caption
from mmdit.config import MMDiTConfig
from mmdit.space import PixelSpace
from protocol.assignment import unit_id, unit_shards
from protocol.canonical import sha256_hex
from protocol.documents import (
    Codec,
    DataSet,
    OuterStep,
    Patch,
    Rounds,
    RunConfig,
    ShardRef,
    Training,
    UnitId,
    Verification,
    digest_of,
)
from protocol.limits import MINUTE_MS
from verify.replay import delta_schema, unit_spec_of

SIDE: Final = 8
SHAPES: Final = ("disc", "square", "cross", "bars", "rails")
ROWS: Final = ("top", "middle", "bottom")
COLUMNS: Final = ("left", "centre", "right")
LIGHTS: Final = ("dim", "bright")
SHARD_SAMPLES: Final = 320
"""Twice what a unit of 10 steps of 16 draws, with repeats, from its one shard."""
HELDOUT_SAMPLES: Final = 512
CONDITIONING: Final = ConditioningConfig(kind="byte-patch", max_tokens=8, token_dim=64, pooled_dim=32)
SPACE: Final = PixelSpace(channels=1, height=SIDE, width=SIDE, shift=-1.0, scale=2.0)
MODEL: Final = MMDiTConfig(
    sample_size=SIDE,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=CONDITIONING.token_dim,
    caption_projection_dim=32,
    pooled_projection_dim=CONDITIONING.pooled_dim,
    pos_embed_max_size=SIDE // 2,
    qk_norm="rms_norm",
    dual_attention_layers=(),
)
_INFO: Final = ShardInfo(licence="CC0-1.0", source="drawn by benchmarks.procedural")
_DRAWS: Final = 10
"""Numbers drawn for each picture: shape, row, column, light, then six that vary within what the caption says."""

UNCHECKED: Final = Verification(
    mode="none",
    tolerance=1e-3,
    code_tolerance=0.02,
    probation=20,
    floor=2**24 // 20,
    referee_share=2**24 // 10,
    ramp=50,
    owner_cap=2**24 // 4,
    weighting="mean",
    hostile_share=2**24 * 2 // 5,
    unmerge_from=0.5,
    norm_bound=3.0,
    screen_triples=0,
    evidence_sha256=None,
)
"""Rules for benchmarks that judge by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallUnit:
    """A unit of the small run, ready for `run_unit`."""

    id: UnitId
    round: int
    index: int
    spec: UnitSpec
    shards: ShardSet


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """A run's config with the bytes of its shards and its first weights."""

    config: RunConfig
    genesis: Mapping[str, Floats]
    shard_bytes: tuple[bytes, ...]
    heldout_bytes: bytes

    @cached_property
    def shards(self) -> Mapping[str, Shard]:
        """Every training shard, opened, by the SHA-256 of its bytes."""
        return {sha256_hex(raw): Shard.open(raw) for raw in self.shard_bytes}

    @cached_property
    def heldout(self) -> ShardSet:
        """The shard that no unit trains on."""
        return ShardSet([Shard.open(self.heldout_bytes)])

    def unit(self, round_number: int, index: int) -> SmallUnit:
        """Return unit `index` of a round, both counted as the protocol does (rounds from 1, units from 0)."""
        unit = unit_id(digest_of(self.config), round_number, index)
        names = unit_shards(self.config, round_number, index)
        return SmallUnit(
            id=unit,
            round=round_number,
            index=index,
            spec=unit_spec_of(self.config, round_number, unit),
            shards=ShardSet([self.shards[name] for name in names]),
        )

    def write_shards(self, directory: Path) -> list[Path]:
        """Write the training shards and `heldout.safetensors` as `coordinator init --data` wants them."""
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{number:04d}.safetensors" for number in range(len(self.shard_bytes))]
        for path, raw in zip(paths, self.shard_bytes, strict=True):
            path.write_bytes(raw)
        (directory / "heldout.safetensors").write_bytes(self.heldout_bytes)
        return paths


def small_run(
    *,
    seed: bytes,
    units: int,
    rounds: int,
    shards: int,
    steps: int = 10,
    batch: int = 16,
    precision: Literal["fp32", "bf16"] = "fp32",
    eps: float | None = None,
    levels: int = 1,
    verification: Verification = UNCHECKED,
    folder: Path | None = None,
) -> SmallRun:
    """Return a complete run. A unit of 10 steps takes a tenth of a second on one core.

    Args:
        seed: 32 bytes, from which pictures and first weights come.
        units: units of a round.
        rounds: planned rounds, over which the learning rate falls.
        shards: training shards of 320 pictures each; one per unit repeats no picture (`units` times `rounds`).
        eps: AdamW's; None takes 1e-8 in fp32 and 1e-4 in bf16, a fortieth of a typical gradient. From zero moments
            AdamW makes whole steps of smaller ones, whose sign bf16's rounding may decide.
        levels: of the codec.
        folder: where the first weights' file is written for its digest; None leaves that digest all zeros, which only
            a run that is published needs.
    """
    genesis = initial_state(MODEL, seed)
    raw_shards = tuple(shard(seed, number, SHARD_SAMPLES) for number in range(shards))
    heldout = shard(seed, 1 << 32, HELDOUT_SAMPLES)
    genesis_sha256 = "00" * 32
    if folder is not None:
        genesis_sha256 = write_checkpoint(folder / "genesis.safetensors", genesis).sha256.hex()
    config = RunConfig(
        name="shapes",
        numerics=NUMERICS,
        verification=verification,
        seed=seed.hex(),
        model=MODEL.to_diffusers(),
        conditioning=asdict(CONDITIONING),
        space={"kind": "pixel", **asdict(SPACE)},
        data=DataSet(
            name="shapes",
            source=_INFO.source,
            licence=_INFO.licence,
            root=merkle_root([bytes.fromhex(sha256_hex(raw)) for raw in raw_shards]).hex(),
            curator=None,
            manifest_sha256=None,
            shards=tuple(_reference(raw, SHARD_SAMPLES) for raw in raw_shards),
            heldout=_reference(heldout, HELDOUT_SAMPLES),
        ),
        training=_training(steps, batch, precision, eps or (1e-8 if precision == "fp32" else 1e-4)),
        codec=(
            Codec(kind="dither", levels=1, block=1024, reach=704, width=64)
            if levels == 1
            else Codec(kind="dither", levels=levels, block=256, reach=1280, width=256)
        ),
        patch=Patch(kind="dead-zone", block=1024, threshold=256),
        outer=OuterStep(lr=0.7, momentum=0.6, ema_decay=0.0),
        rounds=_rounds(units, rounds),
        genesis_sha256=genesis_sha256,
        weights_licence="CC0-1.0",
        terms="None: this run lasts for one measurement.",
    )
    return SmallRun(config=config, genesis=genesis, shard_bytes=raw_shards, heldout_bytes=heldout)


def trained_weights(run: SmallRun, *, rounds: int) -> dict[str, Floats]:
    """Return the weights after some honest rounds, merged by plain means; a state that is no longer the first one.

    Not canonical: enough for a place to start from.
    """
    weights = dict(run.genesis)
    momentum: dict[str, Floats] = {name: np.zeros_like(weights[name]) for name in delta_schema(run.config).names}
    rate, keep = np.float32(run.config.outer.lr), np.float32(run.config.outer.momentum)
    for number in range(1, rounds + 1):
        units = [run.unit(number, index) for index in range(run.config.rounds.units)]
        deltas = [run_unit(unit.spec, MODEL, weights, unit.shards, device="cpu", on_step=None).delta for unit in units]
        for name, before in momentum.items():
            mean = np.mean([delta[name] for delta in deltas], axis=0, dtype=np.float32)
            momentum[name] = keep * before + mean
            weights[name] = weights[name] - rate * (mean + keep * momentum[name])
    return weights


def shard(seed: bytes, number: int, n: int) -> bytes:
    """Return the bytes of shard `number`: `n` pictures that stand in no other shard of this seed."""
    drawn = Stream(seed, "init/pictures").u16(number, 0, n * _DRAWS).reshape(n, _DRAWS)
    kinds = drawn[:, :4] % np.array([len(SHAPES), len(ROWS), len(COLUMNS), len(LIGHTS)], dtype=np.uint16)
    shape_N, row_N, column_N, light_N = (kinds[:, k] for k in range(4))
    captions = [
        f"{SHAPES[s]} {ROWS[r]} {COLUMNS[c]} {LIGHTS[b]}"
        for s, r, c, b in zip(shape_N, row_N, column_N, light_N, strict=True)
    ]
    vary = (drawn[:, 4:].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-16)
    pixels_NHW = draw_pictures(kinds.astype(np.float32), vary)
    latents: Halves = (pixels_NHW[:, None] * np.float32(SPACE.scale) + np.float32(SPACE.shift)).astype(np.float16)
    encoded = {caption: encode_caption(caption, CONDITIONING) for caption in set(captions)}
    return write_shard(
        latents, [encoded[caption][0] for caption in captions], np.stack([encoded[c][1] for c in captions]), _INFO
    )


def draw_pictures(kinds_N4: Floats, vary_N6: Floats) -> Floats:
    """Return pixels [N, 8, 8] in 0..1."""
    one, half = np.float32(1), np.float32(0.5)
    shape, row, column, light = (kinds_N4[:, k, None, None] for k in range(4))
    down, right, size, glow, ground, phase = (vary_N6[:, k, None, None] for k in range(6))
    grid = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
    y = np.abs(grid[None, :, None] - ((row - one) * np.float32(2.2) + (down - half)))
    x = np.abs(grid[None, None, :] - ((column - one) * np.float32(2.2) + (right - half)))
    radius = np.float32(1.5) + np.float32(0.9) * size
    wide = np.maximum(x, y)
    square = radius + half - wide
    disc = radius + np.float32(0.7) - np.sqrt(x * x + y * y)
    cross = np.minimum(np.float32(1.1) - np.minimum(x, y), radius + one - wide)
    stripes = [
        np.minimum(np.abs((along * half + phase) % one - half) * np.float32(4) - half, radius + one - wide)
        for along in (y, x)
    ]
    mask = np.clip(np.select([shape == k for k in range(5)], [disc, square, cross, *stripes]), 0, 1)
    back = np.float32(0.15) * ground
    bright = np.float32(0.35) + np.float32(0.4) * light + np.float32(0.25) * glow
    pixels: Floats = (back + (bright - back) * mask).astype(np.float32)
    return pixels


def _reference(raw: bytes, samples: int) -> ShardRef:
    return ShardRef(sha256=sha256_hex(raw), size=len(raw), samples=samples, height=SPACE.height, width=SPACE.width)


def _training(steps: int, batch: int, precision: Literal["fp32", "bf16"], eps: float) -> Training:
    return Training(
        steps=steps,
        short_steps=1,
        short_share=0,
        batch=batch,
        lr=0.004,
        lr_final_share=0.3,
        warmup_steps=min(2, steps),
        beta1=0.9,
        beta2=0.99,
        eps=eps,
        weight_decay=0.01,
        grad_clip=1.0,
        text_dropout=6554,
        shift=1.0,
        segment_steps=5,
        precision=precision,
        optimizer="adamw",
    )


def _rounds(units: int, rounds: int) -> Rounds:
    return Rounds(
        planned=rounds,
        units=units,
        shards_per_unit=1,
        max_bytes_per_unit=2**30,
        min_window_ms=0,
        min_units=max(1, units * 3 // 4),
        staleness_bound=2,
        staleness_discount=2**23,
        lease_ms=5 * MINUTE_MS,
        upload_ms=5 * MINUTE_MS,
        stages=(),
    )
