"""Publishing a checkpoint: every file in its place and on the disk first, the signed manifest renamed in last.

Whoever sees a manifest sees a whole checkpoint. Every step can be repeated: after a crash the half-built directory is
built anew, and a manifest that was already renamed is taken as it is (its bytes would be the same anyway).
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.directory import sync, write_file
from protocol import layout
from protocol.canonical import canonical_json
from protocol.documents import (
    Digest,
    FileEntry,
    Manifest,
    MergeEntry,
    StateEntry,
    Takedowns,
    digest_of,
    sign,
    verify,
)
from protocol.keys import PrivateKey
from protocol.limits import MAX_PUBLIC_DOCUMENT_BYTES, MAX_TAKEDOWNS_BYTES

_CHANGING = frozenset({*layout.STATE_ROLES, layout.PATCH, layout.MANIFEST})


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedManifest:
    """A manifest in its place: what it says and the digest of its payload."""

    manifest: Manifest
    sha256: Digest


class Publisher:
    """Writes under a run's `public/` directory; the only code that does, after the run was founded."""

    def __init__(self, public: Path, key: PrivateKey) -> None:
        self._public = public
        self._key = key

    def directory(self, checkpoint: int) -> Path:
        """Return the directory of a checkpoint."""
        return self._public / layout.checkpoint_directory(checkpoint)

    def workplace(self, checkpoint: int) -> Path:
        """Return a new empty directory, hidden from the public, in which a checkpoint is put together."""
        place = self._public / "checkpoints" / f".making-{checkpoint:06d}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def published(self, checkpoint: int) -> PublishedManifest | None:
        """Return the manifest of a checkpoint if it was renamed into its place, checked against our own key."""
        path = self.directory(checkpoint) / layout.MANIFEST
        if not path.exists():
            return None
        manifest = verify(Manifest, path.read_bytes(), self._key.public, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)
        return PublishedManifest(manifest=manifest, sha256=digest_of(manifest))

    def complete(self, place: Path, previous: int, merged_files: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
        """Add the files that do not change (configs, the run's papers) to a workplace; return every file's entry."""
        source = self.directory(previous)
        entries = {entry.path: entry for entry in merged_files}
        listed = self.published(previous)
        assert listed is not None  # a round starts from a published checkpoint
        for entry in listed.manifest.files:
            if entry.path in _CHANGING or entry.path in entries:
                continue
            target = place / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source / entry.path, target)
            entries[entry.path] = entry
        for directory in {place, *(path for path in place.rglob("*") if path.is_dir())}:
            sync(directory)
        return tuple(entries[path] for path in sorted(entries))

    def state_files(self, checkpoint: int) -> dict[str, str]:
        """Return path and SHA-256 of the files that hold a checkpoint's canonical state, from its signed manifest."""
        listed = self.published(checkpoint)
        assert listed is not None  # a round starts from a published checkpoint
        return {part.path: listed.manifest.file(part.path).sha256 for part in listed.manifest.state}

    def state_of(self, files: Iterable[FileEntry]) -> tuple[StateEntry, ...]:
        """Return which of the files hold the round's canonical state."""
        roles = layout.STATE_ROLES
        return tuple(StateEntry(role=roles[entry.path], path=entry.path) for entry in files if entry.path in roles)

    def add_deltas(self, merged: Iterable[tuple[MergeEntry, Path]]) -> None:
        """Show the merged deltas to everybody; they were secret until their round was settled."""
        folder = self._public / "deltas"
        folder.mkdir(exist_ok=True)
        for entry, blob in merged:
            _link(blob, self._public / layout.delta_path(entry.blob_sha256))
        sync(folder)

    def add_log(self, checkpoint: int, lines: bytes) -> None:
        """Write the log entries that a checkpoint closes."""
        path = self._public / layout.log_path(checkpoint)
        path.parent.mkdir(exist_ok=True)
        write_file(path, lines)

    def add_log_tail(self, lines: bytes) -> None:
        """Write the log entries after the newest manifest."""
        write_file(self._public / layout.LOG_TAIL, lines)

    def add_takedowns(self, takedowns: Takedowns) -> Digest:
        """Publish a list of pictures taken down under its digest, which a manifest is about to name."""
        digest = digest_of(takedowns)
        path = self._public / layout.takedowns_path(digest)
        path.parent.mkdir(exist_ok=True)
        write_file(path, sign(takedowns, self._key))
        return digest

    def takedowns(self, sha256: str | None) -> Takedowns | None:
        """Return a list by the digest that a manifest names, checked against our own key; None for none."""
        if sha256 is None:
            return None
        raw = (self._public / layout.takedowns_path(sha256)).read_bytes()
        return verify(Takedowns, raw, self._key.public, max_bytes=MAX_TAKEDOWNS_BYTES)

    def prune(self, checkpoint: int) -> tuple[MergeEntry, ...]:
        """Take the deltas of a checkpoint out of the public directory; return them. Its manifest keeps the digests."""
        listed = self.published(checkpoint)
        merged = () if listed is None else listed.manifest.merged
        for entry in merged:
            (self._public / layout.delta_path(entry.blob_sha256)).unlink(missing_ok=True)
        return merged

    def thin(self, checkpoint: int) -> None:
        """Remove a checkpoint's state unless it is a snapshot; its patch, manifest and description stay."""
        weights = self.directory(checkpoint) / layout.WEIGHTS
        if not weights.exists():
            return  # they go last
        listed = self.published(checkpoint)
        if listed is None or listed.manifest.snapshot == checkpoint:
            return
        for part in listed.manifest.state:
            if part.role != layout.ROLE_WEIGHTS:
                (self.directory(checkpoint) / part.path).unlink(missing_ok=True)
        weights.unlink()

    def publish(self, place: Path, manifest: Manifest) -> PublishedManifest:
        """Move a complete workplace to its public name, then the signed manifest: from that instant it is published."""
        final = self.directory(manifest.checkpoint)
        if final.exists():
            # Left by a crash between the two renames: without a manifest nobody has seen it.
            shutil.rmtree(final)
        place.rename(final)
        sync(final.parent)
        envelope = sign(manifest, self._key)
        write_file(final / layout.MANIFEST, envelope)
        self._point(envelope, manifest.takedowns_sha256)
        return PublishedManifest(manifest=manifest, sha256=digest_of(manifest))

    def point_to(self, checkpoint: int) -> None:
        """Make `latest.json` name a published checkpoint (again)."""
        listed = self.published(checkpoint)
        assert listed is not None  # whoever asks has just seen it
        envelope = (self.directory(checkpoint) / layout.MANIFEST).read_bytes()
        self._point(envelope, listed.manifest.takedowns_sha256)

    def _point(self, envelope: bytes, takedowns_sha256: str | None) -> None:
        write_file(self._public / layout.LATEST, envelope)
        if takedowns_sha256 is not None:
            newest = (self._public / layout.takedowns_path(takedowns_sha256)).read_bytes()
            write_file(self._public / layout.TAKEDOWNS, newest)

    def add_metrics(self, checkpoint: int, metrics: dict[str, float]) -> None:
        """Write a checkpoint's measurements; informative, signed by nobody."""
        path = self._public / layout.metrics_path(checkpoint)
        path.parent.mkdir(exist_ok=True)
        write_file(path, canonical_json(metrics))


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no hard links."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        sync(temporary)
        temporary.replace(target)
