import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import JoinStringInvalid
from protocol.join import JoinString

RUN = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("host", "port", "target"),
    [
        ("127.0.0.1", 50051, "127.0.0.1:50051"),
        ("train.example.org", 1, "train.example.org:1"),
        ("[::1]", 65535, "[::1]:65535"),
        ("[2001:db8::a]", 443, "[2001:db8::a]:443"),
        ("localhost", 7000, "localhost:7000"),
    ],
)
def test_a_join_string_is_read_and_written_back(host: str, port: int, target: str) -> None:
    text = f"cw1:{host}:{port}:{RUN}"
    join = JoinString.parse(text)
    assert (join.host, join.port, join.run) == (host, port, RUN)
    assert str(join) == text
    assert join.target == target


def test_spaces_and_a_line_break_around_a_pasted_join_string_are_forgiven() -> None:
    assert JoinString.parse(f"  cw1:example.org:7000:{RUN}\r\n").port == 7000


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param(f"cw2:example.org:7000:{RUN}", id="another version"),
        pytest.param(f"example.org:7000:{RUN}", id="no version"),
        pytest.param("cw1:example.org:7000", id="no run"),
        pytest.param(f"cw1:example.org:7000:{RUN[:-1]}", id="a digit of the run is missing"),
        pytest.param(f"cw1:example.org:7000:{RUN}0", id="a digit of the run too many"),
        pytest.param(f"cw1:example.org:7000:{RUN.upper()}", id="the run in capitals"),
        pytest.param(f"cw1:::1:7000:{RUN}", id="IPv6 without brackets"),
        pytest.param(f"cw1::7000:{RUN}", id="no host"),
        pytest.param(f"cw1:a/b:7000:{RUN}", id="a path in the host"),
        pytest.param(f"cw1:user@example.org:7000:{RUN}", id="a user in the host"),
        pytest.param(f"cw1:example.org:port:{RUN}", id="no number as port"),
        pytest.param(f"cw1:example.org:٧:{RUN}", id="a digit of another script"),
        pytest.param(f"cw1:example.org:7000:{RUN}\ncw1:x:1:{RUN}", id="two of them"),
    ],
)
def test_what_is_no_join_string_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(JoinStringInvalid, match="it has the form cw1:HOST:PORT:RUNID"):
        JoinString.parse(text)


@pytest.mark.parametrize("port", ["0", "65536", "99999"])
def test_an_impossible_port_is_named(port: str) -> None:
    with pytest.raises(JoinStringInvalid, match=f"Port {port} "):
        JoinString.parse(f"cw1:example.org:{port}:{RUN}")


@given(st.text(max_size=120))
def test_any_text_is_a_join_string_or_refused(text: str) -> None:
    with contextlib.suppress(JoinStringInvalid):
        assert str(JoinString.parse(text)).startswith("cw1:")
