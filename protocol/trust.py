"""What a volunteer's client believes, in the only order in which it may come to believe it.

    1  the root's public key     whose SHA-256 is the run id in the join string
    2  the delegation            of a coordinator key, signed by the root, not expired
    3  the run config            signed by the root
    4  the endpoint statement    signed by the coordinator, naming the very certificate of this connection
    5  leases, receipts, verdicts, manifests, lists of pictures taken down: signed by the coordinator, for this run

`RunTrust` takes bytes and returns verified documents; it does no I/O and is told the time. Asking for a later step
before an earlier one is a programming mistake (`RuntimeError`); bad data raises a `Refusal`.
"""

from typing import Protocol, TypeVar

from protocol.canonical import sha256_hex
from protocol.documents import (
    BytesReceipt,
    ClaimReceipt,
    Delegation,
    Digest,
    Document,
    Endpoint,
    Lease,
    Manifest,
    RunConfig,
    RunId,
    Takedowns,
    Verdict,
    envelope_digest,
    verify,
)
from protocol.envelope import open_envelope
from protocol.errors import DelegationInvalid, EndpointUntrusted, Refusal, TakedownsDiffer, WrongRun
from protocol.keys import PublicKey
from protocol.limits import CLOCK_SKEW_MS, MAX_ENVELOPE_BYTES, MAX_PUBLIC_DOCUMENT_BYTES, MAX_TAKEDOWNS_BYTES


class _OfRun(Document, Protocol):
    @property
    def run(self) -> str: ...


S = TypeVar("S", bound=_OfRun)


