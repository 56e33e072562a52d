"""run.toml: the operator's words about a run, checked before anything is made of them.

Everything but [server] and [storage] is fixed at `init`: it goes into the run config that the root key signs.
Every setting has a default, and together the defaults are a small run over scikit-learn's digits.
"""

import json
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from coordinator.settings_problems import known_settings, rule_of, sentences, show
from coordinator.settings_sections import (
    CodecSettings,
    DataSettings,
    ModelSettings,
    OuterSettings,
    PatchSettings,
    RoundsSettings,
    RunSettings,
    ServerSettings,
    StorageSettings,
    TrainingSettings,
    VerificationSettings,
)
from mmdit.conditioning import ConditioningConfig
from mmdit.config import MMDiTConfig
from mmdit.presets import PRESETS
from mmdit.space import PixelSpace
from protocol.errors import ConfigInvalid
from protocol.limits import MIB
from verify.plain_files import read_plain
from verify.tolerances import DEFAULT_TOLERANCES

_MOST_BYTES: Final = 1 * MIB
BF16_LEAST_EPS: Final = 1e-6
"""Smallest `training.eps` of a run in bf16."""
BF16_TOLERANCES: Final = {
    "tolerance": (1e-3, DEFAULT_TOLERANCES["bf16"][0]),
    "code_tolerance": (0.02, DEFAULT_TOLERANCES["bf16"][1]),
}
"""Of each tolerance what it must be at least in bf16, and what it usually is; see docs/benchmarks.md."""


