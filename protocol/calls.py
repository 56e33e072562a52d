"""The calls between worker and coordinator as frozen values, one per message of `wire/coordinator.proto`.

Field names are those of the proto file, which says what each is for; a test holds the two to each other.
"""

from dataclasses import dataclass
from enum import Enum, unique


@unique
class Instruction(Enum):
    """What the coordinator wants to see of a claim next."""

    SKETCH = 1
    UPLOAD = 2
    KEEP = 3
    DONE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GetEndpointRequest:
    """Ask who answers here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetEndpointReply:
    """Everything that `protocol.trust.RunTrust` needs to believe this connection."""

    root_public_key: bytes
    delegation_envelope: bytes
    config_envelope: bytes
    endpoint_envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStatusRequest:
    """Ask where the run stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStatusReply:
    """Where the run stands, in numbers."""

    round: int
    round_state: str
    planned_rounds: int
    checkpoint: int
    units_open: int
    units_assigned: int
    units_accepted: int
    devices_seen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GetNonceRequest:
    """Ask for a number to sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetNonceReply:
    """A number to sign once, within a minute."""

    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSessionRequest:
    """Prove a device key."""

    proof_envelope: bytes
    delegation_envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSessionReply:
    """A token for the calls of the next minutes."""

    token: bytes
    expires_in_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseUnitRequest:
    """Ask for a unit, waiting at most `wait_ms` for one."""

    wait_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseUnitReply:
    """A lease, or (with `lease_envelope` empty) why there is none and when to ask again."""

    lease_envelope: bytes = b""
    remaining_ms: int = 0
    base_checkpoint: int = 0
    retry_after_ms: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandBackRequest:
    """Give a unit back."""

    lease: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandBackReply:
    """The unit was taken back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitClaimRequest:
    """Commit to a result."""

    claim_envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitClaimReply:
    """The receipt of a claim and what comes next."""

    receipt_envelope: bytes
    next: Instruction


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitSketchRequest:
    """The sketch of a claim's decoded delta."""

    claim: bytes
    sketch: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitSketchReply:
    """What comes after the sketch."""

    next: Instruction


@dataclass(frozen=True, slots=True, kw_only=True)
class GetUploadRequest:
    """Ask how much of an artifact is stored."""

    claim: bytes
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GetUploadReply:
    """Bytes that are stored, and the receipt once every artifact arrived."""

    offset: int
    receipt_envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRequest:
    """A chunk of an artifact; the first of a stream names claim, role and offset."""

    claim: bytes = b""
    role: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadReply:
    """The receipt once every artifact arrived."""

    receipt_envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GetVerdictsRequest:
    """Ask for the verdicts of claims, named by the SHA-256 of their payloads."""

    claims: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetVerdictsReply:
    """The verdicts that are known."""

    verdict_envelopes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppealRequest:
    """Ask for a second referee on a rejected claim."""

    claim: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AppealReply:
    """The appeal is recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeAuditRequest:
    """An auditor asks for claims to judge, waiting at most `wait_ms` for some."""

    wait_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeAuditReply:
    """The claims of one unit, each with the public key of its device; or (without claims) when to ask again."""

    round: int = 0
    index: int = 0
    claim_envelopes: tuple[bytes, ...] = ()
    device_keys: tuple[bytes, ...] = ()
    remaining_ms: int = 0
    retry_after_ms: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadArtifactRequest:
    """An auditor reads a stored artifact of a claim that it judges."""

    claim: bytes
    role: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadArtifactReply:
    """At most 1 MiB from the offset on; empty at the end."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOpinionsRequest:
    """What the auditor found, one opinion for each claim that it was given."""

    opinion_envelopes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOpinionsReply:
    """The opinions are recorded."""
