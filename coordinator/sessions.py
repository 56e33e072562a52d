"""Sessions: a device proves its key once, then calls with a token for ten minutes.

The proof names the run, this server's certificate and a nonce that was given out a moment ago, so that it can be
replayed neither here nor against another server. A stolen token can fetch leases and send bytes; it signs nothing.
Everything is in memory: after a restart workers open new sessions by themselves. Nothing of a device is stored before
it gets a unit, so that making up keys fills no disk. Times are ticks of this process's own clock.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from protocol.documents import (
    Delegation,
    DeviceDelegation,
    Digest,
    RunConfig,
    RunId,
    SessionProof,
    parse_payload,
    verify,
)
from protocol.envelope import parse_envelope
from protocol.errors import (
    DelegationInvalid,
    NonceUnknown,
    NumericsMismatch,
    SessionRequired,
    TermsNotAccepted,
    WrongRun,
)
from protocol.keys import KeyId, PublicKey
from protocol.limits import MAX_DELEGATION_BYTES, MAX_PEER_DOCUMENT_BYTES, MAX_SESSIONS, NONCE_MS, SESSION_MS
from protocol.trust import RunTrust


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Who holds a token, and what the device said of itself. An auditor is its own device and its own owner."""

    device: KeyId
    device_key: PublicKey
    owner: KeyId
    owner_key: PublicKey
    proof: SessionProof
    delegation_envelope: bytes
    expires_ms: int
    auditor: bool = False


class Sessions:
    """Nonces and tokens of one running server."""

    def __init__(
        self,
        *,
        run: RunId,
        root: PublicKey,
        wall_ms: Callable[[], int],
        config: RunConfig,
        certificate_sha256: Digest,
        upgrade_hint: str,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._run = run
        self._root = root
        self._wall_ms = wall_ms
        self._config = config
        self._certificate_sha256 = certificate_sha256
        self._upgrade_hint = upgrade_hint
        self._random_bytes = random_bytes
        self._nonces: OrderedDict[str, int] = OrderedDict()
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()

    def nonce(self, now_ms: int) -> bytes:
        """Give out a number to sign once within a minute."""
        nonce = self._random_bytes(32)
        self._nonces[nonce.hex()] = now_ms + NONCE_MS
        while len(self._nonces) > MAX_SESSIONS:
            self._nonces.popitem(last=False)
        return nonce

    def prove(self, proof_envelope: bytes, delegation_envelope: bytes, now_ms: int) -> Session:
        """Check a device's or an auditor's proof and return the session that it may have.

        Checks: 0 the delegation, by the owner or by the root, 1 signature, 2 run and server, 3 nonce, 4 numerics,
        5 terms, which an auditor need not accept: it is the run's own.
        """
        unverified = parse_envelope(delegation_envelope, max_bytes=MAX_DELEGATION_BYTES)
        auditor = unverified.payload_type == Delegation.TYPE
        if auditor:  # 0
            owner_key = device_key = self._auditor_key(delegation_envelope)
        else:
            owner_key, device_key = _device_keys(delegation_envelope, unverified.payload)
        proof = verify(SessionProof, proof_envelope, device_key, max_bytes=MAX_PEER_DOCUMENT_BYTES)  # 1
        if proof.run != self._run:  # 2
            raise WrongRun(f"The session proof is for run {proof.run[:12]}; this is run {self._run[:12]}.")
        if proof.certificate_sha256 != self._certificate_sha256:
            # Stops a man in the middle from passing on a proof that was made for his own certificate.
            raise DelegationInvalid("The session proof names another server's certificate.")
        if self._nonces.pop(proof.nonce, 0) <= now_ms:  # 3, used once
            raise NonceUnknown
        if proof.numerics != self._config.numerics:  # 4
            raise NumericsMismatch(
                f"This run computes with numerics {self._config.numerics}, this worker ({proof.trainer_version}) with "
                f"{proof.numerics}. {self._upgrade_hint}"
            )
        if not auditor and proof.terms_sha256 != self._config.terms_sha256:  # 5
            raise TermsNotAccepted
        return Session(
            device=device_key.key_id,
            device_key=device_key,
            owner=owner_key.key_id,
            owner_key=owner_key,
            proof=proof,
            delegation_envelope=delegation_envelope,
            expires_ms=now_ms + SESSION_MS,
            auditor=auditor,
        )

    def _auditor_key(self, delegation_envelope: bytes) -> PublicKey:
        trust = RunTrust(self._run)
        trust.admit_root(self._root.raw)
        return trust.admit_auditor(delegation_envelope, now_ms=self._wall_ms())

    def open(self, session: Session) -> bytes:
        """Give out a token for a session."""
        token = self._random_bytes(32)
        self._sessions[hashlib.sha256(token).digest()] = session
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return token

    def session(self, token: bytes | None, now_ms: int) -> Session:
        """Return the session of a token; raise `SessionRequired` if it is missing, unknown or expired."""
        name = hashlib.sha256(token or b"").digest()
        session = self._sessions.get(name)
        if session is None:
            raise SessionRequired
        if session.expires_ms <= now_ms:
            del self._sessions[name]
            raise SessionRequired
        return session

    def devices(self, now_ms: int) -> int:
        """Return how many devices hold a session."""
        return len({session.device for session in self._sessions.values() if session.expires_ms > now_ms})


def _device_keys(delegation_envelope: bytes, unverified: bytes) -> tuple[PublicKey, PublicKey]:
    """Return the owner's and the device's key of a delegation that the owner signed."""
    claimed = parse_payload(DeviceDelegation, unverified)
    owner_key = PublicKey.from_hex(claimed.owner_public_key)
    delegation = verify(DeviceDelegation, delegation_envelope, owner_key)
    device_key = PublicKey.from_hex(delegation.device_public_key)
    if device_key == owner_key:
        raise DelegationInvalid("An owner's key can't be a device key as well; make a device key.")
    return owner_key, device_key
