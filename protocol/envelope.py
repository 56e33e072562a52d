"""Signed envelopes over exact bytes, in the form of DSSE (github.com/secure-systems-lab/dsse).

The signature covers the payload's bytes and its type, each with its length in front, so that a lease can never be
replayed as a receipt and nothing is ever re-serialised to be verified.

    envelope = {"payload": BASE64, "payloadType": TYPE, "signatures": [{"keyid": ID, "sig": BASE64}]}

`open_envelope` takes bytes and gives the payload only after every check: size, form, type, signature.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from protocol.canonical import canonical_json, parse_json
from protocol.errors import DocumentRefused, EnvelopeInvalid, FormatUnknown, SignatureInvalid
from protocol.keys import KeyId, PrivateKey, PublicKey
from protocol.limits import MAX_ENVELOPE_BYTES, MAX_SIGNATURES


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed: `DSSEv1 LEN(type) type LEN(payload) payload`, lengths in bytes."""
    kind = payload_type.encode("ascii")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A parsed envelope whose signatures have not been looked at."""

    payload: bytes
    payload_type: str
    signatures: dict[KeyId, bytes]


def seal(payload: bytes, payload_type: str, key: PrivateKey) -> bytes:
    """Return the envelope's bytes with one signature by `key`."""
    signature = key.sign(pre_authentication_encoding(payload_type, payload))
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode("ascii"),
            "payloadType": payload_type,
            "signatures": [{"keyid": key.public.key_id, "sig": base64.b64encode(signature).decode("ascii")}],
        }
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise EnvelopeInvalid("An envelope's members are texts.")
    return value


def _decoded(value: Any) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except (binascii.Error, ValueError):
        raise EnvelopeInvalid("An envelope's payload and signatures are written in base64.") from None


def _signatures(value: Any) -> dict[KeyId, bytes]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_SIGNATURES:
        raise EnvelopeInvalid(f"An envelope has 1 to {MAX_SIGNATURES} signatures.")
    signatures: dict[KeyId, bytes] = {}
    for entry in value:
        if not isinstance(entry, dict):
            raise EnvelopeInvalid("A signature is an object with keyid and sig.")
        key_id = KeyId(_text(entry.get("keyid")))
        if key_id in signatures:
            # A key that signs twice must not count twice.
            raise EnvelopeInvalid("An envelope carries two signatures by one key.")
        signatures[key_id] = _decoded(entry.get("sig"))
    return signatures


def parse_envelope(raw: bytes, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> Envelope:
    """Read an envelope without checking its signatures; raise `EnvelopeInvalid`."""
    if len(raw) > max_bytes:
        raise EnvelopeInvalid(f"The envelope has {len(raw)} bytes; at most {max_bytes} are taken.")
    try:
        value = parse_json(raw)
    except EnvelopeInvalid:
        raise
    except DocumentRefused as error:
        raise EnvelopeInvalid(error.message) from None
    if not isinstance(value, dict):
        raise EnvelopeInvalid("An envelope is a JSON object.")
    return Envelope(
        payload=_decoded(value.get("payload")),
        payload_type=_text(value.get("payloadType")),
        signatures=_signatures(value.get("signatures")),
    )


def open_envelope(raw: bytes, payload_type: str, key: PublicKey, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> bytes:
    """Return the payload of an envelope that `key` signed.

    Checks in this order: 0 size, 1 form, 2 type (stops a document from being replayed as another kind),
    3 signature. Raises `EnvelopeInvalid`, `FormatUnknown` or `SignatureInvalid`.
    """
    envelope = parse_envelope(raw, max_bytes=max_bytes)  # 0, 1
    if envelope.payload_type != payload_type:  # 2
        raise FormatUnknown(f"Expected a document of type {payload_type}, not {envelope.payload_type[:80]!r}.")
    signature = envelope.signatures.get(key.key_id)  # 3
    if signature is None:
        raise SignatureInvalid(f"The document is not signed by key {key.key_id[:12]}, which must sign it.")
    key.verify(signature, pre_authentication_encoding(payload_type, envelope.payload))
    return envelope.payload
