"""The signed documents: what each says, and the one way to turn it into bytes and back.

A document is a frozen dataclass with a `format` number; its payload is canonical JSON; its digest is the SHA-256 of
the payload. Members that a reader does not know are ignored and stay in the bytes; formats that it does not know are
refused. Byte strings are written in hex; times are UTC milliseconds.
"""

import functools
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, NewType, Protocol, TypeVar

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from protocol.canonical import canonical_json, parse_json, sha256_hex
from protocol.envelope import open_envelope, seal
from protocol.errors import FormatUnknown, PayloadInvalid
from protocol.keys import PrivateKey, PublicKey
from protocol.limits import MAX_ARTIFACTS, MAX_ENVELOPE_BYTES, MAX_TAKEDOWNS, MAX_TEXT_CHARACTERS

RunId = NewType("RunId", str)
UnitId = NewType("UnitId", str)
LeaseId = NewType("LeaseId", str)
Digest = NewType("Digest", str)
"""SHA-256, 64 lower-case hex digits."""

_HEX = StringConstraints(pattern=r"^[0-9a-f]{64}$")
Hex32 = Annotated[str, _HEX]
ShortText = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARACTERS)]
_MOST = 2**53 - 1
"""The largest integer that canonical JSON can write."""
Count = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]
Role = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
RelativePath = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")
]
"""A path inside a published directory: no leading slash, no part that starts with a dot."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[int, Field(ge=0, le=2**24)]
"""A share or a probability, in units of 2^-24."""
Code = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z_]{2,40}$")]


class Document(Protocol):
    """What every signed document has."""

    TYPE: ClassVar[str]
    FORMAT: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


D = TypeVar("D", bound=Document)


def _media_type(name: str) -> str:
    return f"application/vnd.commonweight.{name}+json"


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def payload_of(document: Document) -> bytes:
    """Return the document's canonical JSON bytes, which are what gets signed and hashed."""
    return canonical_json({"format": document.FORMAT, **asdict(document)})


def digest_of(document: Document) -> Digest:
    """Return the SHA-256 of the document's payload."""
    return Digest(sha256_hex(payload_of(document)))


