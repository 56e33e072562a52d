"""Every limit on what the outside may send or ask, with its unit and its reason.

Nothing here is read from the environment: two peers that disagree on a limit disagree on the protocol.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

SECOND_MS: Final = 1_000
MINUTE_MS: Final = 60 * SECOND_MS
HOUR_MS: Final = 60 * MINUTE_MS
DAY_MS: Final = 24 * HOUR_MS

# --- gRPC messages -------------------------------------------------------------------------------------------
UPLOAD_CHUNK_BYTES: Final = 1 * MIB
"""Size of one upload chunk. 4 MiB was slower and doubled the server's memory; 64 KiB costs more calls."""
MAX_RECEIVE_BYTES: Final = 2 * MIB
"""Largest gRPC message that either side accepts, after decompression. This is what disarms a gzip bomb."""
MAX_METADATA_BYTES: Final = 8 * KIB
"""Largest set of gRPC headers. A session token and a few words fit in one tenth of it."""
MAX_CONCURRENT_RPCS: Final = 4_096
"""Calls that gRPC lets in at once; a backstop behind the limits below, which refuse with a code."""
MAX_CALLS_AT_ONCE: Final = 2_048
"""Calls served at once, all peers together; the next one is told to come back."""
MAX_CALLS_AT_ONCE_PER_ADDRESS: Final = 256
"""Calls that one address prefix may have open at once: some 80 workers with three calls each."""
MAX_CALLS_AT_ONCE_PER_DEVICE: Final = 12
"""Calls that one device may have open at once; a worker needs three or four."""
REQUEST_PATIENCE_MS: Final = 10 * SECOND_MS
"""Longest wait for a call's first message after its headers; a caller that says nothing loses its place."""
MAX_STREAMS_PER_CONNECTION: Final = 16
"""Calls that one connection may have open at once; a worker needs three."""
MAX_SESSIONS: Final = 65_536
"""Sessions and nonces held in memory; the oldest go first."""
MAX_CALLS_PER_MINUTE_PER_DEVICE: Final = 600
"""Calls that one device may make in a minute (upload chunks are not calls). A busy worker makes about ten."""
MAX_OPEN_CALLS_PER_MINUTE_PER_ADDRESS: Final = 1_200
"""Calls without a session that one address prefix may make in a minute; a household starts a few workers."""
UPLOAD_CHUNK_PATIENCE_MS: Final = 90 * SECOND_MS
"""Longest wait for the next chunk of an upload: 1 MiB at 12 KiB/s. A silent stream is cut and resumes later."""
UPLOAD_MIN_BYTES_PER_MINUTE: Final = UPLOAD_CHUNK_BYTES * MINUTE_MS // UPLOAD_CHUNK_PATIENCE_MS
"""The slowest uplink that this leaves room for; a worker sizes its deadlines by it."""

# --- documents -----------------------------------------------------------------------------------------------
MAX_ENVELOPE_BYTES: Final = 256 * KIB
"""Largest signed envelope taken over the wire. A claim is 2 KiB."""
MAX_PEER_DOCUMENT_BYTES: Final = 16 * KIB
"""Largest envelope that a volunteer may send: a claim is 3 KiB, and what is stored for ever must be small."""
MAX_DELEGATION_BYTES: Final = 2 * KIB
"""Largest envelope of a device's delegation, which is stored for each device; it has 600 bytes."""
MAX_PUBLIC_DOCUMENT_BYTES: Final = 64 * MIB
"""Largest signed document read from a file or over HTTP: a manifest that lists every delta of a big round."""
MAX_CAPTION_BYTES: Final = 16 * KIB
"""Longest caption in a shard, in UTF-8. Who trains makes tokens of all of it, in every step that draws it."""
MAX_TAKEDOWNS: Final = 16_384
"""Pictures that a run's list of those taken down can name. Every worker fetches all of it when it grows."""
MAX_TAKEDOWNS_BYTES: Final = 32 * MIB
"""Largest envelope of that list; one with short reasons has 300 bytes for each picture."""
MAX_SIGNATURES: Final = 4
"""Signatures on one envelope; one is usual."""
MAX_ARTIFACTS: Final = 4
"""Artifacts of one claim: the delta, and later its moments."""
MAX_TEXT_CHARACTERS: Final = 256
"""Longest free text that a volunteer sends (device class, trainer version)."""
MAX_VERDICT_QUERIES: Final = 256
"""Claims that one call may ask verdicts for."""
MAX_EVIDENCE_PER_LEASE: Final = 4
"""Claims kept beside the one that stands. One proves the conflict; more must not be a way to fill the database."""

