"""Tables of the protocol: signed documents, calls and their messages, errors, limits."""

import ast
import inspect
import re
import types
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

import protocol.limits
from docs.markdown import table
from protocol import documents as signed
from protocol.errors import CommonweightError, all_errors
from protocol.limits import DAY_MS, GIB, HOUR_MS, KIB, MIB, MINUTE_MS, SECOND_MS
from protocol.service import CALLS

PROTO: Final = Path(signed.__file__).parent / "wire" / "coordinator.proto"

SIGNERS: Final[dict[type[Any], str]] = {
    signed.Delegation: "run root",
    signed.DeviceDelegation: "owner",
    signed.OwnerRevocation: "owner",
    signed.Endpoint: "coordinator",
    signed.SessionProof: "device",
    signed.RunConfig: "run root",
    signed.Lease: "coordinator",
    signed.Claim: "device",
    signed.ClaimReceipt: "coordinator",
    signed.BytesReceipt: "coordinator",
    signed.Verdict: "coordinator",
    signed.Opinion: "auditor",
    signed.Manifest: "coordinator",
    signed.DatasetManifest: "curator",
    signed.Takedowns: "coordinator",
}
"""Which key signs a document; one that is missing here stops the generator."""

_NAMED: Final[tuple[tuple[object, str], ...]] = (
    (signed.Hex32, "64 hex digits"),
    (signed.ShortText, "text of at most 256 characters"),
    (signed.Count, "whole number from 0"),
    (signed.Positive, "whole number from 1"),
    (signed.Role, "role: a lower-case word"),
    (signed.RelativePath, "relative path"),
    (signed.Finite, "finite number"),
    (signed.Share, "whole number from 0 to 16,777,216 (units of 2^-24)"),
    (bool, "true or false"),
    (dict[str, Any], "JSON object"),
    (str, "text"),
)
_PARTS: Final = (
    signed.ShardRef, signed.DataSet, signed.Training, signed.Codec, signed.OuterStep, signed.Rounds,
    signed.Verification, signed.ArtifactLimit, signed.Artifact, signed.MergeEntry, signed.UnmergeEntry,
    signed.FileEntry, signed.StateEntry, signed.PreparedShard, signed.Counted,
    signed.Takedown,
)  # fmt: skip
_SCALES: Final = {
    "MS": ((DAY_MS, "days"), (HOUR_MS, "h"), (MINUTE_MS, "min"), (SECOND_MS, "s")),
    "BYTES": ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")),
}
_PLAIN_CONSTANTS: Final = frozenset({"KIB", "MIB", "GIB", "SECOND_MS", "MINUTE_MS", "HOUR_MS", "DAY_MS"})

# --- documents -----------------------------------------------------------------------------------------------


def documents() -> str:
    """Return every signed document with its signer and its members, then the parts that they are made of."""
    parts = [
        f"\n#### {kind.__name__}\n\n{_summary(kind)}\n\n"
        f"Signed by: {SIGNERS[kind]}. Type: `{kind.TYPE}`. Format: {kind.FORMAT}.\n{_members(kind)}"
        for kind in signed.DOCUMENTS
    ]
    parts.append("\n#### Parts of documents\n")
    parts += [f"\n**{kind.__name__}.** {_summary(kind)}\n{_members(kind)}" for kind in _PARTS]
    return re.sub(r"\n{3,}", "\n\n", "".join(parts))


def _summary(kind: type[Any]) -> str:
    """Return what a document's docstring says of the whole of it."""
    return _docstring(kind)[0]


def _members(kind: type[Any]) -> str:
    meanings = _docstring(kind)[1]
    rows = [(f"`{field.name}`", _shown(field.type)) for field in fields(kind)]
    if not meanings:
        return table(("member", "value"), rows)
    said = [meanings.get(field.name, "") for field in fields(kind)]
    return table(("member", "value", "meaning"), [(*row, words) for row, words in zip(rows, said, strict=True)])


def _docstring(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """Return a docstring without, and of, its lines of the form "member: meaning"; a meaning may take several lines."""
    names = {field.name for field in fields(kind)}
    words: dict[str, list[str]] = {"": []}
    last = ""
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        name, colon, meaning = line.partition(": ")
        last = name if colon and name in names else last if line else ""
        words.setdefault(last, []).append(meaning if last == name else line)
    said = {name: " ".join(" ".join(lines).split()) for name, lines in words.items()}
    return said.pop(""), said


def _shown(kind: Any) -> str:
    """Return what a member's value may be, for a person."""
    for known, words in _NAMED:
        if kind == known:
            return words
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, Union):
        return " or ".join("null" if part is type(None) else _shown(part) for part in arguments)
    if origin is tuple:
        return f"list of {_shown(arguments[0])}"
    if origin is Annotated:
        return _bounded(arguments[0], arguments[1:])
    return str(kind.__name__)


