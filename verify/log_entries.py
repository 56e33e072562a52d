"""The entries of a run's public log that say who was audited, and why, as typed values.

The log itself (`protocol.log`) binds bytes; here their meaning begins. Kinds and members that a reader does not know
pass unread, so that a log may say more than this version understands.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

from protocol.documents import Count, Hex32, Share, ShortText
from protocol.errors import LogDiffers
from protocol.log import LogEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOpened:
    """The secret of an epoch is fixed: its SHA-256."""

    epoch: Count
    secret_sha256: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRevealed:
    """The secret of an epoch, in hex."""

    epoch: Count
    secret: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A claim came, and is audited with this probability (in 2^-24). `member` is its owner's pseudonym.

    `samples`: that its unit trains on, to which the probability is proportional.
    """

    claim: Hex32
    member: Hex32
    epoch: Count
    audit_share: Share
    samples: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """The bytes of a claim came."""

    claim: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOpened:
    """A claim is audited; `reason` is one of `coordinator.audits.AuditReason`."""

    audit: Count
    claim: Hex32
    reason: ShortText


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicated:
    """A replica of an audited claim was compared with it by sketch; the entry's kind says how it ended."""

    audit: Count
    claim: Hex32
    replica: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class OpinionLogged:
    """An auditor ran a claim's unit again."""

    audit: Count
    claim: Hex32
    auditor: Hex32
    finding: Literal["confirmed", "refuted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerMoved:
    """An owner's record changed."""

    member: Hex32
    event: Literal["audit-passed", "audit-failed", "promoted", "banned", "cleared"]
    state: Literal["probation", "established", "banned"]
    valid_in_row: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictLogged:
    """A claim was judged."""

    claim: Hex32
    code: ShortText


KINDS: Final[Mapping[str, type[Any]]] = {
    "epoch-opened": EpochOpened,
    "epoch-revealed": EpochRevealed,
    "claim": Claimed,
    "bytes": Delivered,
    "audit": AuditOpened,
    "agreed": Replicated,
    "disagreed": Replicated,
    "opinion": OpinionLogged,
    "owner": OwnerMoved,
    "verdict": VerdictLogged,
}
"""The entries that draws depend on; others pass unread."""

Said: TypeAlias = (
    EpochOpened
    | EpochRevealed
    | Claimed
    | Delivered
    | AuditOpened
    | Replicated
    | OpinionLogged
    | OwnerMoved
    | VerdictLogged
)


def parse_entry(entry: LogEntry) -> Said | None:
    """Return what an entry says; None for a kind that draws do not depend on.

    Raises:
        LogDiffers: the entry does not have the form of its kind.
    """
    if entry.kind not in KINDS:
        return None
    try:
        said: Said = _adapter(entry.kind).validate_json(entry.body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "its body"
        raise LogDiffers(f"Entry {entry.position} ({entry.kind}): {where}: {first['msg']}.") from None
    return said


@functools.cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(KINDS[kind])