def parse_payload(kind: type[D], payload: bytes) -> D:
    """Turn payload bytes into a `kind`; raise `FormatUnknown` or `PayloadInvalid` (which names the member)."""
    value = parse_json(payload)
    if not isinstance(value, dict):
        raise PayloadInvalid("A document is a JSON object.")
    found = value.get("format")
    if type(found) is not int or found != kind.FORMAT:  # true and 1.0 are equal to 1, and are not it
        # repr, because a stranger's text may hold what neither a terminal nor a gRPC status should be given.
        raise FormatUnknown(
            f"This {kind.__name__} has format {repr(found)[:20]}; this version reads format {kind.FORMAT}."
        )
    try:
        document: D = _adapter(kind).validate_json(payload, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise PayloadInvalid(f"{kind.__name__}: {where}: {first['msg']}.") from None
    return document


def sign(document: Document, key: PrivateKey) -> bytes:
    """Return the envelope of `document`, signed by `key`."""
    return seal(payload_of(document), document.TYPE, key)


def verify(kind: type[D], raw: bytes, key: PublicKey, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> D:
    """Bytes in, verified document out: size, form, type, signature, format, content. Raises `DocumentRefused`."""
    return parse_payload(kind, open_envelope(raw, kind.TYPE, key, max_bytes=max_bytes))


def envelope_digest(kind: type[D], raw: bytes, key: PublicKey, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> Digest:
    """Return the SHA-256 of the signed payload bytes of an envelope, after verifying it."""
    return Digest(sha256_hex(open_envelope(raw, kind.TYPE, key, max_bytes=max_bytes)))


# --- keys ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """The run's root key lets another key act in one role until a date."""

    TYPE: ClassVar[str] = _media_type("delegation")
    FORMAT: ClassVar[int] = 1
    run: Hex32
    role: Literal["coordinator", "auditor", "release"]
    public_key: Hex32
    not_after_ms: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDelegation:
    """An owner lets a device train in the owner's name."""

    TYPE: ClassVar[str] = _media_type("device-delegation")
    FORMAT: ClassVar[int] = 1
    owner_public_key: Hex32
    device_public_key: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerRevocation:
    """Signed by the owner at first start and kept aside: shown to a run, it ends the owner key."""

    TYPE: ClassVar[str] = _media_type("owner-revocation")
    FORMAT: ClassVar[int] = 1
    owner_public_key: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the coordinator answers, and the certificate that it shows there; signed by the coordinator key."""

    TYPE: ClassVar[str] = _media_type("endpoint")
    FORMAT: ClassVar[int] = 1
    run: Hex32
    certificate_sha256: Hex32
    public_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s]{1,500}$")]
    not_after_ms: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionProof:
    """A device shows that it holds its key, on this connection, now; signed by the device."""

    TYPE: ClassVar[str] = _media_type("session-proof")
    FORMAT: ClassVar[int] = 1
    run: Hex32
    certificate_sha256: Hex32
    nonce: Hex32
    numerics: Count
    trainer_version: ShortText
    device_class: ShortText
    terms_sha256: Hex32


# --- the run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRef:
    """One data shard: its bytes' digest and their number, how many samples it holds, and the size of its latents."""

    sha256: Hex32
    size: Count
    samples: Annotated[int, Field(ge=1, le=2**32)]
    height: Positive
    width: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """So many pictures of a kind: with a licence, or left out for a reason."""

    name: ShortText
    pictures: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedShard:
    """A shard of a prepared data set: as in a run config, with its pictures' size in pixels and their licences."""

    sha256: Hex32
    size: Positive
    samples: Annotated[int, Field(ge=1, le=2**32)]
    height: Positive
    width: Positive
    licences: Annotated[tuple[Counted, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetManifest:
    """What a curator has prepared, and stands behind; signed by the curator's key.

    `root` is the Merkle root (RFC 6962) over the digests of the training shards in their order; `encoder` says how
    pictures and captions became numbers, with the digests of the weights of any networks; `skipped` counts the pictures
    that were left out by reason.
    """

    TYPE: ClassVar[str] = _media_type("dataset")
    FORMAT: ClassVar[int] = 1
    name: ShortText
    source: ShortText
    licence: ShortText
    encoder: dict[str, Any]
    root: Hex32
    shards: Annotated[tuple[PreparedShard, ...], Field(min_length=1)]
    heldout: PreparedShard
    skipped: tuple[Counted, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """The training shards, one held-out shard, where the pictures come from, and who stands behind them.

    `root` is the Merkle root (RFC 6962) over the digests of the training shards in their order; `curator` the public
    key that has signed the data set's manifest, and `manifest_sha256` the digest of that, if there is one.
    """

    name: ShortText
    source: ShortText
    licence: ShortText
    root: Hex32
    curator: Hex32 | None
    manifest_sha256: Hex32 | None
    shards: Annotated[tuple[ShardRef, ...], Field(min_length=1)]
    heldout: ShardRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The inner loop of a work unit; every number that a replay needs. `text_dropout` counts in 2^-16.

    `shift` moves the timesteps of pictures of the model's size towards noise, of larger ones further.

    A unit is short, with `short_steps` instead of `steps`, if its id's first 24 bits are below `short_share`.
    """

    steps: Annotated[int, Field(ge=1, le=100_000)]
    short_steps: Annotated[int, Field(ge=1, le=100_000)]
    short_share: Annotated[int, Field(ge=0, le=2**24)]
    batch: Annotated[int, Field(ge=1, le=65_536)]
    lr: Finite
    lr_final_share: Finite
    warmup_steps: Count
    beta1: Finite
    beta2: Finite
    eps: Finite
    weight_decay: Finite
    grad_clip: Finite
    text_dropout: Annotated[int, Field(ge=0, le=65_536)]
    shift: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    segment_steps: Positive
    precision: Literal["fp32", "bf16"]
    optimizer: Literal["adamw", "adamw-factored"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How deltas are coded on their way up: `levels` 1 is ternary, 127 eight bits; `block` elements share a scale.

    `reach` (of the largest code, in mean magnitudes of a block) and `width` (of the dither, in scales) count in 2^-8.
    """

    kind: Literal["dither"]
    levels: Annotated[int, Field(ge=1, le=127)]
    block: Annotated[int, Field(ge=16, le=65_536)]
    reach: Annotated[int, Field(ge=256, le=16_384)]
    width: Annotated[int, Field(ge=0, le=256)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """How the outer step is coded on its way down: `threshold` counts in 2^-8 of a block's mean magnitude."""

    kind: Literal["dead-zone"]
    block: Annotated[int, Field(ge=16, le=65_536)]
    threshold: Annotated[int, Field(ge=1, le=1_024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterStep:
    """The outer SGD with Nesterov momentum (DiLoCo, arXiv 2311.08105, Algorithm 1).

    `ema_decay` is that of the running average of the checkpoints; 0 keeps none.
    """

    lr: Finite
    momentum: Finite
    ema_decay: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """From a round on, units train on pictures of about `side` x `side` latent pixels, whatever their proportions."""

    first_round: Annotated[int, Field(ge=1, le=10_000_000)]
    side: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """When a round closes, and what becomes of late work. `staleness_discount` counts in 2^-24 per round.

    `max_bytes_per_unit` is the most that the shards of a unit may have together. Without `stages` units train on all
    sizes from the first round on; the first stage begins with round 1.
    """

    planned: Annotated[int, Field(ge=1, le=10_000_000)]
    units: Annotated[int, Field(ge=1, le=1_000_000)]
    shards_per_unit: Annotated[int, Field(ge=1, le=65_536)]
    max_bytes_per_unit: Positive
    min_window_ms: Count
    min_units: Positive
    staleness_bound: Annotated[int, Field(ge=0, le=1_000)]
    staleness_discount: Annotated[int, Field(ge=0, le=2**24)]
    lease_ms: Annotated[int, Field(ge=1_000, le=_MOST)]
    upload_ms: Annotated[int, Field(ge=1_000, le=_MOST)]
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How claims are judged. Shares and probabilities count in 2^-24.

    mode: "replay" has work units run again; "none" checks form and finiteness only, for volunteers who know each other.
    tolerance: largest least raw difference that a referee calls honest, relative to the raw delta's norm.
    code_tolerance: largest D = |Q(a) - Q(b)|^2 / |Q(b)|^2 of decoded codes that counts as agreement.
    probation: audits in a row that a new owner must pass; until then every claim is audited before it merges.
    floor: smallest probability with which an established owner's claim is audited.
    referee_share: share of agreeing replicas that a referee replays all the same.
    ramp: audits passed in a row from which an owner's unaudited deltas count in full.
    owner_cap: largest share of a merge that one owner's deltas may have, where the others can fill the rest.
    weighting: the rule that gives each delta its weight by its sketch.
    hostile_share: share of a merge's deltas that the weighting withstands.
    unmerge_from: raw difference from which a refuted delta that was merged is taken out again. Below it the honest work
        that would go with it is more than what is wrong in it; it stays, without credit.
    norm_bound: a delta whose norm is over this many times the median is audited, and clipped to it.
    screen_triples: (picture, timestep, noise) triples of the held-out screen of unaudited deltas; 0 is no screen.
    evidence_sha256: digest of the calibration that the tolerances come from; None for the start values.
    """

    mode: Literal["replay", "none"]
    tolerance: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    code_tolerance: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    probation: Annotated[int, Field(ge=1, le=10_000)]
    floor: Share
    referee_share: Share
    ramp: Annotated[int, Field(ge=1, le=1_000_000)]
    owner_cap: Annotated[int, Field(ge=1, le=2**24)]
    weighting: Literal["mean", "geometric-median", "multi-krum", "nnm-clip"]
    hostile_share: Annotated[int, Field(ge=0, lt=2**23)]
    unmerge_from: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    norm_bound: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    screen_triples: Annotated[int, Field(ge=0, le=65_536)]
    evidence_sha256: Hex32 | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's bytes and rules, complete; signed by the root key.

    `model`, `conditioning` and `space` are the JSON objects that `mmdit` reads and that a published checkpoint carries.
    """

    TYPE: ClassVar[str] = _media_type("run-config")
    FORMAT: ClassVar[int] = 6
    name: ShortText
    numerics: Count
    verification: Verification
    seed: Hex32
    model: dict[str, Any]
    conditioning: dict[str, Any]
    space: dict[str, Any]
    data: DataSet
    training: Training
    codec: Codec
    patch: Patch
    outer: OuterStep
    rounds: Rounds
    genesis_sha256: Hex32
    weights_licence: ShortText
    terms: Annotated[str, StringConstraints(max_length=65_536)]

    @property
    def terms_sha256(self) -> Digest:
        """What a volunteer accepts: the terms and the weights' licence."""
        return Digest(sha256_hex(canonical_json([self.terms, self.weights_licence])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Takedown:
    """A picture that no unit of `from_round` or a later round draws: a shard, and a sample's number in it, from 0.

    `reason` is for people, and public.
    """

    shard: Hex32
    sample: Annotated[int, Field(ge=0, lt=2**32)]
    from_round: Positive
    reason: ShortText


@dataclass(frozen=True, slots=True, kw_only=True)
class Takedowns:
    """Every picture that the run has taken down so far, in the order in which it was done. A list only grows.

    The manifest of a checkpoint names the list that holds for the units of the round after it.
    """

    TYPE: ClassVar[str] = _media_type("takedowns")
    FORMAT: ClassVar[int] = 1
    run: Hex32
    entries: Annotated[tuple[Takedown, ...], Field(min_length=1, max_length=MAX_TAKEDOWNS)]


# --- a unit --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactLimit:
    """An artifact that a lease lets its device upload."""

    role: Role
    max_bytes: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file that a claim commits to: the digest of its meaning, of its bytes, and its size."""

    role: Role
    content_sha256: Hex32
    blob_sha256: Hex32
    size: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The coordinator lets one device train one unit, and upload its artifacts. Names no role and no attempt.

    `takedowns_sha256` is the digest of the list of pictures taken down that holds for the unit; None: there are none.
    """

    TYPE: ClassVar[str] = _media_type("lease")
    FORMAT: ClassVar[int] = 2
    run: Hex32
    config_sha256: Hex32
    lease: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    device: Hex32
    unit: Hex32
    round: Positive
    index: Count
    base_sha256: Hex32
    shards: Annotated[tuple[Hex32, ...], Field(min_length=1)]
    takedowns_sha256: Hex32 | None
    seed: Hex32
    artifacts: Annotated[tuple[ArtifactLimit, ...], Field(min_length=1, max_length=MAX_ARTIFACTS)]
    duration_ms: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A device commits to what it computed, before anything is uploaded; signed by the device.

    `lease_sha256` is the digest of the lease's payload, which binds run, round, unit, base, shards, takedowns, seed and
    config.
    """

    TYPE: ClassVar[str] = _media_type("claim")
    FORMAT: ClassVar[int] = 1
    run: Hex32
    lease: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    lease_sha256: Hex32
    unit: Hex32
    device: Hex32
    artifacts: Annotated[tuple[Artifact, ...], Field(min_length=1, max_length=MAX_ARTIFACTS)]
    trail_root: Hex32
    salt: Hex32
    samples: Count
    loss: Finite
    trainer_version: ShortText
    device_class: ShortText


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimReceipt:
    """The coordinator has stored a claim: its place in the log and the seed of the sketch that must follow.

    `audit_share` is the probability of an audit, in 2^-24, fixed by the log before `log_position`. Whether the claim
    was drawn follows from the epoch's secret, whose SHA-256 is `secret_sha256` and which is revealed afterwards.
    """

    TYPE: ClassVar[str] = _media_type("claim-receipt")
    FORMAT: ClassVar[int] = 2
    run: Hex32
    claim: Hex32
    epoch: Count
    log_position: Count
    sketch_seed: Hex32
    audit_share: Share
    secret_sha256: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesReceipt:
    """The coordinator has stored and checked a claim's artifacts; from here no crash or late round loses the work."""

    TYPE: ClassVar[str] = _media_type("bytes-receipt")
    FORMAT: ClassVar[int] = 1
    run: Hex32
    claim: Hex32
    artifacts: Annotated[tuple[Artifact, ...], Field(min_length=1, max_length=MAX_ARTIFACTS)]
    log_position: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a claim. `weight` counts in 2^-24 of the merge; `checkpoint` is the one that holds it, or none."""

    TYPE: ClassVar[str] = _media_type("verdict")
    FORMAT: ClassVar[int] = 1
    run: Hex32
    claim: Hex32
    unit: Hex32
    outcome: Literal["accepted", "rejected"]
    code: Code
    sentence: Annotated[str, StringConstraints(max_length=500)]
    weight: Count
    checkpoint: Count | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """What an auditor found by running a claim's unit again; signed by the auditor's key.

    `raw_difference` is the least raw difference consistent with the claimed codes, relative to the norm of the
    auditor's own raw delta; `code_difference` is D between the claimed and the auditor's decoded delta.
    `content_sha256` is the auditor's own result. `finding`: within both tolerances of the run, or not.
    """

    TYPE: ClassVar[str] = _media_type("opinion")
    FORMAT: ClassVar[int] = 1
    run: Hex32
    claim: Hex32
    unit: Hex32
    auditor: Hex32
    finding: Literal["confirmed", "refuted"]
    raw_difference: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    code_difference: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    trail_agrees: bool
    content_sha256: Hex32
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    trainer_version: ShortText
    device_class: ShortText


# --- a published checkpoint ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeEntry:
    """One delta of a merge. `weight` and `influence` count in 2^-24; `member` is the owner's pseudonym in this run.

    `audited`: an audit confirmed it. `influence` is what the owner's record lets an unaudited delta count; one for a
    confirmed one.
    `late` is the rounds by which its bytes came late, which the staleness discount counts; waiting for an audit is not
    the volunteer's lateness.
    """

    claim: Hex32
    unit: Hex32
    round: Positive
    blob_sha256: Hex32
    content_sha256: Hex32
    size: Count
    weight: Share
    samples: Count
    member: Hex32
    audited: bool
    influence: Share
    late: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergeEntry:
    """A delta that is taken out again: merged with `weight` into `checkpoint`, refuted afterwards.

    Its whole effect up to the checkpoint before this one is subtracted before this round's merge; what was published
    stays as it is.
    """

    claim: Hex32
    unit: Hex32
    checkpoint: Positive
    blob_sha256: Hex32
    content_sha256: Hex32
    size: Count
    weight: Share
    member: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One published file: path inside the checkpoint directory, SHA-256, size in bytes."""

    path: RelativePath
    sha256: Hex32
    size: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class StateEntry:
    """One part of a round's canonical state (weights, momentum) and the file that holds it."""

    role: Role
    path: RelativePath


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A published checkpoint, complete: what went in, with which weights, and every file that came out.

    `weigh_seed` is the seed of the sketches that the weights follow from; None where no sketch weighed anything.
    `snapshot` is the newest checkpoint up to this one whose whole state is kept for ever. Of others only the patch is,
    which leads from the weights of the checkpoint before to theirs.
    `takedowns_sha256` is the digest of the list of pictures that units of the next round leave out; None: there are
    none.
    Holds no time, so that publishing again after a crash gives the same bytes.
    """

    TYPE: ClassVar[str] = _media_type("manifest")
    FORMAT: ClassVar[int] = 4
    run: Hex32
    config_sha256: Hex32
    checkpoint: Count
    snapshot: Count
    previous_manifest_sha256: Hex32 | None
    outer: OuterStep
    weigh_seed: Hex32 | None
    merged: tuple[MergeEntry, ...]
    unmerged: tuple[UnmergeEntry, ...]
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    state: Annotated[tuple[StateEntry, ...], Field(min_length=1)]
    takedowns_sha256: Hex32 | None
    log_position: Count
    log_head: Hex32

    def file(self, path: str) -> FileEntry:
        """Return the entry of `path`; raise `PayloadInvalid` if the manifest lists no such file."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise PayloadInvalid(f"The manifest of checkpoint {self.checkpoint} lists no file {path}.")

    def state_file(self, role: str) -> FileEntry | None:
        """Return the file that holds a part of the round's state, or None if this checkpoint has no such part."""
        for part in self.state:
            if part.role == role:
                return self.file(part.path)
        return None


DOCUMENTS: tuple[type[Document], ...] = (
    Delegation, DeviceDelegation, OwnerRevocation, Endpoint, SessionProof, RunConfig,
    Lease, Claim, ClaimReceipt, BytesReceipt, Verdict, Opinion, Manifest, DatasetManifest, Takedowns,
)  # fmt: skip
"""Every signed document."""
