import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.canonical import canonical_json
from protocol.envelope import open_envelope, parse_envelope, pre_authentication_encoding, seal
from protocol.errors import DocumentRefused, EnvelopeInvalid, FormatUnknown, SignatureInvalid
from protocol.keys import PrivateKey
from protocol.limits import MAX_ENVELOPE_BYTES, MAX_SIGNATURES

KEY = PrivateKey.from_seed(b"\x01" * 32)
OTHER = PrivateKey.from_seed(b"\x02" * 32)
TYPE = "application/vnd.commonweight.example+json"
PAYLOAD = b'{"format":1}'
SEALED = seal(PAYLOAD, TYPE, KEY)

Members = dict[str, Any]


def _changed(change: Callable[[Members], None]) -> bytes:
    members: Members = json.loads(SEALED)
    change(members)
    return canonical_json(members)


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def test_the_bytes_that_are_signed_are_those_of_the_dsse_specification() -> None:
    # github.com/secure-systems-lab/dsse, protocol.md, "Test vectors".
    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_the_encoding_of_type_and_payload_cannot_be_shifted() -> None:
    assert pre_authentication_encoding("a", b"b 1 c") != pre_authentication_encoding("a 5 b", b"c")


def test_an_envelope_has_golden_bytes() -> None:
    assert SEALED == (
        b'{"payload":"eyJmb3JtYXQiOjF9","payloadType":"application/vnd.commonweight.example+json",'
        b'"signatures":[{"keyid":"34750f98bd59fcfc946da45aaabe933be154a4b5094e1c4abf42866505f3c97e",'
        b'"sig":"4ygmZr5k3nUL9VoMhdjel/Jw4tU3Vjbcg1No3YxT8zWbdZtgwTWCY3mZn6PpVLIGmg2VawuzKtp5MA9lI/YiCw=="}]}'
    )


def test_a_sealed_payload_comes_back_to_the_byte() -> None:
    for payload in (b"", b"\0\xff not even JSON", b"x" * 100_000):
        assert open_envelope(seal(payload, TYPE, KEY), TYPE, KEY.public) == payload


def test_the_signature_is_over_the_bytes_as_sent_and_not_over_their_meaning() -> None:
    spaced = json.dumps(json.loads(SEALED), indent=3).encode()
    assert spaced != SEALED
    assert open_envelope(spaced, TYPE, KEY.public) == PAYLOAD
    with pytest.raises(SignatureInvalid):
        open_envelope(_changed(lambda members: members.update(payload=_base64(b'{"format": 1}'))), TYPE, KEY.public)


def _set(name: str, value: object) -> Callable[[Members], None]:
    return lambda members: members.update({name: value})


def _set_in_signature(name: str, value: object) -> Callable[[Members], None]:
    return lambda members: members["signatures"][0].update({name: value})


def _flip_signature(members: Members) -> None:
    raw = bytearray(base64.b64decode(members["signatures"][0]["sig"]))
    raw[0] ^= 1
    members["signatures"][0]["sig"] = _base64(bytes(raw))


TAMPERED = [
    pytest.param(_set("payload", _base64(b'{"format":2}')), SignatureInvalid, id="payload changed"),
    pytest.param(_set("payload", _base64(PAYLOAD + b" ")), SignatureInvalid, id="payload with one more space"),
    pytest.param(_set("payload", "=" * 8), EnvelopeInvalid, id="payload not base64"),
    pytest.param(_set("payload", "eyJmb3Jt\nYXQiOjF9"), EnvelopeInvalid, id="payload with a line break"),
    pytest.param(_set("payload", "ÄÖÜ"), EnvelopeInvalid, id="payload not ascii"),
    pytest.param(_set("payload", 7), EnvelopeInvalid, id="payload a number"),
    pytest.param(_set("payload", None), EnvelopeInvalid, id="payload null"),
    pytest.param(lambda members: members.pop("payload"), EnvelopeInvalid, id="payload missing"),
    pytest.param(_set("payloadType", "application/other"), FormatUnknown, id="type changed"),
    pytest.param(_set("payloadType", ["application/other"]), EnvelopeInvalid, id="type a list"),
    pytest.param(lambda members: members.pop("payloadType"), EnvelopeInvalid, id="type missing"),
    pytest.param(_set("signatures", []), EnvelopeInvalid, id="no signatures"),
    pytest.param(_set("signatures", {}), EnvelopeInvalid, id="signatures an object"),
    pytest.param(_set("signatures", ["x"]), EnvelopeInvalid, id="a signature that is a text"),
    pytest.param(lambda members: members.pop("signatures"), EnvelopeInvalid, id="signatures missing"),
    pytest.param(_set_in_signature("keyid", OTHER.public.key_id), SignatureInvalid, id="named as another key's"),
    pytest.param(_set_in_signature("keyid", 1), EnvelopeInvalid, id="key id a number"),
    pytest.param(_set_in_signature("sig", ""), SignatureInvalid, id="signature empty"),
    pytest.param(_set_in_signature("sig", "*"), EnvelopeInvalid, id="signature not base64"),
    pytest.param(_set_in_signature("sig", None), EnvelopeInvalid, id="signature null"),
    pytest.param(_flip_signature, SignatureInvalid, id="one bit of the signature"),
]


