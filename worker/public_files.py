"""A run's public files, for whoever checks them: in a directory (the run's own, or a mirror), or behind a public URL.

Nothing is believed here but what `protocol.trust` verified: papers and manifests by signature, everything else by the
size and SHA-256 that a signed document names.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from protocol import layout
from protocol.documents import Digest, Manifest, RunId, Takedowns, envelope_digest
from protocol.errors import (
    AnswerInvalid,
    CheckpointCorrupt,
    DigestMismatch,
    LogDiffers,
    NotServed,
    PayloadInvalid,
    Unreachable,
    WrongRun,
)
from protocol.join import JoinString
from protocol.keys import PublicKey
from protocol.limits import GIB, MAX_PUBLIC_DOCUMENT_BYTES
from protocol.log import EMPTY_LOG_HEAD, LogEntry, read_log
from protocol.takedowns import check_takedowns, samples_taken_down
from protocol.trust import RunTrust
from verify.checkpoint import read_limited
from verify.plain_files import file_sha256
from worker.bases import Files, fetch_weights
from worker.cache import FileCache, Wanted
from worker.home import WorkerHome
from worker.library import Needs, check_weights, left_out, wanted_shard
from worker.link import open_link
from worker.materials import Materials
from worker.station import wall_ms
from worker.taken_down import read_takedowns
from worker.web import PublicSite, host_is_public

CACHE_BYTES: Final = 20 * GIB
"""Cap on the files that a check keeps; the cache is the worker's own."""
_MAX_KEY_BYTES: Final = 1024
_READS_OF_A_MOVING_LOG: Final = 3


class PublicFiles(Files, Protocol):
    """The files under a run's public address; each has the size and SHA-256 that were signed for it."""

    def document(self, path: str, max_bytes: int = MAX_PUBLIC_DOCUMENT_BYTES) -> bytes:
        """Return a small file; raise `CheckpointCorrupt`, `Unreachable` or `AnswerInvalid` if there is none."""
        ...


class DirectoryFiles:
    """A run's public directory, or a copy of it.

    Args:
        made: a folder for weights that are not kept there and follow from patches; None makes none.
    """

    def __init__(self, root: Path, made: Path | None = None) -> None:
        self._root = root
        self._made = made

    def document(self, path: str, max_bytes: int = MAX_PUBLIC_DOCUMENT_BYTES) -> bytes:
        """See `PublicFiles.document`."""
        return read_limited(self._root / path, max_bytes)

    def file(self, wanted: Wanted) -> Path:
        """See `bases.Files.file`; nothing is copied."""
        path = self._root / wanted.path
        if not path.is_file():
            raise NotServed(f"There is no file {path}.")
        if path.stat().st_size != wanted.size or file_sha256(path) != wanted.sha256:
            raise DigestMismatch(f"{path} is not the file that the run signed for.")
        return path

    def held(self, wanted: Wanted) -> Path | None:
        """See `bases.Files.held`."""
        return self.file(wanted) if (self._root / wanted.path).is_file() else None

    def make(self, wanted: Wanted, write: Callable[[Path], str]) -> Path:
        """See `bases.Files.make`."""
        if self._made is None:
            raise NotServed(f"{self._root / wanted.path} is not kept any more.")
        self._made.mkdir(parents=True, exist_ok=True)
        path = self._made / wanted.sha256
        if path.exists() and file_sha256(path) == wanted.sha256:
            return path
        if write(path) != wanted.sha256:
            path.unlink()
            raise DigestMismatch(f"What the patches lead to is not {wanted.path} as the run signed it.")
        return path


class SiteFiles:
    """A run's public address; files are kept in a cache, and those of one use side by side, whatever its cap."""

    def __init__(self, site: PublicSite, cache: FileCache) -> None:
        self._site = site
        self._cache = cache
        self._used: set[Digest] = set()

    def document(self, path: str, max_bytes: int = MAX_PUBLIC_DOCUMENT_BYTES) -> bytes:
        """See `PublicFiles.document`."""
        return self._site.document(path, max_bytes)

    def file(self, wanted: Wanted) -> Path:
        """See `bases.Files.file`."""
        self._used.add(wanted.sha256)
        return self._cache.fetch(self._site, wanted, keep=self._used, on_bytes=lambda _: None)

    def held(self, wanted: Wanted) -> Path | None:
        """See `bases.Files.held`."""
        found = self._cache.held(wanted)
        if found is not None:
            self._used.add(wanted.sha256)
        return found

    def make(self, wanted: Wanted, write: Callable[[Path], str]) -> Path:
        """See `bases.Files.make`."""
        self._used.add(wanted.sha256)
        return self._cache.make(wanted, write, keep=self._used)


def site_files(url: str, home: Path, *, allow_private: bool) -> SiteFiles:
    """Return the files behind a public URL, cached in a worker's or auditor's home."""
    return SiteFiles(PublicSite(url, allow_private=allow_private), FileCache(WorkerHome(home).cache, CACHE_BYTES))


async def join_run(join: JoinString, home: Path) -> tuple[SiteFiles, RunTrust]:
    """Return the public files of the run behind a join string, and the trust in it; nothing is sent.

    Raises:
        EndpointUntrusted, DelegationInvalid, Unreachable: see `worker.link.open_link`.
    """
    link = await open_link(join, now_ms=wall_ms())
    await link.channel.close()
    public = await asyncio.to_thread(host_is_public, join.host, join.port)
    return site_files(link.endpoint.public_url, home, allow_private=not public), link.trust


