"""`--components`: where the frozen networks are that a command runs."""

from pathlib import Path
from typing import Annotated

import typer

Components = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|OWNER/NAME",
        help="The run's text encoders, for runs whose shards hold captions alone: a folder as StableDiffusion3Pipeline "
        "has them, or that of a model hub.",
    ),
]


def networks_in(components: str | None) -> Path | None:
    """Return the folder of the networks; fetch it if a model hub has it. None if none is named.

    Raises:
        UsageError: it is neither a folder nor the name of something on a hub.
        LocalProblem: the hub can't be reached, or does not have it.
    """
    if components is None:
        return None
    from commonweight.components_place import find_components

    return find_components(components)
