"""The one place where generated protobuf messages and our values (`protocol.calls`) are turned into each other."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from protocol import calls
from protocol.errors import PayloadInvalid
from protocol.wire import coordinator_pb2

M = TypeVar("M")


def _message_class(kind: type[Any]) -> Any:
    return getattr(coordinator_pb2, kind.__name__)


def encode(value: Any) -> bytes:
    """Return the protobuf bytes of a value of `protocol.calls`."""
    members = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(members.get("next"), calls.Instruction):
        members["next"] = members["next"].value
    encoded: bytes = _message_class(type(value))(**members).SerializeToString()
    return encoded


def decoder(kind: type[M]) -> Callable[[bytes], M]:
    """Return the function that turns protobuf bytes into a `kind`; it raises `PayloadInvalid`."""
    message_class = _message_class(kind)
    names = tuple(field.name for field in fields(kind))  # type: ignore[arg-type]

    def decode(raw: bytes) -> M:
        try:
            message = message_class.FromString(raw)
        except DecodeError:
            raise PayloadInvalid(f"The bytes are no {kind.__name__}.") from None
        members = {name: getattr(message, name) for name in names}
        for name, value in members.items():
            if not isinstance(value, (bytes, str, int)):
                members[name] = tuple(value)
        if "next" in members:
            members["next"] = _instruction(members["next"])
        return kind(**members)

    return decode


def _instruction(number: int) -> calls.Instruction:
    try:
        return calls.Instruction(number)
    except ValueError:
        raise PayloadInvalid(f"Instruction {number} is unknown; a newer Commonweight may be needed.") from None
