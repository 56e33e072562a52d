"""A run's directory: its lock, what is believed of it, and what is refused."""

import base64
import json
import shutil
import socket
import ssl
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from commonweight.digits import write_digits
from coordinator.certificate import self_signed
from coordinator.directory import RunDirectory, RunIdentity, sign_endpoint
from coordinator.founding import found
from coordinator.settings import Settings
from protocol.canonical import sha256_hex
from protocol.documents import RunId
from protocol.errors import (
    DelegationInvalid,
    DirectoryInUse,
    DirectoryNotARun,
    EndpointUntrusted,
    KeyUnreadable,
    SignatureInvalid,
)
from protocol.keys import PrivateKey
from protocol.service import CERTIFICATE_NAME
from protocol.trust import RunTrust

NOW_MS = 1_800_000_000_000


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, RunIdentity]:
    place = tmp_path_factory.mktemp("founded")
    settings = Settings()
    shards, heldout = write_digits(place / "data", shards=4)
    directory = RunDirectory(place / "run")
    identity = found(
        directory,
        settings,
        shards=shards,
        heldout=heldout,
        root_key_out=place / "root.pem",
        seed=bytes(32),
        now_ms=NOW_MS,
    )
    return directory, identity


@pytest.fixture
def copied(founded: tuple[RunDirectory, RunIdentity], tmp_path: Path) -> RunDirectory:
    """A copy of the run, to be damaged."""
    shutil.copytree(founded[0].root, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def test_the_identity_is_what_a_volunteer_can_verify(founded: tuple[RunDirectory, RunIdentity]) -> None:
    directory, identity = founded
    trust = RunTrust(identity.run)
    trust.admit_root(identity.root_public.raw)
    trust.admit_delegation(identity.delegation_envelope, now_ms=NOW_MS)
    assert trust.admit_config(identity.config_envelope) == identity.config == directory.config()
    statement = sign_endpoint(identity, "http://127.0.0.1:7701", NOW_MS + 1)
    trust.admit_endpoint(statement, certificate_sha256=identity.certificate_sha256, now_ms=NOW_MS)
    with pytest.raises(EndpointUntrusted):
        trust.admit_endpoint(statement, certificate_sha256="0" * 64, now_ms=NOW_MS)
    with pytest.raises(DelegationInvalid, match="expired"):
        trust.admit_delegation(identity.delegation_envelope, now_ms=NOW_MS * 2)


def test_who_pins_the_certificate_connects_and_who_pins_another_does_not(
    founded: tuple[RunDirectory, RunIdentity],
) -> None:
    _, identity = founded
    server = grpc.server(futures.ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(identity.tls_key_pem, identity.tls_certificate_pem)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        shown = ssl.get_server_certificate(("127.0.0.1", port))
        assert sha256_hex(ssl.PEM_cert_to_DER_cert(shown)) == identity.certificate_sha256
        name = (("grpc.ssl_target_name_override", CERTIFICATE_NAME),)
        with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(shown.encode()), name) as channel:
            grpc.channel_ready_future(channel).result(timeout=10)
        assert _tls_version(port, shown) == "TLSv1.3"
        _, another = self_signed(NOW_MS)
        with pytest.raises(ssl.SSLCertVerificationError):
            _tls_version(port, another.decode())
    finally:
        server.stop(None)


def _tls_version(port: int, pinned: str) -> str | None:
    context = ssl.create_default_context(cadata=pinned)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname=CERTIFICATE_NAME) as secured,
    ):
        return secured.version()


def test_a_locked_directory_names_its_holder_and_is_free_when_the_holder_is_killed(
    founded: tuple[RunDirectory, RunIdentity],
) -> None:
    directory, _ = founded
    script = (
        "import sys, time; from pathlib import Path; from coordinator.directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(directory.root)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DirectoryInUse, match=str(holder.pid)), directory.lock():
            pass
        holder.kill()
        holder.wait()
    with directory.lock(), pytest.raises(DirectoryInUse), directory.lock():
        pass


def test_a_directory_without_a_run_says_how_to_make_one(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DirectoryNotARun, match="commonweight coordinator init"):
            RunDirectory(root).identity()
    with pytest.raises(DirectoryNotARun, match="init"), RunDirectory(tmp_path / "missing").lock():
        pass


def test_the_run_needs_no_keys_to_be_read(copied: RunDirectory) -> None:
    for path in copied.keys.iterdir():
        path.unlink()
    assert copied.config().name == "digits"
    with pytest.raises(KeyUnreadable):
        copied.identity()


def test_a_changed_run_config_is_refused(copied: RunDirectory) -> None:
    envelope = json.loads(copied.run_file.read_bytes())
    payload = base64.b64decode(envelope["payload"]).replace(b'"planned":20', b'"planned":21')
    copied.run_file.write_bytes(json.dumps(envelope | {"payload": base64.b64encode(payload).decode()}).encode())
    with pytest.raises(SignatureInvalid):
        copied.trust()


def test_another_coordinator_key_is_refused(copied: RunDirectory) -> None:
    copied.coordinator_key.unlink()
    PrivateKey.from_seed(bytes(32)).save(copied.coordinator_key)
    with pytest.raises(DelegationInvalid, match="put the right key back"):
        copied.identity()


def test_a_cut_run_secret_and_a_damaged_certificate_are_refused(copied: RunDirectory) -> None:
    secret = copied.run_secret.read_bytes()
    copied.run_secret.write_bytes(b"short")
    with pytest.raises(KeyUnreadable, match="5 bytes"):
        copied.identity()
    copied.run_secret.write_bytes(secret)
    copied.tls_certificate.write_bytes(b"no certificate")
    with pytest.raises(KeyUnreadable, match="holds no certificate"):
        copied.identity()


def test_the_run_id_is_the_name_of_the_root_key_that_left_the_directory(
    founded: tuple[RunDirectory, RunIdentity],
) -> None:
    directory, identity = founded
    exported = PrivateKey.load(directory.root.parent / "root.pem")
    assert RunId(str(exported.public.key_id)) == identity.run
    secret = (directory.root.parent / "root.pem").read_bytes().splitlines()[1]
    assert not [path for path in directory.root.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_keys_are_readable_by_their_owner_only(founded: tuple[RunDirectory, RunIdentity]) -> None:
    directory, _ = founded
    assert directory.keys.stat().st_mode & 0o777 == 0o700
    files = [*directory.keys.iterdir(), directory.root.parent / "root.pem"]
    assert {path.name for path in files} == {
        "coordinator.pem", "tls.key", "tls.crt", "run_secret", "auditor.pem", "auditor-delegation.json", "root.pem",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


@pytest.mark.parametrize(
    "module",
    [f"coordinator.{name}" for name in ("serve", "control_process", "public", "directory", "status", "takedowns")],
)
def test_processes_that_compute_nothing_do_not_load_torch(module: str) -> None:
    """It takes seconds and 200 MB, in each of them."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