MAX_OPINIONS: Final = 2
"""Opinions of one audit: on the claim, and on the replica of it."""

# --- files from the outside ----------------------------------------------------------------------------------
MAX_CONTAINER_HEADER_BYTES: Final = 1 * MIB
"""Largest header of an uploaded delta container. A header is compared, not parsed; 38 layers need 180 KiB."""
MAX_SHARD_HEADER_BYTES: Final = 64 * KIB
"""Largest header of a data shard: its tensors and one metadata key."""
MAX_CHECKPOINT_HEADER_BYTES: Final = 1 * MIB
"""Largest header of a checkpoint file that we read."""
MAX_SHARD_BYTES: Final = 2 * GIB
"""Largest data shard that a worker fetches."""
MAX_CHECKPOINT_BYTES: Final = 64 * GIB
"""Largest checkpoint file that a worker fetches; its owner's own cap is usually lower."""
SKETCH_FLOATS: Final = 1024
"""Buckets of a sketch: 4 kB tell a relative difference to about a tenth, far inside the gap that it must see."""
SKETCH_BYTES: Final = 4 * SKETCH_FLOATS

# --- time ----------------------------------------------------------------------------------------------------
NONCE_MS: Final = 1 * MINUTE_MS
"""How long a session nonce can be used."""
SESSION_MS: Final = 10 * MINUTE_MS
"""How long a session token is good for. It can fetch leases and send bytes; it can sign nothing."""
LEASE_WAIT_MS: Final = 20 * SECOND_MS
"""Longest that a call for work is held open before the worker is told to ask again."""
CLOCK_SKEW_MS: Final = 5 * MINUTE_MS
"""How far a volunteer's clock may be off before an expiry date of the run's own keys counts against it."""
COME_BACK_MS: Final = MINUTE_MS
"""Most that everybody gets, besides the time that a coordinator was away, to come back to it."""
STAGING_GRACE_MS: Final = 24 * HOUR_MS
"""How long an unfinished upload is kept after its lease ended."""
DELEGATION_MS: Final = 730 * DAY_MS
"""How long the root key lets a coordinator key act; within it the operator must fetch the root key once to renew."""
CERTIFICATE_MS: Final = 3_650 * DAY_MS
"""How long the coordinator's own certificate is good for; the signed endpoint statement is what limits its use."""

SETTLER_PATIENCE_MS: Final = 5 * MINUTE_MS
"""Longest wait for the settler to admit a delta, or to answer at all; then it counts as dead and is started again."""

APPEAL_MS: Final = 14 * DAY_MS
"""How long after a rejection the volunteer may appeal, and its delta is kept for that."""
AUDIT_PATIENCE_MS: Final = 10 * MINUTE_MS
"""Least time that an auditor has for one unit; a run with longer leases gives it twice a lease."""

UNMERGE_PER_ROUND: Final = 2**22
"""Weight, in 2^-24 of a merge, that one checkpoint takes out again: a quarter. All at once hurt for many rounds."""

# --- the public files ----------------------------------------------------------------------------------------
HTTP_HEADER_MS: Final = 10 * SECOND_MS
"""Longest wait for a request's headers on a new connection."""
MAX_HTTP_CONNECTIONS_PER_ADDRESS: Final = 256
"""HTTP connections that one address prefix may hold at once."""

# --- people --------------------------------------------------------------------------------------------------
LEASED_PER_DEVICE: Final = 1
"""Units that one device trains at once."""
LEASES_PER_OWNER_SHARE: Final = 4
"""One owner's devices may hold a quarter (1/4) of a round's units at once."""
KEPT_PER_ESTABLISHED: Final = 4
"""Units of a round that newcomers, whose keys are free, leave to each established owner: nobody can lock a round up."""
KEPT_SHARE: Final = 2
"""But at most half (1/2) of a round is kept so."""
LEASES_PER_OWNER_AT_LEAST: Final = 4
"""However small a round is, an owner with a few computers can use them all."""
UPLOADING_PER_DEVICE: Final = 1
"""Claims that one device may have without their bytes having arrived, beside the unit that it trains."""
WASTED_LEASES_PER_ROUND: Final = 8
"""Units of one round that an owner may hand back, let expire, or answer with bytes that are no delta. More looks like
shopping for a unit, and keeps others from working."""
