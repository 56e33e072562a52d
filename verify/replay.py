"""From a signed run config to what `diloco` and `mmdit` compute with, and the replay of a unit.

The worker that trains, the settler that merges and the auditor who re-runs all come through here, so that they cannot
read one config in two ways.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, TypeVar

from diloco import NUMERICS
from diloco.codec import CodecConfig, EncodedDelta, encode
from diloco.merge import MergeRules, OuterConfig
from diloco.patch import PatchConfig
from diloco.schema import Schema, schema_of
from diloco.shards import Shard, ShardSet
from diloco.tables import Floats
from diloco.texts import ByteTexts, CaptionTexts, Encode, StoredTexts, TextSource
from diloco.unit import TrainingSpec, UnitResult, UnitSpec, run_unit
from mmdit.conditioning import ConditioningConfig
from mmdit.config import MMDiTConfig
from mmdit.encoders import Conditioning, conditioning_from_json
from mmdit.space import Space, space_from_json
from protocol.assignment import lr_scale, unit_seed, unit_steps
from protocol.documents import Lease, RunConfig, UnitId
from protocol.errors import NumericsMismatch, PayloadInvalid

T = TypeVar("T")


def check_numerics(config: RunConfig) -> None:
    """Raise `NumericsMismatch` unless this version computes as the run does."""
    if config.numerics != NUMERICS:
        side = "a newer" if config.numerics > NUMERICS else "an older"
        raise NumericsMismatch(
            f"The run computes with numerics {config.numerics}, this version with {NUMERICS}; "
            f"install {side} Commonweight."
        )


def model_config(config: RunConfig) -> MMDiTConfig:
    """Return the run's model; raise `PayloadInvalid` if the config describes none that this version can build."""
    try:
        return MMDiTConfig.from_diffusers(config.model)
    except ValueError as error:
        raise PayloadInvalid(f"RunConfig: model: {error}.") from None


def conditioning_config(config: RunConfig) -> Conditioning:
    """Return how the run's captions become numbers; raise `PayloadInvalid`."""
    return _built("conditioning", conditioning_from_json, {"values": config.conditioning})


def space_of(config: RunConfig) -> Space:
    """Return what the run's latents mean; raise `PayloadInvalid`."""
    return _built("space", space_from_json, {"values": config.space})


def text_source(config: RunConfig, encode: Encode | None = None) -> TextSource:
    """Return where the text of the run's samples comes from; raise `PayloadInvalid`.

    Args:
        encode: what runs the run's text encoders, if its shards hold captions alone (`verify.networks`).
    """
    conditioning = conditioning_config(config)
    if isinstance(conditioning, ConditioningConfig):
        return ByteTexts(conditioning=conditioning)
    if conditioning.stored:
        return StoredTexts(layout=conditioning.layout)
    return CaptionTexts(layout=conditioning.layout, encode=encode)


def shard_set(
    config: RunConfig,
    shards: Sequence[Shard],
    without: Sequence[Sequence[int]] | None = None,
    encode: Encode | None = None,
) -> ShardSet:
    """Return the shards of one of the run's units, or the held-out one, with what the run hears of them.

    Args:
        without: of each shard the samples that were taken down (`protocol.takedowns`); None: none.
        encode: see `text_source`; the held-out shard holds text in any case.

    Raises:
        ShardCorrupt: they do not fit each other or the run.
    """
    return ShardSet(shards, text_source(config, encode), without)


def delta_schema(config: RunConfig) -> Schema:
    """Return names and shapes of the tensors of the run's deltas."""
    return _schema(model_config(config))


@lru_cache(maxsize=8)
def _schema(model: MMDiTConfig) -> Schema:
    # Building even an empty model of many layers takes a while, and every upload asks.
    return schema_of(model)


def codec_config(config: RunConfig) -> CodecConfig:
    """Return how the run's deltas are coded."""
    return _built("codec", CodecConfig, asdict(config.codec))


def patch_config(config: RunConfig) -> PatchConfig:
    """Return how the run's outer steps are rounded on their way down."""
    return _built("patch", PatchConfig, {"block": config.patch.block, "threshold": config.patch.threshold})


def merge_rules(config: RunConfig) -> MergeRules:
    """Return what decides the run's merges beside the deltas."""
    return MergeRules(outer=outer_config(config), patch=patch_config(config), schema=delta_schema(config))


def outer_config(config: RunConfig) -> OuterConfig:
    """Return the run's outer step."""
    return _built("outer", OuterConfig, {"lr": config.outer.lr, "momentum": config.outer.momentum})


def training_spec(config: RunConfig, steps: int | None = None) -> TrainingSpec:
    """Return the inner loop of the run's long units, or of those with so many steps.

    A shorter unit warms up for a shorter time: for the same share of its steps, rounded down.

    Raises:
        PayloadInvalid: its numbers do not fit each other.
    """
    training = config.training
    steps = training.steps if steps is None else steps
    return _built(
        "training",
        TrainingSpec,
        {
            "steps": steps,
            "batch": training.batch,
            "lr": training.lr,
            "warmup_steps": training.warmup_steps * steps // training.steps,
            "beta1": training.beta1,
            "beta2": training.beta2,
            "eps": training.eps,
            "weight_decay": training.weight_decay,
            "grad_clip": training.grad_clip,
            "text_dropout": training.text_dropout,
            "shift": training.shift,
            "max_tokens": conditioning_config(config).max_tokens,
            "segment_steps": training.segment_steps,
            "precision": training.precision,
            "optimizer": training.optimizer,
        },
    )


def unit_spec_of(config: RunConfig, round_number: int, unit: UnitId) -> UnitSpec:
    """Return what a unit computes, from its id alone (as it stands in a manifest)."""
    return UnitSpec(
        seed=bytes.fromhex(unit_seed(unit)),
        training=training_spec(config, unit_steps(config, unit)),
        lr_scale=lr_scale(config, round_number),
    )


def unit_spec(config: RunConfig, lease: Lease) -> UnitSpec:
    """Return what a leased unit computes.

    The seed is derived from the unit's id and not read from the lease; that unit, round and index of a lease fit each
    other is for whoever accepts the lease to check (`protocol.assignment`).
    """
    return unit_spec_of(config, lease.round, UnitId(lease.unit))


def replay_unit(
    config: RunConfig, lease: Lease, base: Mapping[str, Floats], shards: ShardSet, device: str
) -> tuple[UnitResult, EncodedDelta]:
    """Train the unit of a lease once more and encode its delta as its volunteer must have.

    Training bits may differ between machines; how far is for the comparison to say, not for this function.

    Args:
        base: all tensors of checkpoint `lease.round - 1`.
        shards: the unit's shards, in the lease's order, without what was taken down by the list that the lease names.
        device: "cpu" or "cuda"; call `diloco.determinism.set_precision` for it first.

    Raises:
        NumericsMismatch: this version would compute another unit.
        PayloadInvalid: the run config describes no model or inner loop.
        TrainingDiverged: a loss or a weight is not finite.
    """
    check_numerics(config)
    spec = unit_spec(config, lease)
    result = run_unit(spec, model_config(config), base, shards, device=device, on_step=None)
    return result, encode(result.delta, delta_schema(config), codec_config(config), spec.seed)


def _built(name: str, kind: Callable[..., T], members: Mapping[str, Any]) -> T:
    try:
        return kind(**members)
    except (ValueError, TypeError) as error:
        raise PayloadInvalid(f"RunConfig: {name}: {error}.") from None
