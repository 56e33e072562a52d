"""The public files that a unit needs: its base checkpoint's weights and its shards, each checked before it is used."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from protocol.documents import Digest, Lease, Manifest, RunConfig
from protocol.errors import AnswerInvalid, CheckpointCorrupt, Refusal, ShardCorrupt
from protocol.layout import MANIFEST, ROLE_WEIGHTS, checkpoint_directory, shard_path
from protocol.limits import MAX_CHECKPOINT_BYTES, MAX_PUBLIC_DOCUMENT_BYTES, MAX_SHARD_BYTES
from protocol.trust import RunTrust
from worker.cache import FileCache, Wanted
from worker.leases import check_base
from worker.line import BreakOff
from worker.progress import Downloaded
from worker.web import PublicSite


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """Files on this disk: the weights to start from, and the shards in the lease's order."""

    base: Path
    shards: tuple[Path, ...]


class Library:
    """Fetches the files of one run. Methods block; use from one thread at a time.

    Args:
        allow_private: see `PublicSite`.
        break_off: ends a transfer that is under way, and lets no other begin.
        tell: told of each file that came over the network.

    `received_bytes` is what came so far, of files that are not whole yet too; it may be read from any thread.
    """

    def __init__(
        self,
        cache: FileCache,
        config: RunConfig,
        *,
        allow_private: bool,
        break_off: BreakOff,
        tell: Callable[[Downloaded], None],
    ) -> None:
        self._cache = cache
        self._shards = {shard.sha256: shard for shard in config.data.shards}
        self._allow_private = allow_private
        self._break_off = break_off
        self._tell = tell
        self._manifest: Manifest | None = None
        self.received_bytes = 0

    def fetch(self, public_url: str, trust: RunTrust, lease: Lease) -> Materials:
        """Return a unit's files; what is missing is fetched. All sizes are known from signed documents beforehand.

        Raises:
            AnswerInvalid: the lease's base is not what the run published.
            CacheTooSmall: the owner's cap does not allow the unit's files; nothing was fetched.
            CheckpointCorrupt, ShardCorrupt: a signed size is beyond any limit.
            EndpointUntrusted: see `PublicSite`.
            DigestMismatch, Unreachable, ServerBusy, UnitAbandoned, DiskFull: see `FileCache.fetch`.
        """
        site = PublicSite(public_url, allow_private=self._allow_private, break_off=self._break_off)
        base = self._base(site, trust, lease)
        wanted = (base, *(self._shard(sha256) for sha256 in lease.shards))
        self._cache.check_fits(wanted)
        keep = frozenset(file.sha256 for file in wanted)
        paths = [self._fetch(site, file, keep) for file in wanted]
        return Materials(base=paths[0], shards=tuple(paths[1:]))

    def _base(self, site: PublicSite, trust: RunTrust, lease: Lease) -> Wanted:
        directory = checkpoint_directory(lease.round - 1)
        if self._manifest is None or self._manifest.checkpoint != lease.round - 1:
            raw = site.document(f"{directory}/{MANIFEST}", MAX_PUBLIC_DOCUMENT_BYTES)
            try:
                self._manifest = trust.manifest(raw)
            except Refusal as refusal:
                raise AnswerInvalid(f"The manifest in {directory} does not hold: {refusal.message}") from None
        check_base(lease, self._manifest)
        weights = self._manifest.state_file(ROLE_WEIGHTS)
        assert weights is not None  # check_base looked
        if weights.size > MAX_CHECKPOINT_BYTES:
            raise CheckpointCorrupt(
                f"The checkpoint says that it has {weights.size:,} bytes; that is beyond any limit."
            )
        return Wanted(path=f"{directory}/{weights.path}", sha256=Digest(weights.sha256), size=weights.size)

    def _shard(self, sha256: str) -> Wanted:
        shard = self._shards[sha256]  # the lease's shards follow from the config: leases.check_grant
        if shard.size > MAX_SHARD_BYTES:
            raise ShardCorrupt(f"A shard of the run says that it has {shard.size:,} bytes; that is beyond any limit.")
        return Wanted(path=shard_path(sha256), sha256=Digest(sha256), size=shard.size)

    def _fetch(self, site: PublicSite, wanted: Wanted, keep: frozenset[Digest]) -> Path:
        before, started = self.received_bytes, time.monotonic()
        path = self._cache.fetch(site, wanted, keep=keep, on_bytes=self._count)
        received = self.received_bytes - before
        if received:
            self._tell(Downloaded(file=wanted.path, bytes=received, seconds=time.monotonic() - started))
        return path

    def _count(self, received: int) -> None:
        self.received_bytes += received
