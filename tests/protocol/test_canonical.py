import pytest

from protocol.canonical import canonical_json, parse_json, sha256_hex
from protocol.errors import PayloadInvalid


def test_canonical_json_is_the_form_of_rfc_8785() -> None:
    # The example of RFC 8785, section 3.2.2, without its surrogate pair.
    value = {"numbers": [333333333.33333329, 1e30, 4.5, 2e-3, 1e-27], "literals": [None, True, False], "é": "\u20ac\n"}
    expected = '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"é":"€\\n"}'
    assert canonical_json(value) == expected.encode()


def test_a_digest_is_written_in_lower_case_hex() -> None:
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b'{"a": 1, "a": 2}', id="a member twice"),
        pytest.param(b'[{"a": {"b": 1, "b": 1}}]', id="a member twice, deep inside, with equal values"),
        pytest.param(b"NaN", id="not a number"),
        pytest.param(b"[-Infinity]", id="minus infinity"),
        pytest.param(b"1e999", id="a number beyond a double"),
        pytest.param(b"-1e999", id="a negative number beyond a double"),
        pytest.param(b"1" * 5000, id="an integer of 5,000 digits"),
        pytest.param(b"[" * 100_000, id="a hundred thousand brackets"),
        pytest.param(b'"\xff"', id="not utf-8"),
        pytest.param(b"\xef\xbb\xbf{}", id="a byte order mark"),
        pytest.param(b"{} {}", id="two values"),
        pytest.param(b"{'a': 1}", id="single quotes"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_json_that_two_readers_could_read_differently_is_refused(raw: bytes) -> None:
    with pytest.raises(PayloadInvalid):
        parse_json(raw)


def test_well_formed_json_is_read() -> None:
    assert parse_json('{"a": [1, 2.5, "é", null, true]}'.encode()) == {"a": [1, 2.5, "é", None, True]}
