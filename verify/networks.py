"""The text encoders of runs whose shards hold captions alone: loaded once in a process, by whoever trains or judges."""

from functools import lru_cache
from pathlib import Path

from diloco.texts import Encode
from mmdit.components import TextEncoders, load_encoders, require_networks
from mmdit.encoders import EncodersConfig
from mmdit.network_files import ComponentsMissing
from protocol.documents import RunConfig
from protocol.errors import NetworksMissing
from verify.hearing import refuse_unnamed
from verify.replay import conditioning_config


def heard_here(config: RunConfig) -> EncodersConfig | None:
    """Return the text encoders that whoever trains a run's units must run; None if the shards hold their text."""
    conditioning = conditioning_config(config)
    return conditioning if isinstance(conditioning, EncodersConfig) and not conditioning.stored else None


def check_networks(config: RunConfig, components: Path | None) -> None:
    """Check that a folder holds the very text encoders that a run's units need; without need for any, nothing.

    Raises:
        NetworksMissing: it does not, or no folder was named.
    """
    conditioning = heard_here(config)
    if conditioning is None:
        return
    folder = _named(config, components)
    try:
        require_networks(folder, conditioning, None)
    except (ComponentsMissing, OSError) as error:
        raise _missing(error) from None


def encode_for(config: RunConfig, components: Path | None, device: str) -> Encode | None:
    """Return what runs a run's text encoders, loaded; None if its shards hold their text.

    Raises:
        NetworksMissing: they are not there, or can't be loaded.
    """
    conditioning = heard_here(config)
    if conditioning is None:
        return None
    folder = _named(config, components)
    try:
        return _loaded(folder, conditioning, device).encode
    except (ComponentsMissing, OSError) as error:
        raise _missing(error) from None


# Of one run at a time, so that a process does not keep those of the last.
@lru_cache(maxsize=1)
def _loaded(components: Path, conditioning: EncodersConfig, device: str) -> TextEncoders:
    return load_encoders(components, conditioning, device)


def _named(config: RunConfig, components: Path | None) -> Path:
    refuse_unnamed(config, named=components is not None)
    assert components is not None  # or there is nothing to hear
    return components


def _missing(error: Exception) -> NetworksMissing:
    said = str(error)
    return NetworksMissing(f"{said[:1].upper()}{said[1:]}. --components must name the folder of the run's networks.")
