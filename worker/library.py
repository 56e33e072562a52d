"""The public files that a unit needs: its base checkpoint's weights and its shards, each checked before it is used."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from protocol.assignment import unit_shards
from protocol.documents import Digest, Lease, Manifest, RunConfig, ShardRef, Takedowns
from protocol.errors import AnswerInvalid, Refusal, ShardCorrupt
from protocol.layout import MANIFEST, checkpoint_directory, shard_path
from protocol.limits import MAX_PUBLIC_DOCUMENT_BYTES, MAX_SHARD_BYTES
from protocol.takedowns import samples_taken_down
from protocol.trust import RunTrust
from worker.bases import fetch_weights, wanted_file
from worker.cache import FileCache, Wanted
from worker.leases import check_base
from worker.line import BreakOff
from worker.materials import Materials
from worker.progress import Downloaded, Event
from worker.taken_down import TakedownLists
from worker.web import PublicSite

_MANIFESTS_KEPT: Final = 256
"""More than the checkpoints that patches ever lead over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a unit is trained from: the checkpoint before its round, and shards by their SHA-256, in order.

    `base_sha256`: the weights that its lease names; None where there is no lease. `takedowns_sha256`: the list of
    pictures taken down that its lease names, if any.
    """

    round: int
    shards: tuple[str, ...]
    base_sha256: str | None = None
    takedowns_sha256: str | None = None

    @classmethod
    def of_lease(cls, lease: Lease) -> "Needs":
        """Return what a leased unit needs."""
        return cls(
            round=lease.round,
            shards=lease.shards,
            base_sha256=lease.base_sha256,
            takedowns_sha256=lease.takedowns_sha256,
        )

    @classmethod
    def of_unit(cls, config: RunConfig, round_number: int, index: int) -> "Needs":
        """Return what a unit needs by the run's public rule alone."""
        return cls(round=round_number, shards=unit_shards(config, round_number, index))


def check_weights(manifest: Manifest, needs: Needs) -> Wanted:
    """Return the weights that a unit starts from, from the signed manifest of the checkpoint before its round.

    Raises:
        AnswerInvalid: the manifest is another checkpoint's, or names other weights than the unit's lease, or another
            list of pictures taken down.
        CheckpointCorrupt: the signed size is beyond any limit.
    """
    weights = check_base(manifest, needs.round, needs.base_sha256)
    if needs.base_sha256 is not None and needs.takedowns_sha256 != manifest.takedowns_sha256:
        # Who judges the unit goes by the manifest: by another list its honest work would be refuted.
        raise AnswerInvalid(
            f"The lease names another list of pictures taken down than the manifest of checkpoint {needs.round - 1}."
        )
    return wanted_file(manifest, weights)


def left_out(takedowns: Takedowns | None, needs: Needs) -> tuple[tuple[int, ...], ...]:
    """Return of each shard of a unit the samples that were taken down before its round."""
    return tuple(samples_taken_down(takedowns, needs.round, shard) for shard in needs.shards)


def wanted_shard(shard: ShardRef) -> Wanted:
    """Return a shard of the run's config as a public file; raise `ShardCorrupt` if its size is beyond any limit."""
    if shard.size > MAX_SHARD_BYTES:
        raise ShardCorrupt(f"A shard of the run says that it has {shard.size:,} bytes; that is beyond any limit.")
    return Wanted(path=shard_path(shard.sha256), sha256=Digest(shard.sha256), size=shard.size)


