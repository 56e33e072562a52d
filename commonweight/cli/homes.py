"""Where a worker of this computer keeps its things."""

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None,
    typer.Option(
        help="Where keys, finished work and the cache are kept; default: the user's data folder.", file_okay=False
    ),
]


def default_home() -> Path:
    """Return where the platform keeps what a program must not lose."""
    import platformdirs

    return Path(platformdirs.user_data_dir("commonweight", appauthor=False)) / "worker"
