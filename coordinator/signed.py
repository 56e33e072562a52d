"""The signed part of the settings: from run.toml to the run config, and back to compare the two."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from coordinator.settings import Settings
from coordinator.settings_problems import show
from coordinator.settings_sections import parse_stages
from diloco import NUMERICS
from diloco.codec import UNIT as CODEC_UNIT
from diloco.trail import merkle_root
from mmdit.encoders import Conditioning, conditioning_from_json, conditioning_to_json
from mmdit.presets import PRESETS
from mmdit.space import Space, space_from_json, space_to_json
from protocol.documents import (
    Codec,
    DataSet,
    Digest,
    OuterStep,
    Patch,
    Rounds,
    RunConfig,
    ShardRef,
    Stage,
    Training,
    Verification,
)
from protocol.limits import MIB, SECOND_MS

DROPOUT_ONE: Final = 2**16
"""`Training.text_dropout` of a share of one."""
SHARE_ONE: Final = 2**24
"""What a share or probability of one is written as in the run config."""
_SHARES: Final = ("floor", "referee_share", "owner_cap", "hostile_share")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A signed setting that run.toml has otherwise than the run; both values as run.toml writes them."""

    name: str
    in_settings: str
    in_run: str

    def __str__(self) -> str:
        return f"{self.name} is {self.in_settings} in run.toml, but {self.in_run} in the signed run."


@dataclass(frozen=True, slots=True, kw_only=True)
class Curated:
    """Who has signed for a data set, as a public key in hex, and the digest of what was signed."""

    curator: str
    manifest_sha256: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """How captions and pictures become the numbers that a run trains on."""

    conditioning: Conditioning
    space: Space


def _described_in(config: RunConfig) -> Described:
    return Described(
        conditioning=conditioning_from_json(config.conditioning),
        space=space_from_json(config.space),
    )


def _described_again(settings: Settings, config: RunConfig) -> Described:
    """What these settings say, and where they leave it to the data set, what the run has."""
    found = _described_in(config)
    left_conditioning = settings.model.text == "encoders" and config.conditioning.get("kind") == "encoders"
    left_space = config.space.get("kind") == "vae"
    return Described(
        conditioning=found.conditioning if left_conditioning else settings.conditioning(),
        space=found.space if left_space else settings.space(),
    )


def run_config(
    settings: Settings,
    *,
    shards: tuple[ShardRef, ...],
    heldout: ShardRef,
    seed: bytes,
    genesis_sha256: Digest,
    described: Described | None = None,
    curated: Curated | None = None,
) -> RunConfig:
    """Return the complete run config of a run with these settings.

    Args:
        shards: the training shards, in the run's order.
        heldout: the shard that no unit trains on.
        seed: 32 bytes, from which the first weights come.
        genesis_sha256: digest of checkpoint 0's weights file.
        described: how captions and pictures become numbers; None is what the settings say.
        curated: who has signed for the data, if anybody.
    """
    training, outer = settings.training, settings.outer
    if described is None:
        described = Described(conditioning=settings.conditioning(), space=settings.space())
    return RunConfig(
        name=settings.run.name,
        numerics=NUMERICS,
        verification=verification_of(settings),
        seed=seed.hex(),
        model=settings.model_shape().to_diffusers(),
        conditioning=conditioning_to_json(described.conditioning),
        space=space_to_json(described.space),
        data=DataSet(
            name=settings.data.name,
            source=settings.data.source,
            licence=settings.data.licence,
            root=merkle_root([bytes.fromhex(shard.sha256) for shard in shards]).hex(),
            curator=None if curated is None else curated.curator,
            manifest_sha256=None if curated is None else curated.manifest_sha256,
            shards=shards,
            heldout=heldout,
        ),
        training=Training(
            **training.model_dump(exclude={"text_dropout", "short_share"}),
            text_dropout=round(training.text_dropout * DROPOUT_ONE),
            short_share=round(training.short_share * SHARE_ONE),
        ),
        codec=Codec(
            kind="dither",
            levels=settings.codec.levels,
            block=settings.codec.block,
            reach=round(settings.codec.reach * CODEC_UNIT),
            width=round(settings.codec.width * CODEC_UNIT),
        ),
        patch=Patch(
            kind="dead-zone",
            block=settings.patch.block,
            threshold=round(settings.patch.threshold * CODEC_UNIT),
        ),
        outer=OuterStep(lr=outer.lr, momentum=outer.momentum, ema_decay=outer.ema_decay),
        rounds=_rounds(settings, described.space.factor),
        genesis_sha256=genesis_sha256,
        weights_licence=settings.run.weights_licence,
        terms=settings.run.terms,
    )


