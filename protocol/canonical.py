"""Canonical JSON (RFC 8785) for everything that is hashed or signed, and a strict reader for what comes back.

Signatures are checked over the bytes as received; canonical form matters only where two parties must arrive
at the same bytes on their own (the run config's digest, a manifest that is rebuilt after a crash).
"""

import hashlib
import json
import math
from typing import Any

import rfc8785

from protocol.errors import PayloadInvalid


def canonical_json(value: Any) -> bytes:
    """Return the RFC 8785 form of `value`: sorted keys, no spaces, one way to write each number."""
    return rfc8785.dumps(value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        # Two readers could each see another one of the two values: refuse to choose.
        raise PayloadInvalid("A JSON object names the same member twice.")
    return members


def _no_constant(name: str) -> Any:
    raise PayloadInvalid(f"JSON has no number called {name}.")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        # 1e999 is well-formed JSON, but no fp64 number, and could not be written again.
        raise PayloadInvalid("A JSON number is beyond the range of a double.")
    return value


def parse_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON; raise `PayloadInvalid` for duplicate members, numbers that are not finite, bad form."""
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an integer of 4,300 digits
        raise PayloadInvalid(f"This is not valid JSON: {error}.") from None


def sha256_hex(raw: bytes) -> str:
    """Return the SHA-256 of `raw` as 64 lower-case hex digits."""
    return hashlib.sha256(raw).hexdigest()