def _bounded(kind: Any, notes: tuple[object, ...]) -> str:
    plain = [part for note in notes for part in (note.metadata if isinstance(note, FieldInfo) else [note])]
    low = next((part.ge for part in plain if isinstance(part, annotated_types.Ge)), None)
    high = next((part.le for part in plain if isinstance(part, annotated_types.Le)), None)
    above = next((part.gt for part in plain if isinstance(part, annotated_types.Gt)), None)
    below = next((part.lt for part in plain if isinstance(part, annotated_types.Lt)), None)
    if kind in (int, float):
        lowest = f" from {low:,}" if low is not None else f" above {above:,}" if above is not None else ""
        highest = "" if high in (None, 2**53 - 1) else f" to {high:,}" if low is not None else f", at most {high:,}"
        if below is not None:
            highest = f", below {below:,}"
        return ("whole number" if kind is int else "finite number") + lowest + highest
    least = next((part.min_length for part in plain if isinstance(part, annotated_types.MinLen)), None)
    most = next((part.max_length for part in plain if isinstance(part, annotated_types.MaxLen)), None)
    if get_origin(kind) is tuple:
        return f"{_shown(kind)}, {least} or more" if most is None else f"{_shown(kind)}, {least} to {most}"
    for part in plain:
        if pattern := getattr(part, "pattern", None):
            return f"text matching `{pattern}`"
        if longest := getattr(part, "max_length", None):
            return f"text of at most {longest:,} characters"
    raise TypeError(f"no words for {kind} with {notes}")


# --- calls ---------------------------------------------------------------------------------------------------


def calls() -> str:
    """Return every RPC with its messages, who may make it, and what it is for."""
    comments = _rpc_comments()
    who = {"open": "anybody", "session": "a device with a session", "auditor": "an auditor with a session"}
    return table(
        ("call", "who may", "request", "reply", "what for"),
        [
            (
                f"`{name}`",
                who[call.auth.value],
                ("stream of " if call.client_streams else "") + f"`{call.request.__name__}`",
                f"`{call.reply.__name__}`",
                comments[name],
            )
            for name, call in CALLS.items()
        ],
    )


def _rpc_comments() -> dict[str, str]:
    text = PROTO.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for comment, name in re.findall(r"((?:^ +//.*\n)+) +rpc (\w+)\(", text, re.MULTILINE):
        sentence = " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())
        # Who may call stands in the table's own column.
        found[name] = re.sub(r"All that follows needs [^.]*\. | Open to everybody.*", "", sentence)
    return found


def messages() -> str:
    """Return every message of the wire that has fields."""
    text = PROTO.read_text(encoding="utf-8")
    rows = []
    for name, body in re.findall(r"^message (\w+) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        for kind, field, number, comment in re.findall(
            r"^ +((?:repeated )?\w+) (\w+) = (\d+);(?: +// (.*))?$", body, re.MULTILINE
        ):
            rows.append((f"`{name}`", f"`{field}`", number, f"`{kind}`", comment))
    return table(("message", "field", "number", "type", "meaning"), rows)


# --- errors --------------------------------------------------------------------------------------------------


def errors() -> str:
    """Return every error with its code, family, sentence, gRPC status and exit code."""
    return table(
        ("code", "family", "sentence", "gRPC status", "exit code"),
        [
            (f"`{kind.code}`", _family(kind), kind().message, f"`{kind.status}`", str(kind.exit_code))
            for kind in all_errors()
        ],
    )


def _family(kind: type[CommonweightError]) -> str:
    parent = kind.__bases__[0]
    return "(family)" if parent is CommonweightError else parent.__name__


# --- limits --------------------------------------------------------------------------------------------------


def limits() -> str:
    """Return every limit with its value and its reason."""
    return table(
        ("limit", "value", "why"), [(f"`{name}`", _value(name), reason) for name, reason in limit_reasons().items()]
    )


def limit_reasons() -> dict[str, str]:
    """Return what `protocol.limits` says about each limit."""
    module = ast.parse(Path(protocol.limits.__file__).read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    last = ""
    for node in module.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
            if last not in _PLAIN_CONSTANTS:
                found[last] = ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last in found:
            found[last] = " ".join(str(node.value.value).split())
    return found


def _value(name: str) -> str:
    value: int = getattr(protocol.limits, name)
    unit = next((part for part in _SCALES if name.endswith(part)), None)
    for size, word in _SCALES.get(unit or "", ()):
        if (value >= 2 * size and value % size == 0) or value == size != DAY_MS:
            return f"{value // size:,} {word}"
    return f"{value:,}" + (" bytes" if "BYTES" in name else " ms" if name.endswith("MS") else "")
