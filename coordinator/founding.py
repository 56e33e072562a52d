"""Founding a run: keys, run config, data and checkpoint 0, so that either all of it is there or nothing.

Everything is built under DIR/.founding and moved into its place; `run.json` comes last and makes the directory a run.
As long as there is a `.founding` and no `run.json`, founding was interrupted: what lies there is ours, and founding
again clears it away. The root key is written to `root_key_out` only; that file is taken up again.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from coordinator.certificate import self_signed
from coordinator.directory import (
    PUBLIC_FOLDERS,
    RUN_SECRET_BYTES,
    RunDirectory,
    RunIdentity,
    disk_trouble_explained,
    sync,
    write_file,
)
from coordinator.founding_checks import check_config, check_curated, check_evidence, check_shards
from coordinator.prepared_data import check_settings, describe
from coordinator.settings import Settings, render
from coordinator.signed import Curated, Described, run_config
from diloco.checkpoint import write_checkpoint
from diloco.genesis import initial_state
from diloco.shards import Shard
from mmdit.export import write_description
from protocol import layout
from protocol.canonical import sha256_hex
from protocol.documents import (
    DatasetManifest,
    Delegation,
    Digest,
    FileEntry,
    Manifest,
    RunConfig,
    RunId,
    ShardRef,
    StateEntry,
    digest_of,
    envelope_digest,
    sign,
)
from protocol.errors import (
    DelegationInvalid,
    DirectoryNotEmpty,
    KeyUnreadable,
)
from protocol.keys import PrivateKey, PublicKey
from protocol.limits import DELEGATION_MS, MAX_PUBLIC_DOCUMENT_BYTES

SEED_BYTES: Final = 32
_MARKER: Final = "root.pub"
"""In .founding: the public root key of the run that is being founded, written before the key itself is exported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedDataset:
    """A data set's manifest, as signed and as verified."""

    envelope: bytes
    manifest: DatasetManifest
    curator: PublicKey

    @property
    def curated(self) -> Curated:
        """What the run config says of it."""
        # Of the signed bytes: members that this version does not know are part of them.
        signed = envelope_digest(DatasetManifest, self.envelope, self.curator, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)
        return Curated(curator=self.curator.hex, manifest_sha256=signed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    shards: tuple[Path, ...]
    heldout: Path
    dataset: SignedDataset | None
    described: Described


def found(
    directory: RunDirectory,
    settings: Settings,
    *,
    shards: Sequence[Path],
    heldout: Path,
    root_key_out: Path,
    seed: bytes | None,
    now_ms: int,
    calibration: bytes | None = None,
    dataset: SignedDataset | None = None,
) -> RunIdentity:
    """Make a run in `directory`, with checkpoint 0 published in it.

    Args:
        settings: what run.toml says or shall say; the file is written if it is missing or says something else.
        shards: the training shards, in the run's order; they are copied.
        heldout: the shard that no unit trains on.
        root_key_out: where the root's private key goes. An existing file is never overwritten.
        seed: 32 bytes for the first weights, or None to draw them.
        now_ms: UTC milliseconds; the delegation and the certificate run from here.
        calibration: what `verification.evidence_sha256` is the digest of; it is published.
        dataset: what a curator has signed for the shards, which must be those, in that order; it is published.

    Raises:
        DirectoryNotEmpty: a run, or something else that is in the way, lies there.
        DirectoryInUse: another process uses the directory.
        ConfigInvalid: settings and data do not fit each other.
        DatasetInvalid: the shards are not what the curator has signed for.
        ShardCorrupt: a shard is not what it must be.
        KeyUnreadable: the root key can't be written, or a file of that name exists.
        DiskFull, LocalProblem: files could not be written; nothing is left behind.
    """
    if seed is not None and len(seed) != SEED_BYTES:
        raise ValueError(f"a run's seed has {SEED_BYTES} bytes, this one has {len(seed)}")
    if dataset is not None:
        check_settings(settings, dataset.manifest)
    described = describe(settings, None if dataset is None else dataset.manifest)
    check_shards(settings, described, shards, heldout)
    check_evidence(settings, calibration)
    if not directory.founding.exists():
        _refuse_key_file(root_key_out)
    with _held(directory), disk_trouble_explained("No run was made"):
        root = _clear(directory, root_key_out)
        with _undone_on_failure(directory, root_key_out):
            work = directory.founding
            write_file(work / _MARKER, root.public.hex.encode("ascii") + b"\n")
            data = _Data(shards=tuple(shards), heldout=heldout, dataset=dataset, described=described)
            envelope = _build(work, settings, data, root, seed or os.urandom(SEED_BYTES), now_ms)
            if dataset is not None:
                write_file(work / "public" / layout.DATASET, dataset.envelope)
            if calibration is not None:
                write_file(work / "public" / layout.CALIBRATION, calibration)
            write_settings(directory, settings)
            _sync_tree(work)
            _export(root, root_key_out)
            _commit(directory, envelope)
    return directory.identity()


def _clear(directory: RunDirectory, root_key_out: Path) -> PrivateKey:
    """Refuse what is not ours, clear away an interrupted founding, and return its root key, or else a new one."""
    if directory.holds_run:
        raise DirectoryNotEmpty(f"{directory.root} holds a run already; nothing was changed.")
    places = (
        directory.keys, directory.public, directory.database, directory.blobs, directory.staging, directory.takedowns,
    )  # fmt: skip
    marker = directory.founding / _MARKER
    if directory.founding.exists():
        interrupted = marker.read_text(encoding="ascii").strip() if marker.exists() else None
    else:
        in_the_way = [path.name for path in places if path.exists()]
        if in_the_way:
            raise DirectoryNotEmpty(
                f"{directory.root} holds {', '.join(in_the_way)} but no run; choose another directory."
            )
        interrupted = None
    root = _root_key(root_key_out, interrupted)
    if directory.founding.exists():
        for path in (directory.keys, directory.public, *directory.founding.iterdir()):
            if path != marker:
                _remove(path)
    directory.founding.mkdir(mode=0o700, exist_ok=True)
    return root


def _root_key(path: Path, interrupted: str | None) -> PrivateKey:
    if interrupted is not None and path.exists() and (key := PrivateKey.load(path)).public.hex == interrupted:
        return key
    _refuse_key_file(path)
    return PrivateKey.generate()


def _refuse_key_file(path: Path) -> None:
    if path.exists():
        raise KeyUnreadable(
            f"{path} exists; it may be the root key of another run and is never overwritten. Choose another place for "
            "the new key with --root-key."
        )
    if not path.parent.is_dir():
        raise KeyUnreadable(f"The root key can't be written to {path}: there is no directory {path.parent}.")


def _build(
    work: Path,
    settings: Settings,
    data: _Data,
    root: PrivateKey,
    seed: bytes,
    now_ms: int,
) -> bytes:
    """Make keys/ and public/ under `work`; return the signed run config."""
    coordinator, auditor = PrivateKey.generate(), PrivateKey.generate()
    _write_keys(work / "keys", coordinator, now_ms)
    auditor.save(work / "keys" / "auditor.pem")
    public = work / "public"
    for name in PUBLIC_FOLDERS:
        (public / name).mkdir(parents=True)
    checkpoint = public / layout.checkpoint_directory(0)
    config = run_config(
        settings,
        shards=tuple(_add_shard(path, public) for path in data.shards),
        heldout=_add_shard(data.heldout, public),
        seed=seed,
        genesis_sha256=_write_genesis(checkpoint, settings, data.described, seed),
        described=data.described,
        curated=None if data.dataset is None else data.dataset.curated,
    )
    check_config(config)
    if data.dataset is not None:
        check_curated(config, data.dataset.manifest)
    run = RunId(str(root.public.key_id))
    delegation = Delegation(
        run=run, role="coordinator", public_key=coordinator.public.hex, not_after_ms=now_ms + DELEGATION_MS
    )
    auditors = sign(delegate(run, auditor.public.hex, now_ms), root)
    write_file(work / "keys" / "auditor-delegation.json", auditors, mode=0o600)
    envelope = sign(config, root)
    for name, content in (
        (layout.RUN_CONFIG, envelope),
        (layout.ROOT_KEY, root.public.hex.encode("ascii") + b"\n"),
        (layout.DELEGATION, sign(delegation, root)),
    ):
        (public / name).write_bytes(content)
        # A checkpoint directory carries them too, so that it can be verified alone.
        (checkpoint / name).write_bytes(content)
    manifest = sign(_genesis_manifest(checkpoint, run, config), coordinator)
    (checkpoint / layout.MANIFEST).write_bytes(manifest)
    (public / layout.LATEST).write_bytes(manifest)
    return envelope


def delegate(run: RunId, public_key: str, now_ms: int) -> Delegation:
    """Return the statement, for the root key to sign, that lets a key judge claims of the run."""
    return Delegation(run=run, role="auditor", public_key=public_key, not_after_ms=now_ms + DELEGATION_MS)


def delegate_auditor(directory: RunDirectory, root_key: PrivateKey, public_key: str, *, now_ms: int) -> bytes:
    """Return the signed delegation of another auditor's key.

    Raises:
        DirectoryNotARun: there is no run here.
        DelegationInvalid: the key is not this run's root key.
    """
    run = directory.trust().run
    _require_root(root_key, run)
    return sign(delegate(run, PublicKey.from_hex(public_key).hex, now_ms), root_key)


def _require_root(key: PrivateKey, run: RunId) -> None:
    if str(key.public.key_id) != run:
        raise DelegationInvalid(f"That key is {key.public.key_id[:12]}; the root key of this run is {run[:12]}.")


def renew(directory: RunDirectory, root_key: PrivateKey, *, now_ms: int) -> Delegation:
    """Delegate the run's coordinator key anew with the root key; return what was signed.

    Volunteers see it with their next connection; checkpoints from then on carry it.

    Raises:
        DirectoryNotARun, KeyUnreadable: there is no run here, or its keys are damaged.
        DelegationInvalid: the key is not this run's root key.
    """
    identity = directory.identity()
    _require_root(root_key, identity.run)
    delegation = replace(identity.delegation, not_after_ms=now_ms + DELEGATION_MS)
    write_file(directory.public / layout.DELEGATION, sign(delegation, root_key))
    if directory.auditor_key.exists():
        auditor = PrivateKey.load(directory.auditor_key).public.hex
        write_file(directory.auditor_delegation, sign(delegate(identity.run, auditor, now_ms), root_key), mode=0o600)
    return delegation


def _write_keys(keys: Path, coordinator: PrivateKey, now_ms: int) -> None:
    keys.mkdir(mode=0o700)
    coordinator.save(keys / "coordinator.pem")
    key_pem, certificate_pem = self_signed(now_ms)
    for name, content in (
        ("tls.key", key_pem),
        ("tls.crt", certificate_pem),
        ("run_secret", os.urandom(RUN_SECRET_BYTES)),
    ):
        write_file(keys / name, content, mode=0o600)


def _add_shard(path: Path, public: Path) -> ShardRef:
    content = path.read_bytes()
    sha256 = sha256_hex(content)
    (public / layout.shard_path(sha256)).write_bytes(content)
    shard = Shard.open(content)
    _, height, width = shard.size
    return ShardRef(sha256=sha256, size=len(content), samples=shard.n, height=height, width=width)


def _write_genesis(checkpoint: Path, settings: Settings, described: Described, seed: bytes) -> Digest:
    """Write checkpoint 0's model files; return the digest of its weights."""
    shape = settings.model_shape()
    write_description(
        checkpoint,
        config=shape,
        conditioning=described.conditioning,
        space=described.space,
        shift=settings.training.shift,
        ema=settings.outer.ema_decay > 0,
    )
    return Digest(write_checkpoint(checkpoint / layout.WEIGHTS, initial_state(shape, seed)).sha256.hex())


def _genesis_manifest(checkpoint: Path, run: RunId, config: RunConfig) -> Manifest:
    """The momentum is absent, which means zeros; the log has not begun."""
    return Manifest(
        run=run,
        config_sha256=digest_of(config),
        checkpoint=0,
        snapshot=0,
        previous_manifest_sha256=None,
        outer=config.outer,
        weigh_seed=None,
        merged=(),
        unmerged=(),
        files=_describe_files(checkpoint),
        state=(StateEntry(role=layout.ROLE_WEIGHTS, path=layout.WEIGHTS),),
        takedowns_sha256=None,
        log_position=0,
        log_head="0" * 64,
    )


def _describe_files(directory: Path) -> tuple[FileEntry, ...]:
    entries = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append(FileEntry(path=path.relative_to(directory).as_posix(), sha256=sha256, size=path.stat().st_size))
    return tuple(entries)


def write_settings(directory: RunDirectory, settings: Settings) -> None:
    """Leave a run.toml that says what the run uses; other words of the operator are kept beside it, as run.toml.old."""
    file = directory.settings_file
    if file.exists():
        if Settings.load(file) == settings:
            return
        write_file(file.with_name("run.toml.old"), file.read_bytes())
    write_file(file, render(settings).encode("utf-8"))


def _export(root: PrivateKey, path: Path) -> None:
    """Write the root key so that its file is whole or absent, also when we are killed meanwhile."""
    if path.exists():
        return  # taken up from an interrupted founding
    partial = path.with_name(f".{path.name}.part")
    partial.unlink(missing_ok=True)
    root.save(partial)
    partial.rename(path)
    sync(path.parent)


def _commit(directory: RunDirectory, envelope: bytes) -> None:
    for place in (directory.keys, directory.public):
        (directory.founding / place.name).rename(place)
    sync(directory.root)
    write_file(directory.run_file, envelope)
    shutil.rmtree(directory.founding, ignore_errors=True)


@contextmanager
def _held(directory: RunDirectory) -> Iterator[None]:
    """Hold the directory, made if it is missing; where no run comes of it, what was made for holding it goes again."""
    made, had_lock = not directory.root.exists(), directory.lock_file.exists()
    with disk_trouble_explained("No run was made"):
        directory.root.mkdir(parents=True, exist_ok=True)
    with directory.lock():
        try:
            yield
        except BaseException:
            if not directory.holds_run and not had_lock:
                directory.lock_file.unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # the mark of the root key is still in it
                    directory.root.rmdir()
            raise


@contextmanager
def _undone_on_failure(directory: RunDirectory, root_key_out: Path) -> Iterator[None]:
    """Clear away what was made if founding fails by itself; after SIGKILL the next founding does it."""
    file = directory.settings_file
    said = file.read_bytes() if file.exists() else None
    try:
        yield
    except BaseException:
        if not directory.holds_run:
            if said is None:
                file.unlink(missing_ok=True)  # a later attempt would take it for the operator's own words
            elif file.read_bytes() != said:
                write_file(file, said)
                file.with_name("run.toml.old").unlink(missing_ok=True)
            # Once the key is exported, the marker must stay: it is what lets the next founding take the key up again.
            kept = {directory.founding / _MARKER} if root_key_out.exists() else set()
            for path in {directory.keys, directory.public, *directory.founding.iterdir()} - kept:
                _remove(path)
            if not kept:
                directory.founding.rmdir()
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        sync(path)
    sync(root)
