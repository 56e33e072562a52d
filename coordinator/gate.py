"""How many calls may be open at once: in all, from one address prefix, by one device. Counts, and nothing else."""

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from protocol.errors import ServerBusy


class Gate:
    """Lets a caller in while there is room for it and for everybody."""

    def __init__(self, *, total: int, each: int) -> None:
        self._total = total
        self._each = each
        self._inside: Counter[Hashable] = Counter()

    @contextmanager
    def enter(self, caller: Hashable) -> Iterator[None]:
        """Hold a place; raise `ServerBusy` if the caller, or all together, have as many as they may."""
        if self._inside[caller] >= self._each or self._inside.total() >= self._total:
            raise ServerBusy
        self._inside[caller] += 1
        try:
            yield
        finally:
            self._inside[caller] -= 1
            if not self._inside[caller]:
                del self._inside[caller]
