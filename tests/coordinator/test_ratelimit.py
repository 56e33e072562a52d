"""Who counts as one caller, and how often one may call."""

import pytest

from coordinator.gate import Gate
from coordinator.ratelimit import RateLimit, address_prefix
from protocol.errors import RateLimited, ServerBusy


@pytest.mark.parametrize(
    ("peer", "prefix"),
    [
        ("ipv4:192.0.2.7:5000", "192.0.2.0/24"),
        ("ipv6:%5B2001:db8:1:2::7%5D:5000", "2001:db8:1::/48"),
        ("ipv6:[2001:db8:1::9]:1", "2001:db8:1::/48"),
        ("ipv6:2001::1:5000", "2001::/48"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:5000", "192.0.2.0/24"),
        ("ipv6:%5B::1%5D:5000", "::/48"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::/48"),
        ("unix:/somewhere", "unix:/somewhere"),
        ("unknown", "unknown"),
    ],
)
def test_neighbours_are_one_caller_and_strangers_are_not(peer: str, prefix: str) -> None:
    assert address_prefix(peer) == prefix


def test_ipv4_callers_of_a_socket_for_both_families_do_not_share_a_place() -> None:
    one, other = (address_prefix(f"ipv6:%5B::ffff:{host}%5D:1") for host in ("192.0.2.1", "198.51.100.1"))
    assert one != other


def test_a_caller_who_calls_too_often_is_told_when_there_is_room_and_others_are_not_held_up() -> None:
    limit = RateLimit(per_minute=60)
    for _ in range(16):
        limit.admit("a", 0)
    with pytest.raises(RateLimited) as caught:
        limit.admit("a", 0)
    limit.admit("b", 0)
    limit.admit("a", caught.value.retry_after_ms)


def test_a_gate_lets_in_as_many_as_it_may_and_no_place_is_lost() -> None:
    gate = Gate(total=3, each=2)
    with gate.enter("a"), gate.enter("a"):
        with pytest.raises(ServerBusy), gate.enter("a"):
            pass
        with gate.enter("b"), pytest.raises(ServerBusy), gate.enter("c"):
            pass
    with gate.enter("a"), gate.enter("a"), gate.enter("b"):
        pass
