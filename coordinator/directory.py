"""A run on disk: where everything lies, who may use it, and what proves that it is a run.

DIR/run.toml           the operator's words
    run.json           the signed run config; a directory is a run from the moment this file is there
    keys/              coordinator.pem, tls.key, tls.crt, run_secret, auditor.pem: 0600 in 0700. Never the root key
    auditor/           cache and signed opinions of the run's own auditor
    takedowns/         pictures that the operator wants taken down, a file for each
    state.sqlite       blobs/  staging/  lock
    public/            static files, see `protocol.layout`
"""

import errno
import fcntl
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.settings import Settings
from protocol import layout
from protocol.canonical import sha256_hex
from protocol.documents import Delegation, Digest, Endpoint, RunConfig, RunId, sign
from protocol.errors import (
    DelegationInvalid,
    DirectoryInUse,
    DirectoryNotARun,
    DiskFull,
    KeyUnreadable,
    LocalProblem,
)
from protocol.keys import PrivateKey, PublicKey
from protocol.trust import RunTrust

RUN_SECRET_BYTES: Final = 32
PUBLIC_FOLDERS: Final = ("shards", "checkpoints", "deltas", "log", "metrics", "takedowns")
"""What lies under public/ beside the run's papers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """Everything that makes a coordinator the coordinator of its run. Holds secrets: never log or send it.

    `config_envelope` and `delegation_envelope` are the signed bytes to hand out; `certificate_sha256` is the digest of
    the certificate in DER form, which is what a TLS client sees.
    """

    run: RunId
    root_public: PublicKey
    coordinator: PrivateKey
    config: RunConfig
    config_sha256: Digest
    config_envelope: bytes
    delegation: Delegation
    delegation_envelope: bytes
    tls_key_pem: bytes
    tls_certificate_pem: bytes
    certificate_sha256: Digest
    run_secret: bytes


class RunDirectory:
    """The paths of a run's directory, and the reading of what `init` put there. Makes nothing by itself."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.settings_file = self.root / "run.toml"
        self.run_file = self.root / "run.json"
        self.keys = self.root / "keys"
        self.database = self.root / "state.sqlite"
        self.blobs = self.root / "blobs"
        self.staging = self.root / "staging"
        self.takedowns = self.root / "takedowns"
        self.lock_file = self.root / "lock"
        self.public = self.root / "public"
        self.founding = self.root / ".founding"

    @property
    def coordinator_key(self) -> Path:
        """The coordinator's private key."""
        return self.keys / "coordinator.pem"

    @property
    def tls_key(self) -> Path:
        """The private key of the TLS certificate."""
        return self.keys / "tls.key"

    @property
    def tls_certificate(self) -> Path:
        """The self-signed TLS certificate."""
        return self.keys / "tls.crt"

    @property
    def auditor_key(self) -> Path:
        """The private key of the run's own auditor, a referee that `serve` starts beside the coordinator."""
        return self.keys / "auditor.pem"

    @property
    def auditor_delegation(self) -> Path:
        """The root's delegation of that key."""
        return self.keys / "auditor-delegation.json"

    @property
    def auditor_home(self) -> Path:
        """Where that auditor keeps its cache and its opinions."""
        return self.root / "auditor"

    @property
    def run_secret(self) -> Path:
        """32 random bytes from which epoch secrets and audit draws follow."""
        return self.keys / "run_secret"

    @property
    def holds_run(self) -> bool:
        """Whether `init` has finished here."""
        return self.run_file.exists()

    def checkpoint(self, checkpoint: int) -> Path:
        """Return the public directory of a checkpoint."""
        return self.public / layout.checkpoint_directory(checkpoint)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; the kernel lets go when the process ends, however it ends.

        Raises:
            DirectoryInUse: another process holds it; the message names it.
            DirectoryNotARun: there is no such directory.
        """
        if not self.root.is_dir():
            raise self._not_a_run()
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DirectoryNotARun(f"{self.root} can't be used as a run's directory: {error.strerror}.") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                raise DirectoryInUse(
                    f"{self.root} is in use by process {holder or '(unknown)'}; stop that one first."
                ) from None
            if not _lies_at(self.lock_file, descriptor):  # an `init` that failed has just taken it away
                raise DirectoryInUse(f"{self.root} was in use until just now; try again.")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
            yield
        finally:
            os.close(descriptor)

    def settings(self) -> Settings:
        """Read run.toml; raises `ConfigInvalid`."""
        return Settings.load(self.settings_file)

    def trust(self) -> RunTrust:
        """Verify root key, delegation and run config, as a volunteer would, and return what they prove.

        A delegation's expiry is not judged here; see `RunIdentity.delegation`.

        Raises:
            DirectoryNotARun: there is no finished run here.
            Refusal: a file was changed since it was signed.
        """
        if not self.holds_run:
            raise self._not_a_run()
        root = PublicKey.from_hex(self._read(self.public / layout.ROOT_KEY).decode("ascii", "replace").strip())
        trust = RunTrust(RunId(str(root.key_id)))
        trust.admit_root(root.raw)
        trust.admit_delegation(self._read(self.public / layout.DELEGATION), now_ms=0)
        trust.admit_config(self._read(self.run_file))
        return trust

    def config(self) -> RunConfig:
        """Return the verified run config; reads no keys. Raises like `trust`."""
        return self.trust().config

    def identity(self) -> RunIdentity:
        """Verify the run and read its keys.

        Raises:
            DirectoryNotARun, Refusal: like `trust`.
            KeyUnreadable: a key file is missing or damaged.
            DelegationInvalid: the coordinator key is not the one that the root delegated.
        """
        trust = self.trust()
        coordinator = PrivateKey.load(self.coordinator_key)
        delegation_envelope = self._read(self.public / layout.DELEGATION)
        delegation = trust.admit_delegation(delegation_envelope, now_ms=0)
        if coordinator.public != trust.coordinator:
            raise DelegationInvalid(
                f"{self.coordinator_key} is key {coordinator.public.key_id[:12]}, but the root delegated "
                f"{trust.coordinator.key_id[:12]}; put the right key back, from a backup."
            )
        certificate = self._read_key(self.tls_certificate)
        secret = self._read_key(self.run_secret)
        if len(secret) != RUN_SECRET_BYTES:
            raise KeyUnreadable(f"{self.run_secret} has {len(secret)} bytes; it must have {RUN_SECRET_BYTES}.")
        return RunIdentity(
            run=trust.run,
            root_public=trust.root,
            coordinator=coordinator,
            config=trust.config,
            config_sha256=trust.config_sha256,
            config_envelope=self._read(self.run_file),
            delegation=delegation,
            delegation_envelope=delegation_envelope,
            tls_key_pem=self._read_key(self.tls_key),
            tls_certificate_pem=certificate,
            certificate_sha256=_certificate_sha256(certificate, self.tls_certificate),
            run_secret=secret,
        )

    def _not_a_run(self) -> DirectoryNotARun:
        return DirectoryNotARun(
            f"{self.root} holds no run; `commonweight coordinator init {self.root}` makes one there."
        )

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DirectoryNotARun(f"{path} can't be read ({error.strerror}); restore it from a backup.") from None

    def _read_key(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise KeyUnreadable(f"The key file {path} can't be read ({error.strerror}).") from None


def sign_endpoint(identity: RunIdentity, public_url: str, not_after_ms: int) -> bytes:
    """Return the signed statement that ties this run to its certificate and its public URL until a date."""
    statement = Endpoint(
        run=identity.run,
        certificate_sha256=identity.certificate_sha256,
        public_url=public_url,
        not_after_ms=not_after_ms,
    )
    return sign(statement, identity.coordinator)


@contextmanager
def disk_trouble_explained(what: str) -> Iterator[None]:
    """Turn what the operating system says about files into an error that says what was not done ("No run was made").

    Raises:
        DiskFull: the disk, or the quota, is full.
        LocalProblem: anything else that is wrong with a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{what}: the disk is full. Free some space and try again.") from None
        raise LocalProblem(f"{what}: {error.strerror or error} ({error.filename}).") from None


def _lies_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a small file so that after a crash it has its old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def _certificate_sha256(pem: bytes, path: Path) -> Digest:
    try:
        return Digest(sha256_hex(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))))
    except ValueError as error:
        raise KeyUnreadable(f"{path} holds no certificate: {error}.") from None
