"""Where the frozen networks lie: a folder, or a repository of a model hub that is fetched into its cache."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from commonweight.extras import not_installed
from protocol.errors import LocalProblem, UsageError
from protocol.printing import printable

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
_WANTED: Final = ("text_encoder*/*", "tokenizer*/*", "vae/*")


def find_components(place: str) -> Path:
    """Return the folder of the networks.

    Args:
        place: a folder, or OWNER/NAME or OWNER/NAME@REVISION of a model hub, whose cache is looked at first.

    Raises:
        UsageError: it is neither.
        LocalProblem: it can't be fetched.
        PackageMissing: the hub's library is not installed.
    """
    folder = Path(place)
    if folder.is_dir():
        return folder.absolute()
    if _HUB_NAME.fullmatch(place) is None:
        raise UsageError(
            f"--components is {place[:80]!r}: there is no such folder, nor is it OWNER/NAME of a model hub."
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise not_installed("Fetching networks needs huggingface_hub", "encoders") from None
    name, _, revision = place.partition("@")
    try:
        found = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*_WANTED],
            ignore_patterns=["*.bin", "*.msgpack", "*.h5", "*.onnx", "*.py", "*fp16*"],
        )
    except Exception as error:  # whatever the hub's library raises, its first line says it
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LocalProblem(f"--components {place} can't be fetched: {printable(said[0])[:200]}") from None
    return Path(found)


def hub_source(place: str, folder: Path) -> str:
    """Return where others get the networks of a folder that `find_components` found: of a hub, the very revision.

    Nothing if the place is a folder: where that came from is not known.
    """
    if Path(place).is_dir():
        return ""
    return f"{place.partition('@')[0]}@{folder.name}"  # the hub's cache names folders by their commit


@contextmanager
def said_as_usage(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn what does not fit in the options of a command into a `UsageError` with the same words."""
    try:
        yield
    except kind as error:
        raise UsageError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
