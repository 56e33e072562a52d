"""How often somebody may call: the generic cell rate algorithm, which refills evenly instead of in windows.

Pure: the time is an argument, the state is one number per caller.
"""

from collections import OrderedDict
from collections.abc import Hashable
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import unquote

from protocol.errors import RateLimited
from protocol.limits import MINUTE_MS

_MAX_CALLERS = 65_536


class RateLimit:
    """Lets each caller make `per_minute` calls a minute on average, with bursts of a quarter of that."""

    def __init__(self, per_minute: int) -> None:
        self._interval_ms = MINUTE_MS / per_minute
        self._burst_ms = MINUTE_MS / 4
        self._free_at: OrderedDict[Hashable, float] = OrderedDict()

    def admit(self, caller: Hashable, now_ms: int) -> None:
        """Count one call; raise `RateLimited`, with the time until the next free place, when there were too many."""
        free_at = max(self._free_at.pop(caller, 0.0), float(now_ms))
        wait_ms = free_at - now_ms - self._burst_ms
        if wait_ms > 0:
            self._free_at[caller] = free_at
            raise RateLimited(retry_after_ms=int(wait_ms) + 1)
        self._free_at[caller] = free_at + self._interval_ms
        while len(self._free_at) > _MAX_CALLERS:
            # The longest silent caller goes: its debt, if any, is the oldest.
            self._free_at.popitem(last=False)


def address_prefix(peer: str) -> str:
    """Return the /24 (IPv4) or /48 (IPv6) of a gRPC peer string such as `ipv4:127.0.0.1:5000`."""
    host = unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")
    try:
        address = ip_address(host.partition("%")[0])  # a link-local address carries its interface after a percent sign
    except ValueError:
        return peer
    # Behind a socket that takes both families every IPv4 caller looks like ::ffff:1.2.3.4: they must not share a place.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    known = mapped or address
    return str(ip_network((known, 24 if known.version == 4 else 48), strict=False))