class RunTrust:
    """Verifies a run's documents against the run id alone."""

    def __init__(self, run: RunId) -> None:
        self.run = run
        self._root: PublicKey | None = None
        self._coordinator: PublicKey | None = None
        self._config: RunConfig | None = None
        self._config_sha256: Digest | None = None

    @property
    def root(self) -> PublicKey:
        """The root key, once it was admitted."""
        if self._root is None:
            raise RuntimeError("admit_root comes first")
        return self._root

    @property
    def coordinator(self) -> PublicKey:
        """The coordinator key, once its delegation was admitted."""
        if self._coordinator is None:
            raise RuntimeError("admit_delegation comes first")
        return self._coordinator

    @property
    def config(self) -> RunConfig:
        """The run config, once it was admitted."""
        if self._config is None:
            raise RuntimeError("admit_config comes first")
        return self._config

    @property
    def config_sha256(self) -> Digest:
        """The digest of the run config's payload."""
        if self._config_sha256 is None:
            raise RuntimeError("admit_config comes first")
        return self._config_sha256

    def admit_root(self, public_key: bytes) -> None:
        """Step 1. Raise `EndpointUntrusted` unless the key's SHA-256 is the run id."""
        key = PublicKey(raw=public_key)
        if str(key.key_id) != self.run:
            # Stops anybody who answers at the right address with a run of their own.
            raise EndpointUntrusted(f"The server speaks for run {key.key_id}, not for run {self.run}.")
        self._root = key

    def admit_delegation(self, raw: bytes, *, now_ms: int) -> Delegation:
        """Step 2. Raise `DelegationInvalid` or `WrongRun` unless the root let this coordinator key act, still."""
        delegation = verify(Delegation, raw, self.root)
        self._same_run(delegation.run)
        if delegation.role != "coordinator":
            raise DelegationInvalid(f"The key is delegated as {delegation.role}, not as coordinator.")
        if now_ms > delegation.not_after_ms + CLOCK_SKEW_MS:
            # Stops a stolen coordinator key from being used after its time.
            raise DelegationInvalid(
                "The coordinator's delegation has expired; its operator must renew it with the root key."
            )
        self._coordinator = PublicKey.from_hex(delegation.public_key)
        return delegation

    def admit_auditor(self, raw: bytes, *, now_ms: int) -> PublicKey:
        """Return an auditor's key that the root delegated; raise `DelegationInvalid` or `WrongRun`."""
        delegation = verify(Delegation, raw, self.root)
        self._same_run(delegation.run)
        if delegation.role != "auditor":
            raise DelegationInvalid(f"The key is delegated as {delegation.role}, not as auditor.")
        if now_ms > delegation.not_after_ms + CLOCK_SKEW_MS:
            raise DelegationInvalid("The auditor's delegation has expired; the operator must renew it.")
        return PublicKey.from_hex(delegation.public_key)

    def admit_config(self, raw: bytes) -> RunConfig:
        """Step 3. Return the run config that the root signed."""
        payload = open_envelope(raw, RunConfig.TYPE, self.root, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)
        self._config = verify(RunConfig, raw, self.root, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)
        self._config_sha256 = Digest(sha256_hex(payload))
        return self._config

    def admit_endpoint(self, raw: bytes, *, certificate_sha256: str, now_ms: int) -> Endpoint:
        """Step 4. Raise `EndpointUntrusted` unless this connection's certificate is the one that was signed."""
        try:
            endpoint = verify(Endpoint, raw, self.coordinator)
            self._same_run(endpoint.run)
        except Refusal as refusal:
            raise EndpointUntrusted(f"The server's endpoint statement does not hold: {refusal.message}") from None
        if endpoint.certificate_sha256 != certificate_sha256:
            # Stops a man in the middle who relays the true statement over his own TLS connection.
            raise EndpointUntrusted(
                "The server shows a certificate that the run did not sign; somebody may sit in between."
            )
        if now_ms > endpoint.not_after_ms + CLOCK_SKEW_MS:
            raise EndpointUntrusted("The server's endpoint statement has expired; its operator must renew it.")
        return endpoint

    def lease(self, raw: bytes) -> Lease:
        """Step 5. Return a verified lease under this run's config."""
        lease = self._signed(Lease, raw)
        if lease.config_sha256 != self.config_sha256:
            raise WrongRun("The lease was made under another run config.")
        return lease

    def claim_receipt(self, raw: bytes) -> ClaimReceipt:
        """Step 5. Return a verified receipt of a claim."""
        return self._signed(ClaimReceipt, raw)

    def bytes_receipt(self, raw: bytes) -> BytesReceipt:
        """Step 5. Return a verified receipt of the bytes."""
        return self._signed(BytesReceipt, raw)

    def verdict(self, raw: bytes) -> Verdict:
        """Step 5. Return a verified verdict."""
        return self._signed(Verdict, raw)

    def manifest(self, raw: bytes) -> Manifest:
        """Step 5. Return a verified checkpoint manifest under this run's config."""
        manifest = self._signed(Manifest, raw, max_bytes=MAX_PUBLIC_DOCUMENT_BYTES)
        if manifest.config_sha256 != self.config_sha256:
            raise WrongRun("The manifest was made under another run config.")
        return manifest

    def takedowns(self, raw: bytes, sha256: str | None = None) -> Takedowns:
        """Step 5. Return a verified list of pictures taken down.

        Args:
            sha256: the digest that a manifest names; None takes whichever list this is.

        Raises:
            TakedownsDiffer: it is another list than that.
        """
        found = self._signed(Takedowns, raw, max_bytes=MAX_TAKEDOWNS_BYTES)
        digest = envelope_digest(Takedowns, raw, self.coordinator, max_bytes=MAX_TAKEDOWNS_BYTES)
        if sha256 not in (None, digest):
            raise TakedownsDiffer(f"The list of pictures taken down is {digest[:12]}, not {str(sha256)[:12]} as named.")
        return found

    def _signed(self, kind: type[S], raw: bytes, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> S:
        document = verify(kind, raw, self.coordinator, max_bytes=max_bytes)
        self._same_run(document.run)
        return document

    def _same_run(self, run: str) -> None:
        if run != self.run:
            raise WrongRun(f"The document belongs to run {run[:12]}, not to run {self.run[:12]}.")
