"""The weights that a unit starts from, by the cheapest way: at hand, by patches from older ones, or fetched whole.

A patch has about a thirtieth of the weights' bytes. So who was there in the last rounds fetches their patches; who
comes anew fetches the newest weights; and where those are not kept any more, the snapshot before them with the patches
since.
All ways lead to the same bytes, which the signed manifest of the checkpoint names.
"""

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from protocol import layout
from protocol.documents import Digest, FileEntry, Manifest, RunConfig
from protocol.errors import BytesRefused, CheckpointCorrupt, NotServed
from protocol.limits import MAX_CHECKPOINT_BYTES
from worker.cache import Wanted


class Files(Protocol):
    """Where a run's published files come from, and where those are kept that were got already."""

    def held(self, wanted: Wanted) -> Path | None:
        """Return a file that is at hand without any transfer."""
        ...

    def file(self, wanted: Wanted) -> Path:
        """Return a file, fetched if need be; raise `NotServed` if it is not published (any more)."""
        ...

    def make(self, wanted: Wanted, write: Callable[[Path], str]) -> Path:
        """Return a file that `write` makes, and whose SHA-256 it returns; raise `DigestMismatch` if it is another."""
        ...


ManifestOf = Callable[[int], Manifest]
"""Returns a checkpoint's verified manifest."""


def wanted_file(manifest: Manifest, entry: FileEntry) -> Wanted:
    """Return a checkpoint's file as a public file; raise `CheckpointCorrupt` if its size is beyond any limit."""
    if entry.size > MAX_CHECKPOINT_BYTES:
        raise CheckpointCorrupt(
            f"Checkpoint {manifest.checkpoint} says that {entry.path} has {entry.size:,} bytes; "
            "that is beyond any limit."
        )
    path = f"{layout.checkpoint_directory(manifest.checkpoint)}/{entry.path}"
    return Wanted(path=path, sha256=Digest(entry.sha256), size=entry.size)


def fetch_weights(files: Files, manifest_of: ManifestOf, config: RunConfig, checkpoint: int, *, room: bool) -> Path:
    """Return the file with the weights of a checkpoint.

    Args:
        room: whether there is room for older weights beside these, which patches need.

    Raises:
        CheckpointCorrupt: a manifest names no weights or no patch, or one of a size beyond any limit.
        BytesRefused: what came is not what was signed for, or is no patch.
        TryLater: something can't be fetched now.
    """
    manifest = manifest_of(checkpoint)
    wanted = _weights(manifest)
    found = files.held(wanted)
    if found is not None:
        return found
    near = _nearest(files, manifest_of, manifest, wanted.size) if room else None
    if near is not None:
        # Patches that are none, or lead elsewhere, cost no unit: the weights can still be fetched whole.
        with suppress(BytesRefused, NotServed):
            return _patched(files, manifest_of, config, near, manifest)
    try:
        return files.file(wanted)
    except NotServed:
        if manifest.snapshot >= checkpoint or not room:
            raise
    return _patched(files, manifest_of, config, manifest_of(manifest.snapshot), manifest)


def _nearest(files: Files, manifest_of: ManifestOf, manifest: Manifest, limit: int) -> Manifest | None:
    """Return the newest older checkpoint whose weights are at hand, if the patches since cost less than `limit`."""
    cost = 0
    while manifest.checkpoint > 0:
        cost += _patch(manifest).size
        if cost >= limit:
            return None
        manifest = manifest_of(manifest.checkpoint - 1)
        if files.held(_weights(manifest)) is not None:
            return manifest
    return None


def _patched(files: Files, manifest_of: ManifestOf, config: RunConfig, start: Manifest, manifest: Manifest) -> Path:
    from diloco.patch import apply_patches, open_patch
    from verify.replay import delta_schema, patch_config

    base = files.file(_weights(start))
    steps = [start, *(manifest_of(number) for number in range(start.checkpoint + 1, manifest.checkpoint)), manifest]
    patches = [
        open_patch(
            files.file(_patch(after)),
            delta_schema(config),
            patch_config(config),
            bytes.fromhex(_weights(before).sha256),
        )
        for before, after in itertools.pairwise(steps)
    ]
    return files.make(_weights(manifest), lambda out: apply_patches(base, patches, out).sha256.hex())


def _weights(manifest: Manifest) -> Wanted:
    entry = manifest.state_file(layout.ROLE_WEIGHTS)
    if entry is None:
        raise CheckpointCorrupt(f"The manifest of checkpoint {manifest.checkpoint} names no weights.")
    return wanted_file(manifest, entry)


def _patch(manifest: Manifest) -> Wanted:
    return wanted_file(manifest, manifest.file(layout.PATCH))
