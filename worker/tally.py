"""Counts what happened, on its way to the reporter, for the last line."""

import time

from worker.progress import Downloaded, Event, Finished, Refused, Trained, Uploaded, VerdictCame
from worker.reporters import Reporter


class Tally:
    """A reporter that passes events on and counts them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._started = time.monotonic()
        self._units = self._accepted = self._rejected = self._refused = 0
        self._bytes_up = self._bytes_down = 0

    def report(self, event: Event) -> None:
        """Count an event and pass it on."""
        match event:
            case Trained():
                self._units += 1
            case Downloaded():
                self._bytes_down += event.bytes
            case Uploaded():
                self._bytes_up += event.bytes
            case VerdictCame():
                self._accepted += event.outcome == "accepted"
                self._rejected += event.outcome != "accepted"
            case Refused():
                self._refused += 1
            case _:
                pass
        self._reporter.report(event)

    def close(self) -> None:
        """Close the reporter."""
        self._reporter.close()

    def finish(self, reason: str, *, waiting_units: int) -> None:
        """Tell the end."""
        self._reporter.report(
            Finished(
                reason=reason,
                units=self._units,
                accepted=self._accepted,
                rejected=self._rejected,
                refused=self._refused,
                waiting_units=waiting_units,
                bytes_up=self._bytes_up,
                bytes_down=self._bytes_down,
                seconds=time.monotonic() - self._started,
            )
        )