def believe(files: PublicFiles, run: RunId | None) -> RunTrust:
    """Return the trust in the run whose papers lie there, as `verify.checkpoint.open_run` does for a directory.

    Args:
        run: the run id that must stand behind it; None takes the papers' own.

    Raises:
        WrongRun: the papers are another run's.
        DocumentRefused, AccessRefused: a paper does not hold.
        CheckpointCorrupt, TryLater: a paper is not there.
    """
    root = PublicKey.from_hex(files.document(layout.ROOT_KEY, _MAX_KEY_BYTES).decode("ascii", "replace").strip())
    found = RunId(root.key_id)
    if run is not None and found != run:
        raise WrongRun(f"These files are of run {found[:12]}, not of run {run[:12]}.")
    trust = RunTrust(found)
    trust.admit_root(root.raw)
    trust.admit_delegation(files.document(layout.DELEGATION), now_ms=0)
    trust.admit_config(files.document(layout.RUN_CONFIG))
    return trust


def read_manifest(files: PublicFiles, trust: RunTrust, checkpoint: int) -> Manifest:
    """Return a checkpoint's verified manifest."""
    manifest, _ = _manifest(files, trust, checkpoint)
    return manifest


def newest_checkpoint(files: PublicFiles, trust: RunTrust) -> int:
    """Return the number of the newest checkpoint."""
    return trust.manifest(files.document(layout.LATEST)).checkpoint


def fetch_materials(files: PublicFiles, trust: RunTrust, needs: Needs) -> Materials:
    """Return what a unit is trained from."""
    manifest_of = partial(read_manifest, files, trust)
    manifest = manifest_of(needs.round - 1)
    check_weights(manifest, needs)
    takedowns = _takedowns(files, trust, manifest)
    shards = {shard.sha256: shard for shard in trust.config.data.shards}
    return Materials(
        base=fetch_weights(files, manifest_of, trust.config, needs.round - 1, room=True),
        shards=tuple(files.file(wanted_shard(shards[sha256])) for sha256 in needs.shards),
        without=left_out(takedowns, needs),
    )


def taken_down_from(files: PublicFiles, trust: RunTrust, round_number: int) -> Mapping[str, tuple[int, ...]]:
    """Return of every training shard of a run, by SHA-256, the samples that the units of a round leave out."""
    takedowns = _takedowns(files, trust, read_manifest(files, trust, round_number - 1))
    shards = [shard.sha256 for shard in trust.config.data.shards]
    return {shard: samples_taken_down(takedowns, round_number, shard) for shard in shards}


def _takedowns(files: PublicFiles, trust: RunTrust, manifest: Manifest) -> Takedowns | None:
    if manifest.takedowns_sha256 is None:
        return None
    takedowns = read_takedowns(manifest.takedowns_sha256, trust, files.document)
    check_takedowns(takedowns, trust.config, manifest.checkpoint)
    return takedowns


def read_public_log(files: PublicFiles, trust: RunTrust) -> tuple[tuple[LogEntry, ...], int]:
    """Return every entry of a run's log, each chained to the one before it, and the last position that is signed.

    The entries up to a checkpoint end at the position and head that its manifest signs; those after the newest one are
    chained to it, and signed only by the next.

    Raises:
        LogDiffers: the log does not lead from one signed head to the next.
        CheckpointCorrupt, TryLater: a part of it is not there.
    """
    differs = LogDiffers()
    for _ in range(_READS_OF_A_MOVING_LOG):
        try:
            return _read_log_once(files, trust)
        except _Moved as moved:
            differs = moved.differs
    raise differs


class _Moved(Exception):
    """The tail does not follow on the newest manifest: perhaps a checkpoint was published in between."""

    def __init__(self, differs: LogDiffers) -> None:
        super().__init__(differs.message)
        self.differs = differs


def _read_log_once(files: PublicFiles, trust: RunTrust) -> tuple[tuple[LogEntry, ...], int]:
    newest = newest_checkpoint(files, trust)
    entries: list[LogEntry] = []
    position, head, previous = 0, EMPTY_LOG_HEAD, None
    for checkpoint in range(newest + 1):
        manifest, digest = _manifest(files, trust, checkpoint)
        if manifest.previous_manifest_sha256 != previous:
            raise LogDiffers(f"The manifest of checkpoint {checkpoint} does not follow on the one before it.")
        previous = digest
        if checkpoint or manifest.log_position:
            entries += _chained(files.document(layout.log_path(checkpoint)), position, head, f"checkpoint {checkpoint}")
        position, head = (entries[-1].position, entries[-1].head) if entries else (position, head)
        if (position, head.hex()) != (manifest.log_position, manifest.log_head):
            raise LogDiffers(f"The log of checkpoint {checkpoint} does not end where its manifest signs its end.")
    with suppress(CheckpointCorrupt, Unreachable):
        tail = files.document(layout.LOG_TAIL)
        try:
            entries += _chained(tail, position, head, "the open round")
        except LogDiffers as differs:
            raise _Moved(differs) from None
    return tuple(entries), position


def _chained(raw: bytes, position: int, head: bytes, name: str) -> list[LogEntry]:
    try:
        return list(read_log(raw, position=position, head=head))
    except PayloadInvalid as error:
        raise LogDiffers(f"The log of {name} does not hold: {error.message}") from None


def _manifest(files: PublicFiles, trust: RunTrust, checkpoint: int) -> tuple[Manifest, Digest]:
    raw = files.document(f"{layout.checkpoint_directory(checkpoint)}/{layout.MANIFEST}")
    manifest = trust.manifest(raw)
    if manifest.checkpoint != checkpoint:
        raise AnswerInvalid(f"In the place of checkpoint {checkpoint} lies the manifest of {manifest.checkpoint}.")
    return manifest, envelope_digest(Manifest, raw, trust.coordinator, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)
