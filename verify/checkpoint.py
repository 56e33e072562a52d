"""Is this directory the checkpoint that its run published, all of it and nothing else?

    root.pub -> delegation.json -> run.json -> manifest.json -> SHA-256 and size of every file

Every published checkpoint directory carries the three papers of its run, so that a copy of it can be verified alone.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protocol import layout
from protocol.documents import Digest, FileEntry, Manifest, RunConfig, RunId
from protocol.errors import CheckpointCorrupt, WrongRun
from protocol.keys import PublicKey
from protocol.limits import MAX_PUBLIC_DOCUMENT_BYTES
from protocol.trust import RunTrust
from verify.plain_files import file_sha256, read_plain

_MAX_KEY_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """What a verified directory is. `run_given`: the run id came from outside, not from the directory itself."""

    run: RunId
    run_given: bool
    config: RunConfig
    checkpoint: int
    merged: int
    files: int
    total_bytes: int
    weights_sha256: Digest


def open_run(directory: Path, run: RunId | None) -> RunTrust:
    """Return the trust in the run whose root.pub, delegation.json and run.json lie in `directory`.

    The delegation's date is not held against what was published: a manifest carries no date, and an archive must stay
    verifiable after its run has ended.

    Args:
        run: the run id that must stand behind it; None takes the one of root.pub, which proves only that the papers fit
            each other.

    Raises:
        CheckpointCorrupt: a paper is missing.
        WrongRun: root.pub is another run's.
        DocumentRefused, AccessRefused: a signature or a paper does not hold.
    """
    root = PublicKey.from_hex(
        read_limited(directory / layout.ROOT_KEY, _MAX_KEY_BYTES).decode("ascii", "replace").strip()
    )
    found = RunId(root.key_id)
    if run is not None and found != run:
        raise WrongRun(f"{directory} is of run {found[:12]}, not of run {run[:12]}.")
    trust = RunTrust(found)
    trust.admit_root(root.raw)
    trust.admit_delegation(read_limited(directory / layout.DELEGATION), now_ms=0)
    trust.admit_config(read_limited(directory / layout.RUN_CONFIG))
    return trust


def verify_checkpoint(directory: Path, run: RunId | None = None) -> CheckpointReport:
    """Verify a checkpoint directory: signatures first, then every file; nothing unlisted may lie in it.

    The papers of the run are looked for in the directory, then in its grandparent (a run's `public/`). Names that start
    with a dot are overlooked: a manifest cannot list them and nothing loads them.

    Raises:
        CheckpointCorrupt: a file is missing, altered or unlisted, or there is no manifest.
        WrongRun: it is another run's.
        DocumentRefused, AccessRefused: a signature or a paper does not hold.
    """
    trust = open_run(papers(directory), run)
    manifest = trust.manifest(read_limited(directory / layout.MANIFEST))
    weights = _check_contents(manifest, trust.config)
    state = {part.path for part in manifest.state}
    for entry in manifest.files:
        if entry.path in state and manifest.snapshot != manifest.checkpoint and not (directory / entry.path).exists():
            raise CheckpointCorrupt(
                f"Of checkpoint {manifest.checkpoint} only the patch is kept here. Checkpoint {manifest.snapshot} is "
                "whole, and so are the newest ones."
            )
        check_file(directory, entry)
    listed = {entry.path for entry in manifest.files} | {layout.MANIFEST}
    unlisted = sorted(path for path in _paths(directory) if path not in listed)
    if unlisted:
        # Loaders pick up files by name: one more could change what is loaded without touching a listed one.
        raise CheckpointCorrupt(
            f"{directory} holds {len(unlisted)} files that the manifest does not list, {unlisted[0]} among them; "
            "remove them, or fetch the checkpoint again into an empty directory."
        )
    return CheckpointReport(
        run=trust.run,
        run_given=run is not None,
        config=trust.config,
        checkpoint=manifest.checkpoint,
        merged=len(manifest.merged),
        files=len(manifest.files),
        total_bytes=sum(entry.size for entry in manifest.files),
        weights_sha256=Digest(weights.sha256),
    )


def check_file(directory: Path, entry: FileEntry) -> None:
    """Raise `CheckpointCorrupt` unless the file is there with the size and SHA-256 that the manifest says."""
    path = directory / entry.path
    if not path.is_file():
        raise CheckpointCorrupt(f"{path} is missing; fetch it again.")
    size = path.stat().st_size
    if size != entry.size:
        raise CheckpointCorrupt(f"{path} has {size:,} bytes, the manifest says {entry.size:,}; fetch it again.")
    if file_sha256(path) != entry.sha256:
        raise CheckpointCorrupt(
            f"{path} does not have the SHA-256 {entry.sha256[:12]} of the manifest; fetch it again."
        )


def papers(directory: Path) -> Path:
    """Return where the papers of a checkpoint's run lie: in its directory, or in its run's `public/`."""
    if (directory / layout.ROOT_KEY).exists():
        return directory
    public = directory.absolute().parent.parent
    return public if (public / layout.ROOT_KEY).exists() else directory


def read_limited(path: Path, max_bytes: int = MAX_PUBLIC_DOCUMENT_BYTES) -> bytes:
    """Return a small file's bytes; raise `CheckpointCorrupt` if it is missing, no plain file, or too large."""
    try:
        return read_plain(path, max_bytes)
    except OSError as error:
        raise CheckpointCorrupt(f"{path} can't be read: {error.strerror}; fetch it again.") from None


def _check_contents(manifest: Manifest, config: RunConfig) -> FileEntry:
    paths = [entry.path for entry in manifest.files]
    if len(set(paths)) != len(paths):
        raise CheckpointCorrupt(f"The manifest of checkpoint {manifest.checkpoint} lists a file twice.")
    weights = manifest.state_file(layout.ROLE_WEIGHTS)
    if weights is None or weights.path != layout.WEIGHTS:
        raise CheckpointCorrupt(f"The manifest of checkpoint {manifest.checkpoint} has no weights at {layout.WEIGHTS}.")
    if manifest.checkpoint == 0 and weights.sha256 != config.genesis_sha256:
        raise CheckpointCorrupt("Checkpoint 0 does not hold the first weights that the run config names.")
    return weights


def _paths(directory: Path) -> Iterator[str]:
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        links = [name for name in directories if Path(parent, name).is_symlink()]
        for name in (*files, *links):
            if not name.startswith("."):
                yield Path(parent, name).relative_to(directory).as_posix()