class Library:
    """Fetches the files of one run. Methods block; use from one thread at a time.

    Args:
        allow_private: see `PublicSite`.
        networks: see `Materials`.
        break_off: ends a transfer that is under way, and lets no other begin.
        tell: told of each file that came over the network, and of pictures that were taken down.

    `received_bytes` is what came so far, of files that are not whole yet too; it may be read from any thread.
    """

    def __init__(
        self,
        cache: FileCache,
        config: RunConfig,
        *,
        allow_private: bool,
        networks: Path | None = None,
        break_off: BreakOff,
        tell: Callable[[Event], None],
    ) -> None:
        self._cache = cache
        self._takedowns = TakedownLists(tell)
        self._shards = {shard.sha256: shard for shard in config.data.shards}
        self._allow_private = allow_private
        self.networks = networks
        self._break_off = break_off
        self._tell = tell
        self._manifests: dict[int, Manifest] = {}
        self.received_bytes = 0

    def fetch(self, public_url: str, trust: RunTrust, needs: Needs) -> Materials:
        """Return a unit's files; what is missing is fetched. All sizes are known from signed documents beforehand.

        Raises:
            AnswerInvalid: the base or the list of pictures taken down is not what the run published.
            CacheTooSmall: the owner's cap does not allow the unit's files; nothing was fetched.
            CheckpointCorrupt, ShardCorrupt: a signed size is beyond any limit.
            EndpointUntrusted: see `PublicSite`.
            BytesRefused, Unreachable, ServerBusy, UnitAbandoned, DiskFull: see `fetch_weights` and `FileCache.fetch`.
        """
        site = PublicSite(public_url, allow_private=self._allow_private, break_off=self._break_off)
        manifest_of = partial(self._manifest_of, site, trust)
        manifest = manifest_of(needs.round - 1)
        base = check_weights(manifest, needs)
        takedowns = self._takedowns.named_by(manifest, trust, site.document)
        shards = [wanted_shard(self._shards[sha256]) for sha256 in needs.shards]
        self._cache.check_fits((base, *shards))
        files = _Fetch(site, self._cache, keep={base, *shards}, count=self._count, tell=self._tell)
        room = 2 * base.size + sum(file.size for file in shards) <= self._cache.cap_bytes
        return Materials(
            base=fetch_weights(files, manifest_of, trust.config, needs.round - 1, room=room),
            shards=tuple(files.file(file) for file in shards),
            without=left_out(takedowns, needs),
            networks=self.networks,
        )

    def _manifest_of(self, site: PublicSite, trust: RunTrust, checkpoint: int) -> Manifest:
        directory = checkpoint_directory(checkpoint)
        if checkpoint not in self._manifests:
            raw = site.document(f"{directory}/{MANIFEST}", MAX_PUBLIC_DOCUMENT_BYTES)
            try:
                manifest = trust.manifest(raw)
            except Refusal as refusal:
                raise AnswerInvalid(f"The manifest in {directory} does not hold: {refusal.message}") from None
            if len(self._manifests) >= _MANIFESTS_KEPT:
                del self._manifests[next(iter(self._manifests))]  # the one that was read first
            self._manifests[checkpoint] = manifest
        return self._manifests[checkpoint]

    def _count(self, received: int) -> None:
        self.received_bytes += received


class _Fetch:
    """The files of one unit: whatever it touches stays in the cache until the unit has all of them."""

    def __init__(
        self,
        site: PublicSite,
        cache: FileCache,
        *,
        keep: Collection[Wanted],
        count: Callable[[int], None],
        tell: Callable[[Downloaded], None],
    ) -> None:
        self._site = site
        self._cache = cache
        self._keep = {file.sha256 for file in keep}
        self._count = count
        self._tell = tell

    def held(self, wanted: Wanted) -> Path | None:
        """See `bases.Files.held`."""
        found = self._cache.held(wanted)
        if found is not None:
            self._keep.add(wanted.sha256)
        return found

    def file(self, wanted: Wanted) -> Path:
        """See `bases.Files.file`, and `FileCache.fetch`."""
        self._keep.add(wanted.sha256)
        received: list[int] = []

        def on_bytes(count: int) -> None:
            received.append(count)
            self._count(count)

        started = time.monotonic()
        path = self._cache.fetch(self._site, wanted, keep=self._keep, on_bytes=on_bytes)
        if received:
            self._tell(Downloaded(file=wanted.path, bytes=sum(received), seconds=time.monotonic() - started))
        return path

    def make(self, wanted: Wanted, write: Callable[[Path], str]) -> Path:
        """See `bases.Files.make`."""
        return self._cache.make(wanted, write, keep=self._keep)