@pytest.mark.parametrize(("change", "refusal"), TAMPERED)
def test_changing_any_member_is_refused(change: Callable[[Members], None], refusal: type[DocumentRefused]) -> None:
    with pytest.raises(refusal):
        open_envelope(_changed(change), TYPE, KEY.public)


def test_a_document_cannot_be_replayed_as_another_type_even_with_its_type_rewritten() -> None:
    other_type = "application/vnd.commonweight.other+json"
    with pytest.raises(FormatUnknown, match=r"Expected a document of type .*other.*, not .*example"):
        open_envelope(SEALED, other_type, KEY.public)
    with pytest.raises(SignatureInvalid):
        open_envelope(_changed(_set("payloadType", other_type)), other_type, KEY.public)


def test_another_keys_signature_is_not_taken() -> None:
    with pytest.raises(SignatureInvalid, match="is not signed by key"):
        open_envelope(seal(PAYLOAD, TYPE, OTHER), TYPE, KEY.public)


def test_two_signatures_by_one_key_are_refused_so_that_it_cannot_count_twice() -> None:
    with pytest.raises(EnvelopeInvalid, match="two signatures by one key"):
        parse_envelope(_changed(lambda members: members["signatures"].append(members["signatures"][0])))


def _with_more_signatures(count: int) -> bytes:
    extra = [{"keyid": f"{k:064x}", "sig": _base64(bytes(64))} for k in range(count)]
    return _changed(lambda members: members["signatures"].extend(extra))


def test_a_second_signers_signature_does_no_harm_up_to_the_limit() -> None:
    assert open_envelope(_with_more_signatures(MAX_SIGNATURES - 1), TYPE, KEY.public) == PAYLOAD
    with pytest.raises(EnvelopeInvalid, match="1 to 4 signatures"):
        open_envelope(_with_more_signatures(MAX_SIGNATURES), TYPE, KEY.public)


def test_an_unknown_member_is_ignored() -> None:
    assert open_envelope(_changed(_set("note", {"x": [1]})), TYPE, KEY.public) == PAYLOAD


def test_the_size_is_looked_at_before_anything_is_parsed() -> None:
    padded = SEALED + b" " * (MAX_ENVELOPE_BYTES - len(SEALED))
    assert open_envelope(padded, TYPE, KEY.public) == PAYLOAD
    with pytest.raises(EnvelopeInvalid, match=f"has {MAX_ENVELOPE_BYTES + 1} bytes; at most {MAX_ENVELOPE_BYTES}"):
        open_envelope(padded + b" ", TYPE, KEY.public)
    assert open_envelope(padded + b" ", TYPE, KEY.public, max_bytes=MAX_ENVELOPE_BYTES + 1) == PAYLOAD
    with pytest.raises(EnvelopeInvalid, match="bytes"):
        parse_envelope(b"[" * 20, max_bytes=19)


@pytest.mark.parametrize("raw", [b"", b"[]", b"7", b"null", b"{", b"{}", b"\xff", b"1" * 5000])
def test_what_is_no_envelope_is_called_so(raw: bytes) -> None:
    with pytest.raises(EnvelopeInvalid):
        parse_envelope(raw)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_never_crash(raw: bytes) -> None:
    with pytest.raises(DocumentRefused):
        open_envelope(raw, TYPE, KEY.public)


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_refused_or_changes_nothing(position: int, mask: int) -> None:
    changed = bytearray(SEALED)
    changed[position] ^= mask
    try:
        payload = open_envelope(bytes(changed), TYPE, KEY.public)
    except DocumentRefused:
        return
    # base64 leaves four bits of the last signature byte's group unused; nothing else may change unseen.
    assert payload == PAYLOAD
