"""Where weights come from, as the signed papers beside them say: run, checkpoint, licence, data."""

from dataclasses import dataclass
from pathlib import Path

from protocol import layout
from protocol.documents import DataSet, RunId
from protocol.errors import CheckpointCorrupt
from verify.checkpoint import check_file, open_run, papers, read_limited


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a run has signed about a file of weights.

    `path` is the file in its checkpoint, `sha256` its digest; `licence` is that of the weights. `run_id` comes from the
    directory itself: whoever makes a run of his own can sign for anything with it. `takedowns_sha256` is the digest of
    the list of pictures that later units leave out, if there is one.
    """

    run_id: RunId
    run_name: str
    checkpoint: int
    path: str
    sha256: str
    licence: str
    data: DataSet
    takedowns_sha256: str | None


def provenance(checkpoint: Path, path: Path) -> Provenance | None:
    """Return what a run has signed about one file of a checkpoint directory; None if no manifest lies there.

    Args:
        checkpoint: the directory.
        path: of the file, relative to it; all of it is read.

    Raises:
        CheckpointCorrupt: the file is not the one that the run has signed for, or a paper is missing.
        DocumentRefused, AccessRefused: a signature or a paper does not hold.
    """
    if not (checkpoint / layout.MANIFEST).exists():
        return None
    trust = open_run(papers(checkpoint), None)
    manifest = trust.manifest(read_limited(checkpoint / layout.MANIFEST))
    entry = next((entry for entry in manifest.files if entry.path == path.as_posix()), None)
    if entry is None:
        raise CheckpointCorrupt(f"The manifest of checkpoint {manifest.checkpoint} does not list {path}.")
    check_file(checkpoint, entry)
    return Provenance(
        run_id=trust.run,
        run_name=trust.config.name,
        checkpoint=manifest.checkpoint,
        path=entry.path,
        sha256=entry.sha256,
        licence=trust.config.weights_licence,
        data=trust.config.data,
        takedowns_sha256=manifest.takedowns_sha256,
    )
