"""What must hold of settings, shards and the run config before a run is founded on them."""

from collections.abc import Sequence
from pathlib import Path

from coordinator.settings import Settings
from coordinator.settings_problems import show
from coordinator.settings_sections import DataSettings
from coordinator.signed import Described
from diloco.shards import Shard
from mmdit.conditioning import ConditioningConfig
from mmdit.space import space_from_json
from protocol.assignment import stage_shards
from protocol.canonical import sha256_hex
from protocol.documents import DatasetManifest, RunConfig, parse_payload, payload_of
from protocol.errors import ConfigInvalid, DatasetInvalid, PayloadInvalid, ShardCorrupt
from protocol.limits import MAX_SHARD_BYTES, MIB


def check_shards(settings: Settings, described: Described, shards: Sequence[Path], heldout: Path) -> None:
    """Hold the shards to the settings, before anything is made of either.

    Raises:
        ConfigInvalid: they do not fit each other; both values are named.
        ShardCorrupt: a shard is damaged, too large, or can't be read.
    """
    if len(shards) < settings.rounds.shards_per_unit:
        raise ConfigInvalid(
            f"rounds.shards_per_unit is {settings.rounds.shards_per_unit}, but the data has {len(shards)} training "
            "shards: lower the first, or give more shards."
        )
    shape, text = settings.model_shape(), described.conditioning.layout
    patch, largest = shape.patch_size, shape.pos_embed_max_size * shape.patch_size
    if text.token_dim != shape.joint_attention_dim or text.pooled_dim != shape.pooled_projection_dim:
        raise ConfigInvalid(
            f"model.preset is {settings.model.preset}, which hears tokens of {shape.joint_attention_dim} and a pooled "
            f"vector of {shape.pooled_projection_dim}, but the data set was prepared for {text.token_dim} and "
            f"{text.pooled_dim}."
        )
    for path in (*shards, heldout):
        try:
            if path.stat().st_size > MAX_SHARD_BYTES:
                raise ShardCorrupt(f"Shard {path} is larger than {MAX_SHARD_BYTES:,} bytes; cut it into more shards.")
            shard = Shard.open(path)
        except OSError as error:
            raise ShardCorrupt(f"Shard {path} can't be read: {error.strerror}.") from None
        if settings.data == DataSettings() and shard.info.source != settings.data.source:
            raise ConfigInvalid(
                f"data.source is {show(settings.data.source)} (the default), but {path.name} says "
                f"{show(shard.info.source)}: describe your data in [data], its licence too."
            )
        channels, *sides = shard.size
        if channels != shape.in_channels or any(side % patch or side > largest for side in sides):
            raise ConfigInvalid(
                f"model.preset is {settings.model.preset}, which needs shards of {shape.in_channels} channels, "
                f"with sides that are multiples of {patch} up to {largest}, but {path.name} has (channels, height, "
                f"width) = {shard.size}."
            )
        _check_text(settings, described, path, shard, measured=path == heldout)


def _check_text(settings: Settings, described: Described, path: Path, shard: Shard, *, measured: bool) -> None:
    """Raise ConfigInvalid unless a shard holds what the run hears, or captions that it can hear.

    Args:
        measured: it is the held-out one: the coordinator, which has no text encoders, measures on it.
    """
    conditioning = described.conditioning
    captions_do = isinstance(conditioning, ConditioningConfig) or not (conditioning.stored or measured)
    for part in conditioning.layout.parts:
        widths = shard.text_widths.get(part.name)
        if widths is None and captions_do and shard.has_captions:
            continue
        if widths != (part.width, part.pooled):
            raise ConfigInvalid(
                f"model.preset is {settings.model.preset} and model.text {show(settings.model.text)}, which needs "
                f"text of (token width, pooled width) = {(part.width, part.pooled)}, but {path.name} has {widths}."
            )
        if shard.longest(part.name) > part.rows:
            raise ConfigInvalid(
                f"model.max_tokens is {part.rows}, but {path.name} has a caption of {shard.longest(part.name)} tokens: "
                "raise the first, or encode the captions shorter."
            )


def check_evidence(settings: Settings, calibration: bytes | None) -> None:
    """Raise ConfigInvalid unless the settings name the calibration that is given, or neither is there."""
    named = settings.verification.evidence_sha256
    found = None if calibration is None else sha256_hex(calibration)
    if named is not None and found is None:
        raise ConfigInvalid(
            f"verification.evidence_sha256 is {show(named)}, but no calibration is given: pass the file with "
            "--calibration, or leave the setting out."
        )
    if named != found:
        raise ConfigInvalid(
            f"verification.evidence_sha256 is {'not set' if named is None else show(named)}, but the calibration given "
            f"to --calibration has {show(found)}: leave the setting out, it is set from the file."
        )


def check_config(config: RunConfig) -> None:
    """Hold the shards to the rounds, and the whole to what its readers will accept; raise ConfigInvalid."""
    try:
        parse_payload(RunConfig, payload_of(config))
    except PayloadInvalid as error:
        raise ConfigInvalid(f"Nobody could read this run: {error.message}") from None
    _check_distinct(config)
    _check_stages(config)
    _check_unit_bytes(config)


def _check_stages(config: RunConfig) -> None:
    sides = sorted({round((shard.height * shard.width) ** 0.5) for shard in config.data.shards})
    factor = space_from_json(config.space).factor
    for stage in config.rounds.stages:
        if stage.first_round > config.rounds.planned:
            raise ConfigInvalid(
                f"rounds.stages has a stage from round {stage.first_round} on, but rounds.planned is "
                f"{config.rounds.planned}: it never comes."
            )
        _, shards = stage_shards(config, stage.first_round)
        if len(shards) < config.rounds.shards_per_unit:
            raise ConfigInvalid(
                f"rounds.stages has a stage of {stage.side * factor} pixels a side from round {stage.first_round} "
                f"on, but {len(shards)} shards have pictures of about that size, and rounds.shards_per_unit is "
                f"{config.rounds.shards_per_unit}. The data has sides of about "
                f"{', '.join(str(side * factor) for side in sides)}."
            )


def _check_unit_bytes(config: RunConfig) -> None:
    largest = sorted((shard.size for shard in config.data.shards), reverse=True)
    asked = sum(largest[: config.rounds.shards_per_unit])
    if asked > config.rounds.max_bytes_per_unit:
        raise ConfigInvalid(
            f"rounds.shards_per_unit is {config.rounds.shards_per_unit}, which can make a unit fetch {asked:,} bytes, "
            f"but rounds.max_mib_per_unit is {config.rounds.max_bytes_per_unit // MIB}: lower the first, raise the "
            "second, or prepare smaller shards."
        )


def check_curated(config: RunConfig, signed: DatasetManifest) -> None:
    """Raise DatasetInvalid unless the run's shards are those that the curator has signed for."""
    expected = [shard.sha256 for shard in (*signed.shards, signed.heldout)]
    if [shard.sha256 for shard in (*config.data.shards, config.data.heldout)] != expected:
        raise DatasetInvalid("The shards are not those that the curator has signed for; copy the data set again.")


def _check_distinct(config: RunConfig) -> None:
    digests = [shard.sha256 for shard in (*config.data.shards, config.data.heldout)]
    if len(set(digests)) != len(digests):
        raise ConfigInvalid(
            "Two of the shards are the same file; each must be given once, and the held-out one must not be trained on."
        )
