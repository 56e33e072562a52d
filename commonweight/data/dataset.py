"""A prepared data set, read back: who signed for it, and whether every byte is what was signed for."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from commonweight.data.layout import CURATOR, HELDOUT, MANIFEST
from coordinator.founding import SignedDataset
from diloco.shards import Shard
from diloco.trail import merkle_root
from protocol.documents import DatasetManifest, PreparedShard, verify
from protocol.errors import DatasetInvalid, DocumentRefused, ShardCorrupt, UsageError
from protocol.keys import PublicKey
from protocol.limits import MAX_PUBLIC_DOCUMENT_BYTES
from verify.plain_files import file_sha256, open_plain, read_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A data set whose manifest was verified."""

    directory: Path
    signed: SignedDataset

    @property
    def manifest(self) -> DatasetManifest:
        """What the curator has signed."""
        return self.signed.manifest

    @property
    def curator(self) -> PublicKey:
        """Who has signed."""
        return self.signed.curator

    def path(self, shard: PreparedShard) -> Path:
        """Return where a shard lies."""
        held = shard.sha256 == self.manifest.heldout.sha256
        return self.directory / (HELDOUT if held else f"{shard.sha256}.safetensors")


def open_dataset(directory: Path, curator: PublicKey | None = None) -> Dataset:
    """Read and verify a manifest; the shards are not looked at yet.

    Args:
        directory: made by `commonweight data prepare`.
        curator: the key that must have signed; None takes the directory's own word for it.

    Raises:
        UsageError: there is no prepared data set here.
        DatasetInvalid: the manifest is not signed by that key, or does not hold.
    """
    if not (directory / MANIFEST).is_file():
        raise UsageError(f"{directory} holds no prepared data set: there is no {MANIFEST} in it.")
    try:
        envelope = read_plain(directory / MANIFEST, MAX_PUBLIC_DOCUMENT_BYTES)
        key = curator or PublicKey.from_hex(read_plain(directory / CURATOR, 100).decode("ascii").strip())
        manifest = verify(DatasetManifest, envelope, key, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)
    except (DocumentRefused, UnicodeDecodeError, OSError) as error:
        raise DatasetInvalid(f"{directory / MANIFEST} does not hold: {error}") from None
    root = merkle_root([bytes.fromhex(shard.sha256) for shard in manifest.shards]).hex()
    if root != manifest.root:
        raise DatasetInvalid(
            f"{directory / MANIFEST} names the root {manifest.root[:12]}; its shards give {root[:12]}."
        )
    return Dataset(directory=directory, signed=SignedDataset(envelope=envelope, manifest=manifest, curator=key))


def check_shards(dataset: Dataset) -> None:
    """Hash and open every shard.

    Raises:
        DatasetInvalid: one is missing, changed, or not what the manifest says of it; or one lies there that nobody has
            signed for.
    """
    named = {dataset.path(shard).name for shard in (*dataset.manifest.shards, dataset.manifest.heldout)}
    if strays := sorted(path.name for path in dataset.directory.glob("*.safetensors") if path.name not in named):
        raise DatasetInvalid(f"{strays[0]} lies there, and nobody has signed for it; nor for {len(strays) - 1} others.")
    for shard in (*dataset.manifest.shards, dataset.manifest.heldout):
        check_shard(dataset, shard)


def check_shard(dataset: Dataset, shard: PreparedShard) -> None:
    """Hold one shard to its entry; raise `DatasetInvalid`."""
    path = dataset.path(shard)
    try:
        with open_plain(path) as file:
            whole = os.fstat(file.fileno()).st_size == shard.size
        if not whole or file_sha256(path) != shard.sha256:
            raise DatasetInvalid(f"{path.name} is not the file that was signed for; copy it again.")
        opened = Shard.open(path)
    except FileNotFoundError:
        raise DatasetInvalid(f"{path.name} is missing; copy it again.") from None
    except OSError as error:
        raise DatasetInvalid(f"{path.name} can't be read: {error.strerror}.") from None
    except ShardCorrupt as error:
        raise DatasetInvalid(f"{path.name}: {error.message}") from None
    if opened.n != shard.samples or sum(licence.pictures for licence in shard.licences) != shard.samples:
        raise DatasetInvalid(f"{path.name} holds {opened.n} samples; its entry says something else.")


def licences(manifest: DatasetManifest) -> Counter[str]:
    """Return how many pictures, the held-out ones included, have which licence."""
    found: Counter[str] = Counter()
    for shard in (*manifest.shards, manifest.heldout):
        found.update({licence.name: licence.pictures for licence in shard.licences})
    return found


def sizes(manifest: DatasetManifest) -> Counter[str]:
    """Return how many pictures, the held-out ones included, have which size, as width x height."""
    found: Counter[str] = Counter()
    for shard in (*manifest.shards, manifest.heldout):
        found[f"{shard.width}x{shard.height}"] += shard.samples
    return found