def differences(settings: Settings, config: RunConfig) -> tuple[Difference, ...]:
    """Return every signed setting in which `settings` and the run's signed config differ; none after a clean init."""
    wanted = run_config(
        settings,
        shards=config.data.shards,
        heldout=config.data.heldout,
        seed=bytes.fromhex(config.seed),
        genesis_sha256=Digest(config.genesis_sha256),
        described=_described_again(settings, config),
    )
    factor = _described_in(config).space.factor
    ours, theirs = _as_written(wanted, factor), _as_written(config, factor)
    return tuple(
        Difference(name=name, in_settings=show(ours[name]), in_run=show(theirs[name]))
        for name in ours
        if ours[name] != theirs[name]
    )


def _rounds(settings: Settings, factor: int) -> Rounds:
    rounds = settings.rounds
    return Rounds(
        planned=rounds.planned,
        units=rounds.units,
        shards_per_unit=rounds.shards_per_unit,
        max_bytes_per_unit=rounds.max_mib_per_unit * MIB,
        min_window_ms=round(rounds.min_window_seconds * SECOND_MS),
        min_units=rounds.min_units,
        staleness_bound=rounds.staleness_bound,
        staleness_discount=max(1, round(rounds.staleness_discount * SHARE_ONE)),
        lease_ms=round(rounds.lease_seconds * SECOND_MS),
        upload_ms=round(rounds.upload_seconds * SECOND_MS),
        stages=tuple(
            Stage(first_round=first, side=max(1, side // factor)) for first, side in parse_stages(rounds.stages)
        ),
    )


def verification_of(settings: Settings) -> Verification:
    """Return the rules by which a run with these settings judges claims."""
    written = settings.verification.model_dump()
    shares = {name: round(written.pop(name) * SHARE_ONE) for name in _SHARES}
    return Verification(**written, **shares)


def _as_written(config: RunConfig, factor: int) -> dict[str, Any]:
    """The config under the names and in the units of run.toml."""
    training, rounds, verification = asdict(config.training), asdict(config.rounds), asdict(config.verification)
    for name in _SHARES:
        verification[name] = _share(verification[name], SHARE_ONE)
    training["short_share"] = _share(config.training.short_share, SHARE_ONE)
    training["text_dropout"] = _share(config.training.text_dropout, DROPOUT_ONE)
    rounds["max_mib_per_unit"] = rounds.pop("max_bytes_per_unit") // MIB
    rounds["stages"] = " ".join(f"{stage.first_round}:{stage.side * factor}" for stage in config.rounds.stages)
    rounds["staleness_discount"] = _share(config.rounds.staleness_discount, SHARE_ONE)
    for name in ("min_window", "lease", "upload"):
        rounds[f"{name}_seconds"] = rounds.pop(f"{name}_ms") / SECOND_MS
    return {
        "run.name": config.name,
        "run.weights_licence": config.weights_licence,
        "run.terms": config.terms,
        "model.preset": _preset_name(config.model),
        "model.text": config.conditioning.get("kind"),
        "model.max_tokens": config.conditioning.get("max_tokens"),
        "data.name": config.data.name,
        "data.source": config.data.source,
        "data.licence": config.data.licence,
        **{f"training.{name}": value for name, value in training.items()},
        "codec.levels": config.codec.levels,
        "codec.block": config.codec.block,
        "codec.reach": config.codec.reach / CODEC_UNIT,
        "codec.width": config.codec.width / CODEC_UNIT,
        "patch.block": config.patch.block,
        "patch.threshold": config.patch.threshold / CODEC_UNIT,
        "outer.lr": config.outer.lr,
        "outer.momentum": config.outer.momentum,
        "outer.ema_decay": config.outer.ema_decay,
        **{f"rounds.{name}": value for name, value in rounds.items()},
        **{f"verification.{name}": value for name, value in verification.items()},
    }


def _share(units: int, one: int) -> float:
    """The shortest decimal fraction that becomes so many units, which is most likely what the operator wrote."""
    exact = units / one
    return next(short for digits in range(20) if round((short := round(exact, digits)) * one) == units)


def _preset_name(model: Mapping[str, Any]) -> str:
    named = (name for name, shape in PRESETS.items() if shape.to_diffusers() == dict(model))
    return next(named, "another shape, which no preset of this version has")
