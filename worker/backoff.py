"""How long to wait before asking again: exponential with full jitter, so that a thousand workers do not ask at once.

A pure rule; the randomness is an argument. Full jitter (a uniform draw from zero to the bound) spreads a crowd that was
cut off at one moment better than a fixed delay with a little noise.
"""

from dataclasses import dataclass
from typing import Final

from protocol.limits import MINUTE_MS, SECOND_MS

SHORTEST_ASKED_MS: Final = SECOND_MS // 2
LONGEST_ASKED_MS: Final = 5 * MINUTE_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Bounds of the delay: `base_ms` for the first attempt, doubled with each, at most `cap_ms`."""

    base_ms: int
    cap_ms: int

    def __post_init__(self) -> None:
        if not 0 < self.base_ms <= self.cap_ms:
            raise ValueError(f"base_ms is {self.base_ms} and cap_ms {self.cap_ms}; it must be 0 < base_ms <= cap_ms")

    def delay_ms(self, attempt: int, fraction: float, *, at_least_ms: int = 0) -> int:
        """Return the delay after `attempt` failures in a row.

        Args:
            attempt: failures before this one; 0 after the first.
            fraction: uniform in [0, 1).
            at_least_ms: what the other side asked for; the jitter comes on top of it.
        """
        # The exponent is bounded, since a worker that waits for a month would build huge integers.
        bound = min(self.cap_ms, self.base_ms << min(attempt, 32))
        return min(at_least_ms, self.cap_ms) + int(fraction * bound)


def as_asked_ms(asked_ms: int) -> int:
    """Return how long to wait when the other side names a time: neither a busy loop nor for ever, whatever it says."""
    return min(max(asked_ms, SHORTEST_ASKED_MS), LONGEST_ASKED_MS)


DEFAULT_BACKOFF: Final = Backoff(base_ms=SECOND_MS, cap_ms=5 * MINUTE_MS)
"""1 second to 5 minutes."""
