import contextlib
import dataclasses
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import calls
from protocol.calls import Instruction
from protocol.convert import decoder, encode
from protocol.errors import PayloadInvalid
from protocol.wire import coordinator_pb2

VALUES: dict[str, type[Any]] = {
    name: kind for name, kind in vars(calls).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}
MESSAGES = coordinator_pb2.DESCRIPTOR.message_types_by_name


def _examples(kind: type[Any]) -> st.SearchStrategy[Any]:
    by_type: dict[Any, st.SearchStrategy[Any]] = {
        bytes: st.binary(max_size=40),
        str: st.text(max_size=20),
        int: st.integers(0, 2**64 - 1),
        Instruction: st.sampled_from(Instruction),
        tuple[bytes, ...]: st.lists(st.binary(max_size=8), max_size=4).map(tuple),
    }
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: by_type[hints[field.name]] for field in dataclasses.fields(kind)})


def test_every_message_has_its_value_class_and_every_value_class_its_message() -> None:
    assert set(VALUES) == set(MESSAGES)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_value_class_has_the_fields_of_its_message_in_their_order(name: str) -> None:
    ours = [field.name for field in dataclasses.fields(VALUES[name])]
    assert ours == [field.name for field in MESSAGES[name].fields]


def test_instructions_are_those_of_the_proto_file_but_for_the_unspecified_one() -> None:
    enum = coordinator_pb2.DESCRIPTOR.enum_types_by_name["Instruction"]
    theirs = {value.name.removeprefix("INSTRUCTION_"): value.number for value in enum.values}
    assert theirs.pop("UNSPECIFIED") == 0
    assert {instruction.name: instruction.value for instruction in Instruction} == theirs


@given(value=st.one_of(*(_examples(kind) for kind in VALUES.values())))
def test_a_value_survives_the_wire(value: Any) -> None:
    assert decoder(type(value))(encode(value)) == value


def test_values_are_frozen_and_hold_no_generated_objects() -> None:
    reply = decoder(calls.GetVerdictsReply)(encode(calls.GetVerdictsReply(verdict_envelopes=(b"a", b"b"))))
    assert type(reply.verdict_envelopes) is tuple
    with pytest.raises(dataclasses.FrozenInstanceError):
        reply.verdict_envelopes = ()  # type: ignore[misc]


@pytest.mark.parametrize("number", [0, 5, 99])
def test_an_instruction_that_we_do_not_know_is_refused(number: int) -> None:
    raw = coordinator_pb2.SubmitSketchReply(next=number).SerializeToString()  # type: ignore[arg-type]
    with pytest.raises(PayloadInvalid, match=f"Instruction {number} is unknown"):
        decoder(calls.SubmitSketchReply)(raw)


def test_an_unknown_field_is_ignored() -> None:
    raw = encode(calls.HandBackRequest(lease="1e")) + b"\xfa\x01\x03new"
    assert decoder(calls.HandBackRequest)(raw) == calls.HandBackRequest(lease="1e")


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff"])
def test_bytes_that_are_no_such_message_are_refused(raw: bytes) -> None:
    with pytest.raises(PayloadInvalid, match="no HandBackRequest"):
        decoder(calls.HandBackRequest)(raw)


@given(kind=st.sampled_from(sorted(VALUES)), raw=st.binary(max_size=60))
def test_random_bytes_raise_nothing_but_a_refusal(kind: str, raw: bytes) -> None:
    with contextlib.suppress(PayloadInvalid):
        assert isinstance(decoder(VALUES[kind])(raw), VALUES[kind])
