"""What a prepared data set says of the model that is to train on it: settings to begin with, and which it rules out."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Final

from coordinator.settings import Settings
from coordinator.settings_problems import show
from mmdit.presets import PRESETS
from protocol.documents import DatasetManifest
from protocol.errors import ConfigInvalid

PRESET: Final = "preset"
"""In a manifest's `encoder`: the model that it was prepared for. Others of the same widths can train on it too."""
_MISSING: Final = object()


def suggested_settings(manifest: DatasetManifest) -> dict[str, object]:
    """Return the settings, by dotted name, that a run over this data set has where nothing else is said.

    A curator may have written anything into `encoder`: the values are checked like all settings.
    """
    conditioning = _part(manifest, "conditioning")
    found = {
        "run.name": manifest.name,
        "model.preset": _preset(manifest),
        "model.text": conditioning.get("kind"),
        "model.max_tokens": conditioning.get("max_tokens"),
    }
    return {name: value for name, value in found.items() if value is not None}


def check_settings(settings: Settings, manifest: DatasetManifest) -> None:
    """Raise ConfigInvalid, with both values, unless the run's numbers mean what those of the data set mean."""
    conflicts = list(_conflicts(settings, manifest))
    if conflicts:
        listed = "; ".join(conflicts)
        raise ConfigInvalid(f"{listed}: leave the setting out, or prepare the data set for that.")


def _conflicts(settings: Settings, manifest: DatasetManifest) -> Iterator[str]:
    prepared = _part(manifest, "conditioning")
    ours: Mapping[str, object] = asdict(settings.conditioning())
    for setting, key in (("text", "kind"), ("max_tokens", "max_tokens")):
        if prepared.get(key) != ours[key]:
            yield (
                f"model.{setting} is {show(ours[key])}, but the data set was prepared with {show(prepared.get(key))}"
            )
    space: Mapping[str, object] = {"kind": "pixel", **asdict(settings.space())}
    rest = {name: value for name, value in ours.items() if name not in ("kind", "max_tokens")}
    for what, mine, theirs in (
        ("space", space, _part(manifest, "space")),
        ("conditioning", rest, {name: value for name, value in prepared.items() if name not in ("kind", "max_tokens")}),
    ):
        names = [name for name in (*mine, *theirs) if mine.get(name, _MISSING) != theirs.get(name, _MISSING)]
        if names:
            name, preset = names[0], _preset(manifest)
            yield (
                f"model.preset is {show(settings.model.preset)} with the {what}'s {name} {show(mine.get(name))}, but "
                f"the data set was prepared for {show(preset) if preset else 'a model'} with {show(theirs.get(name))}"
            )
            return  # one name of a model says all


def _preset(manifest: DatasetManifest) -> object:
    """Return the preset that the manifest names, or else the only one of its widths; None if it can't be told."""
    if PRESET in manifest.encoder:
        return manifest.encoder[PRESET]
    space, conditioning = _part(manifest, "space"), _part(manifest, "conditioning")
    side = space.get("height"), space.get("width")
    widths = space.get("channels"), conditioning.get("token_dim"), conditioning.get("pooled_dim")
    fitting = [
        name
        for name, shape in PRESETS.items()
        if (shape.in_channels, shape.joint_attention_dim, shape.pooled_projection_dim) == widths
        and (shape.sample_size, shape.sample_size) == side
    ]
    return fitting[0] if len(fitting) == 1 else None


def _part(manifest: DatasetManifest, name: str) -> Mapping[str, object]:
    found: object = manifest.encoder.get(name)
    return found if isinstance(found, dict) else {}
