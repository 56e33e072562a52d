"""What a prepared data set says of the model that is to train on it: settings to begin with, and which it rules out."""

from collections.abc import Iterator, Mapping
from typing import Final

from coordinator.settings import Settings
from coordinator.settings_problems import show
from coordinator.signed import Described
from mmdit.encoders import conditioning_from_json, conditioning_to_json
from mmdit.presets import PRESETS
from mmdit.space import space_from_json, space_to_json
from protocol.documents import DatasetManifest
from protocol.errors import ConfigInvalid, DatasetInvalid

PRESET: Final = "preset"
"""In a manifest's `encoder`: the model that it was prepared for. Others of the same widths can train on it too."""
_MISSING: Final = object()
_USUAL_SHARDS: Final = Settings().rounds.shards_per_unit


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
        "rounds.shards_per_unit": len(manifest.shards) if len(manifest.shards) < _USUAL_SHARDS else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def describe(settings: Settings, manifest: DatasetManifest | None) -> Described:
    """Return how captions and pictures become numbers: what the settings say, or leave to the data set.

    Raises:
        ConfigInvalid: they leave it to a data set that says nothing of it.
        DatasetInvalid: the data set's word makes no sense.
    """
    conditioning, space = ({} if manifest is None else _part(manifest, name) for name in ("conditioning", "space"))
    try:
        return Described(
            conditioning=conditioning_from_json(conditioning)
            if settings.model.text == conditioning.get("kind") == "encoders"
            else settings.conditioning(),
            space=space_from_json(space) if space.get("kind") == "vae" else settings.space(),
        )
    except ValueError as error:
        raise DatasetInvalid(f"The data set's manifest describes no encoder: {error}.") from None


def check_settings(settings: Settings, manifest: DatasetManifest) -> None:
    """Raise ConfigInvalid, with both values, unless the run's numbers mean what those of the data set mean."""
    conflicts = list(_conflicts(settings, manifest))
    if conflicts:
        listed = "; ".join(conflicts)
        raise ConfigInvalid(f"{listed}: leave the setting out, or prepare the data set for that.")


def _conflicts(settings: Settings, manifest: DatasetManifest) -> Iterator[str]:
    prepared = _part(manifest, "conditioning")
    described = describe(settings, manifest)
    ours: Mapping[str, object] = conditioning_to_json(described.conditioning)
    for setting, key in (("text", "kind"), ("max_tokens", "max_tokens")):
        if prepared.get(key) != ours.get(key):
            said = show(prepared.get(key))
            yield f"model.{setting} is {show(ours.get(key))}, but the data set was prepared with {said}"
    space: Mapping[str, object] = space_to_json(described.space)
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
