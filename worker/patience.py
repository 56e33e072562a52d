"""Waiting with a stated reason, longer after each failure, and never past a request to stop."""

from collections.abc import Callable

from protocol.errors import CommonweightError, TryLater, Unreachable
from worker.backoff import Backoff, as_asked_ms
from worker.progress import Waiting
from worker.reporters import Reporter
from worker.stop import Stop


class Patience:
    """The failures in a row of one activity, and the waits that follow from them."""

    def __init__(self, backoff: Backoff, fraction: Callable[[], float], reporter: Reporter, stop: Stop) -> None:
        self._backoff = backoff
        self._fraction = fraction
        self._reporter = reporter
        self._stop = stop
        self.failures = 0

    def reset(self) -> None:
        """Forget the failures: it worked."""
        self.failures = 0

    def another(self) -> "Patience":
        """Return the patience of another activity."""
        return Patience(self._backoff, self._fraction, self._reporter, self._stop)

    async def after(self, error: CommonweightError, *, part: str = "", advice: str = "") -> None:
        """Wait after a failure; say why and how long.

        Args:
            part: the part of the work that rests; see `worker.progress`.
            advice: a sentence that is added to the error's.
        """
        # Silence names no time; a coordinator that answers may.
        named = isinstance(error, TryLater) and not isinstance(error, Unreachable)
        at_least_ms = as_asked_ms(error.retry_after_ms) if named and isinstance(error, TryLater) else 0
        delay_ms = self._backoff.delay_ms(self.failures, self._fraction(), at_least_ms=at_least_ms)
        self.failures += 1
        reason = f"{error.message} {advice}" if advice else error.message
        await self.rest(reason, delay_ms, code=error.code, part=part)

    async def as_asked(self, reason: str, asked_ms: int) -> None:
        """Wait as long as the coordinator asks for, within reason."""
        await self.rest(reason, as_asked_ms(asked_ms))

    async def rest(self, reason: str, delay_ms: int, *, code: str = "", part: str = "") -> None:
        """Wait for a reason that is no failure."""
        self._reporter.report(Waiting(reason=reason, code=code, seconds=delay_ms / 1000, part=part))
        await self._stop.sleep(delay_ms / 1000)
