"""The config and the shards of a run that trains in milliseconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from diloco import NUMERICS
from diloco.checkpoint import write_checkpoint
from diloco.genesis import initial_state
from diloco.shards import ShardInfo, write_shard
from mmdit.presets import PRESETS
from protocol.documents import (
    Digest,
    FileEntry,
    Manifest,
    RunConfig,
    RunId,
    ShardRef,
    StateEntry,
    Takedowns,
    digest_of,
    sign,
)
from protocol.keys import PrivateKey
from protocol.layout import LATEST, MANIFEST, ROLE_WEIGHTS, WEIGHTS, checkpoint_directory, takedowns_path
from tests.protocol.examples import run_config
from verify.replay import model_config


def small_config(shards: tuple[ShardRef, ...], *, units: int, steps: int) -> RunConfig:
    example = run_config(units=units, planned=1, shards_per_unit=1)
    model = replace(PRESETS["digits"], num_layers=2)
    return replace(
        example,
        numerics=NUMERICS,
        model=model.to_diffusers(),
        conditioning={"kind": "byte-patch", "max_tokens": 8, "token_dim": 64, "pooled_dim": 64},
        space={"kind": "pixel", "channels": 1, "height": 8, "width": 8, "shift": -1.0, "scale": 2.0},
        data=replace(example.data, shards=shards, heldout=shards[0]),
        training=replace(example.training, steps=steps, batch=4, warmup_steps=0, segment_steps=10),
    )


def small_shard(seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    return write_shard(
        draw.standard_normal((6, 1, 8, 8)).astype(np.float16),
        [draw.standard_normal((3, 64)).astype(np.float16) for _ in range(6)],
        draw.standard_normal((6, 64)).astype(np.float16),
        ShardInfo(licence="CC0-1.0", source="random numbers"),
    )


def publish_genesis(public: Path, run: RunId, config: RunConfig, key: PrivateKey) -> Manifest:
    """Write checkpoint 0 and its signed manifest."""
    return publish_checkpoint(public, run, config, key, 0)


def publish_takedowns(public: Path, takedowns: Takedowns, key: PrivateKey) -> Digest:
    """Write a signed list of pictures taken down; return what a manifest names it by."""
    digest = digest_of(takedowns)
    path = public / takedowns_path(digest)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(sign(takedowns, key))
    return digest


def publish_checkpoint(
    public: Path, run: RunId, config: RunConfig, key: PrivateKey, number: int, takedowns_sha256: str | None = None
) -> Manifest:
    """Write a checkpoint of untrained weights, others for each number, and its signed manifest."""
    weights = public / checkpoint_directory(number) / WEIGHTS
    weights.parent.mkdir(parents=True, exist_ok=True)
    digest = write_checkpoint(weights, initial_state(model_config(config), bytes([number]) * 32))
    manifest = Manifest(
        run=run,
        config_sha256=digest_of(config),
        checkpoint=number,
        snapshot=number,
        previous_manifest_sha256="00" * 32 if number else None,
        outer=config.outer,
        weigh_seed=None,
        merged=(),
        unmerged=(),
        files=(FileEntry(path=WEIGHTS, sha256=digest.sha256.hex(), size=digest.size),),
        state=(StateEntry(role=ROLE_WEIGHTS, path=WEIGHTS),),
        takedowns_sha256=takedowns_sha256,
        log_position=0,
        log_head="00" * 32,
    )
    for path in (f"{checkpoint_directory(number)}/{MANIFEST}", LATEST):
        (public / path).write_bytes(sign(manifest, key))
    return manifest
