"""The run's public log: numbered entries, each binding everything before it.

    head(n) = SHA-256(head(n - 1) || kind in ASCII || 0 || body),   head(0) = 32 zero bytes

A checkpoint's manifest signs the position and head at which its round closed; the entries up to there lie in
`log/NNNNNN.jsonl`, one JSON object a line.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from protocol.canonical import canonical_json, parse_json
from protocol.errors import PayloadInvalid

EMPTY_LOG_HEAD: Final = bytes(32)
"""The head of a log without entries, which the first entry hashes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One entry. `body` is canonical JSON; `head` is 32 bytes that bind everything up to this entry."""

    position: int
    kind: str
    body: bytes
    head: bytes


def next_head(previous: bytes, kind: str, body: bytes) -> bytes:
    """Return the log's head after an entry."""
    return hashlib.sha256(previous + kind.encode("ascii") + b"\0" + body).digest()


def log_line(entry: LogEntry) -> bytes:
    """Return an entry as a line of a public log file; the body is a text, so that its bytes stay what was hashed."""
    return (
        canonical_json(
            {
                "body": entry.body.decode("utf-8"),
                "head": entry.head.hex(),
                "kind": entry.kind,
                "position": entry.position,
            }
        )
        + b"\n"
    )


def read_log(raw: bytes, *, position: int, head: bytes) -> Iterator[LogEntry]:
    """Yield the entries of a log file that continues after (`position`, `head`), each checked against the chain.

    Raises:
        PayloadInvalid: a line is malformed, out of order, or does not follow from the one before it.
    """
    for line in raw.splitlines():
        value = parse_json(line)
        members = value if isinstance(value, dict) else {}
        kind, body = members.get("kind"), members.get("body")
        if not isinstance(kind, str) or not kind.isascii() or not isinstance(body, str):
            raise PayloadInvalid(f"Line {position + 1} of the log has no kind or no body.")
        position, head = position + 1, next_head(head, kind, body.encode("utf-8"))
        if members.get("position") != position or members.get("head") != head.hex():
            raise PayloadInvalid(f"Entry {position} of the log does not follow from the one before it.")
        yield LogEntry(position=position, kind=kind, body=body.encode("utf-8"), head=head)