class Settings(BaseModel):
    """A whole run.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    codec: CodecSettings = CodecSettings()
    patch: PatchSettings = PatchSettings()
    outer: OuterSettings = OuterSettings()
    rounds: RoundsSettings = RoundsSettings()
    verification: VerificationSettings = VerificationSettings()
    server: ServerSettings = ServerSettings()
    storage: StorageSettings = StorageSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        training, rounds, server = self.training, self.rounds, self.server
        for name in ("warmup_steps", "segment_steps"):
            if getattr(training, name) > training.steps:
                raise ValueError(
                    f"training.{name} is {getattr(training, name)}, but training.steps is {training.steps}: "
                    "lower the first or raise the second."
                )
        if training.short_share and training.short_steps > training.steps:
            raise ValueError(
                f"training.short_steps is {training.short_steps}, but training.steps is {training.steps}: "
                "lower the first, or set training.short_share to 0."
            )
        if training.precision == "bf16":
            self._fit_bf16()
        if rounds.min_units > rounds.units:
            raise ValueError(
                f"rounds.min_units is {rounds.min_units}, but rounds.units is {rounds.units}: "
                "that many never arrive. Lower the first or raise the second."
            )
        if server.port and server.port == server.public_port:
            raise ValueError(
                f"server.port and server.public_port are both {server.port}: gRPC and HTTP need a port each."
            )
        return self

    def _fit_bf16(self) -> None:
        """Raise ValueError if honest work in bf16 would be taken for a cheat's."""
        if self.training.eps < BF16_LEAST_EPS:
            raise ValueError(
                f'training.precision is "bf16", but training.eps is {self.training.eps:g}: from zero moments AdamW '
                "then makes whole steps of gradients that are mere rounding, and honest machines differ as much as "
                "cheats. Raise the second to 1e-4 or so."
            )
        for name, (least, usual) in BF16_TOLERANCES.items():
            value = getattr(self.verification, name)
            if self.verification.mode == "replay" and value < least:
                raise ValueError(
                    f'training.precision is "bf16", but verification.{name} is {value:g}, which honest work in bf16 '
                    f"exceeds. Raise the second to {usual:g}, or to what `commonweight verify calibrate` measures."
                )

    @classmethod
    def parse(
        cls, text: str, overrides: Sequence[str] = (), defaults: Mapping[str, object] = MappingProxyType({})
    ) -> Self:
        """Read run.toml's text; then let each override ("section.key=value") win over it.

        `defaults`, by dotted name, stand in for what neither says.

        Raises:
            ConfigInvalid: not TOML, an unknown setting, a wrong or conflicting value; the message says what is right.
        """
        try:
            values = tomllib.loads(text)
        except ValueError as error:  # not TOML, or a number of thousands of digits
            raise ConfigInvalid(f"run.toml is not valid TOML: {error}.") from None
        except RecursionError:
            raise ConfigInvalid("run.toml is not valid: its values are nested too deeply.") from None
        for override in overrides:
            _override(values, override)
        for name, value in defaults.items():
            section, _, key = name.partition(".")
            if isinstance(table := values.setdefault(section, {}), dict):
                table.setdefault(key, value)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = sentences(error, cls)
        if len(problems) == 1:
            raise ConfigInvalid(problems[0])
        raise ConfigInvalid("\n  ".join([f"There are {len(problems)} problems with the settings:", *problems]))

    @classmethod
    def load(
        cls, path: Path, overrides: Sequence[str] = (), defaults: Mapping[str, object] = MappingProxyType({})
    ) -> Self:
        """Read a run.toml file; raises `ConfigInvalid` like `parse`, also for a file that can't be read."""
        try:
            text = read_plain(path, _MOST_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigInvalid(f"{path} is not UTF-8 text (byte {error.start}); save it again as UTF-8.") from None
        except OSError as error:
            raise ConfigInvalid(
                f"{path} can't be read ({error.strerror}); "
                f"`commonweight coordinator init --template-only {path.parent}` writes a new one."
            ) from None
        return cls.parse(text, overrides, defaults)

    def model_shape(self) -> MMDiTConfig:
        """Return the model's shape."""
        return PRESETS[self.model.preset]

    def conditioning(self) -> ConditioningConfig:
        """Return the embedded text encoder, as wide as the model asks for.

        Raises:
            ConfigInvalid: the run has networks for it, which only its data set can describe.
        """
        shape = self.model_shape()
        if self.model.text == "encoders":
            raise ConfigInvalid(
                'model.text is "encoders", but the data set was not prepared with text encoders: prepare it with '
                "--components, or choose another model.text."
            )
        return ConditioningConfig(
            kind=self.model.text,
            max_tokens=self.model.max_tokens,
            token_dim=shape.joint_attention_dim,
            pooled_dim=shape.pooled_projection_dim,
        )

    def space(self) -> PixelSpace:
        """Return the space that the model paints in: pixels, moved to -1..1.

        Raises:
            ConfigInvalid: the model paints in latents, which only the data set can describe.
        """
        shape = self.model_shape()
        if shape.in_channels not in (1, 3):
            raise ConfigInvalid(
                f"model.preset is {self.model.preset}, which paints in {shape.in_channels} latent channels, but the "
                "data set was not prepared with an autoencoder: prepare it with --components, or choose a model that "
                "paints in pixels."
            )
        side = shape.sample_size
        return PixelSpace(channels=shape.in_channels, height=side, width=side, shift=-1.0, scale=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingDescription:
    """One setting, for the documentation: dotted name, what it may be, default as run.toml writes it, what it does."""

    name: str
    type: str
    default: str
    sentence: str


def describe_settings() -> list[SettingDescription]:
    """Return every setting, in the order of run.toml."""
    return [
        SettingDescription(
            name=name,
            type=rule_of(field),
            default="not set" if field.default is None else show(field.default),
            sentence=field.description or "",
        )
        for name, field in known_settings(Settings)
    ]


def render(settings: Settings) -> str:
    """Return a run.toml, every setting with its comment, that reads back as `settings`."""
    lines = ["# A run of Commonweight. Everything but [server] and [storage] is fixed and signed at init."]
    for name, outer in Settings.model_fields.items():
        section = getattr(settings, name)
        lines += ["", *_comment((type(section).__doc__ or "").strip()), f"[{name}]"]
        assert isinstance(outer.annotation, type)
        for key, field in outer.annotation.model_fields.items():
            value = getattr(section, key)
            lines += _comment(f"{field.description} Must be {rule_of(field)}.")
            lines.append(f"# {key} = ..." if value is None else f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 110)]


def _toml(value: str | float) -> str:
    if not isinstance(value, str):
        return repr(value)
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well.
    escaped = [json.dumps(line, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007F") for line in value.split("\n")]
    return f'"{escaped[0]}"' if len(escaped) == 1 else '"""\n' + "\n".join(escaped) + '"""'


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigInvalid(f"{show(override)} is not of the form section.key=value, such as training.steps=40.")
    table = values.setdefault(section, {})
    if isinstance(table, dict):
        table[key] = _override_value(f"{section}.{key}", text.strip())


def _override_value(name: str, text: str) -> object:
    """A text setting takes the words as they are, so that a shell needs no second pair of quotes."""
    field = dict(known_settings(Settings)).get(name)
    if field is None or field.annotation in (int, float):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            return text
    return text


TEMPLATE: Final = render(Settings())
"""The run.toml that `init` writes: the defaults, every setting explained."""
