"""Which text encoders whoever trains a run's units must run, read from its config alone: without numpy, torch or files.

A volunteer is told before anything is agreed to or fetched. `verify.networks` checks and loads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.documents import RunConfig
from protocol.errors import NetworksMissing
from protocol.printing import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A text encoder, and the tokens of a caption that it reads."""

    name: str
    tokens: int


def heard_by_trainers(config: RunConfig) -> Sequence[Heard]:
    """Return the text encoders that a run's volunteers and auditors must run; none if its shards hold their text.

    What is malformed is none here: `verify.replay.conditioning_config` refuses it by name.
    """
    match config.conditioning:
        case {"kind": "encoders", "stored": False, "encoders": [*encoders]}:
            return [
                Heard(name=printable(name), tokens=tokens)
                for entry in encoders
                if isinstance(entry, dict)
                and isinstance(name := entry.get("name"), str)
                and isinstance(tokens := entry.get("tokens"), int)
            ]
        case _:
            return ()


def networks_source(config: RunConfig) -> str:
    """Return where a run's text encoders can be got, as its data set's curator says; empty if he does not say."""
    source = config.conditioning.get("source")
    return printable(source) if isinstance(source, str) else ""


def components_option(config: RunConfig) -> str:
    """Return what a command for a run's trainers must say besides, with a blank before it; empty for most runs."""
    return " --components FOLDER" if heard_by_trainers(config) else ""


def refuse_unnamed(config: RunConfig, *, named: bool) -> None:
    """Raise `NetworksMissing` if a run's units need text encoders here and nobody has said where they are.

    Args:
        named: whether a folder was.
    """
    heard = heard_by_trainers(config)
    if heard and not named:
        source = networks_source(config)
        get = f"Get them from {source}" if source else "Get the networks that the run's operator names"
        names = ", ".join(encoder.name for encoder in heard)
        raise NetworksMissing(
            f"This run's shards hold captions alone: whoever trains runs its text encoders, {names}. {get}, and say "
            "with --components in which folder they are."
        )
