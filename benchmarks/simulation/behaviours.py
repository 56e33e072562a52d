"""How attackers behave, message by message; `verify.attacks` says what they send.

They know more than real ones could: which leases are replicas, and whose. Most of them are honest when they are given
a replica, since an answer that disagrees always meets a referee.
"""

import random

from benchmarks.simulation.people import Behaviour, Taken
from benchmarks.simulation.physics import HONEST
from protocol.limits import MINUTE_MS


class Absent(Behaviour):
    """Takes a unit of each round and does nothing: keeps a run paired with one in which somebody had taken it."""

    name = "absent"
    holds = True


class Shaper(Behaviour):
    """Sends one kind of poison.

    Args:
        kind: what it sends.
        spares_replicas: whether it works honestly when it is given a replica, if it can tell.
        successor: who takes its place after a ban.
    """

    hostile = True

    def __init__(self, kind: str, *, spares_replicas: bool = False, successor: Behaviour | None = None) -> None:
        self.name = kind
        self.kind = kind
        self.spares_replicas = spares_replicas
        self.successor = successor

    def delivers(self, taken: Taken, /) -> str | None:
        """See `Behaviour`."""
        return HONEST if self.spares_replicas and taken.replica_of else self.kind

    def returns(self) -> Behaviour | None:
        """See `Behaviour`."""
        return self.successor


class Sleeper(Shaper):
    """Works honestly for so many units, replicas included, and sends poison from then on."""

    def __init__(self, kind: str, *, after: int) -> None:
        super().__init__(kind, spares_replicas=True)
        self.name = "sleeper"
        self.after = after

    def delivers(self, taken: Taken, /) -> str | None:
        """See `Behaviour`."""
        return HONEST if taken.delivered < self.after else super().delivers(taken)


class Colluder(Shaper):
    """Sends poison, and the same poison when it is given a replica of a partner's unit; honest to everybody else."""

    def __init__(self, kind: str, partners: frozenset[str]) -> None:
        super().__init__(kind)
        self.name = "colluding-pair"
        self.partners = partners

    def delivers(self, taken: Taken, /) -> str | None:
        """See `Behaviour`."""
        return HONEST if taken.replica_of is not None and taken.replica_of not in self.partners else self.kind


class Shopper(Colluder):
    """A colluder who hands back every replica but a partner's."""

    def __init__(self, kind: str, partners: frozenset[str]) -> None:
        super().__init__(kind, partners)
        self.name = "lease-shopping"

    def takes(self, taken: Taken, /) -> bool:
        """See `Behaviour`."""
        return taken.replica_of is None or taken.replica_of in self.partners


class Sybil(Shaper):
    """Works through probation, sends poison from then on, and comes back under a new key after each ban."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, spares_replicas=True)
        self.name = "sybil"

    def delivers(self, taken: Taken, /) -> str | None:
        """See `Behaviour`."""
        return super().delivers(taken) if taken.established else HONEST

    def returns(self) -> Behaviour | None:
        """See `Behaviour`."""
        return Sybil(self.kind)


class Copier(Behaviour):
    """Lets its lease run out and claims a copy once somebody else's delta of the unit is public."""

    name = "copy"
    hostile = True
    pace = 0.1
    patience = 6 * MINUTE_MS

    def delivers(self, taken: Taken, /) -> str | None:
        """See `Behaviour`."""
        return HONEST if taken.merged else None

    def works(self, _taken: Taken, /) -> bool:
        """See `Behaviour`."""
        return False


class LazyReplica(Behaviour):
    """Echoes a partner's claim instead of running the partner's unit again; works otherwise."""

    name = "lazy-replica"
    hostile = True

    def __init__(self, partners: frozenset[str]) -> None:
        self.partners = partners

    def works(self, taken: Taken, /) -> bool:
        """See `Behaviour`."""
        return taken.replica_of not in self.partners


class Liar(Behaviour):
    """Works honestly, but answers replicas with noise, so that others look guilty."""

    name = "liar"
    hostile = True

    def delivers(self, taken: Taken, /) -> str | None:
        """See `Behaviour`."""
        return "noise" if taken.replica_of else HONEST


class Stuffer(Shaper):
    """Sends empty deltas at once, to fill a round before the honest do."""

    pace = 0.02

    def __init__(self) -> None:
        super().__init__("zero")
        self.name = "stuffing"


class TwoClaims(Shaper):
    """Claims poison, and then an honest delta under the same lease, to upload whichever is not audited."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, spares_replicas=True)
        self.name = "two-claims"

    def claims_again(self, taken: Taken, /) -> str | None:
        """See `Behaviour`."""
        return None if taken.replica_of else HONEST


class Withholder(Shaper):
    """Claims poison, and uploads every second one only."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__(kind)
        self.name = "commit-and-withhold"
        self._random = random.Random(seed)
        self._decided: dict[str, bool] = {}

    def uploads(self, taken: Taken, /) -> bool:
        """See `Behaviour`."""
        return self._decided.setdefault(taken.lease, self._random.random() < 0.5)
