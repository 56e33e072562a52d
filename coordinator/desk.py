"""What the coordinator's decisions need at hand: who it is, the run's rules, the store and the time.

The functions in `leasing`, `claims` and `settling` take a desk and run inside one store transaction, in the one
thread that writes the database. They sign and decide; sockets, files and other processes are not their business.
"""

import hashlib
import hmac
from dataclasses import dataclass

from coordinator.clock import Clock
from coordinator.store import Store
from protocol.assignment import member_of
from protocol.canonical import canonical_json
from protocol.documents import Digest, RunConfig, RunId
from protocol.keys import PrivateKey
from protocol.log import LogEntry

CLOCK_KEY = "clock_ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """The coordinator's identity, rules, store and clock. `retain_rounds`: rounds whose deltas are kept, 0 for all.

    `snapshot_every`: of so many checkpoints in a row the whole state of one is kept for ever.
    """

    run: RunId
    config: RunConfig
    config_sha256: Digest
    key: PrivateKey
    run_secret: bytes
    delta_bytes: int
    retain_rounds: int
    snapshot_every: int
    store: Store
    clock: Clock

    def log(self, kind: str, body: dict[str, object]) -> LogEntry:
        """Append an entry to the run's public log."""
        return self.store.append_log(kind, canonical_json(body))

    def epoch_secret(self, epoch: int) -> bytes:
        """Return an epoch's secret, from which sketch seeds follow; its hash is logged first, itself later."""
        return hmac.digest(self.run_secret, b"epoch/%d" % epoch, hashlib.sha256)

    def sketch_seed(self, epoch: int, claim: Digest) -> Digest:
        """Return the seed of the sketch that a claim must be followed by; nobody can know it before the claim."""
        return Digest(hmac.new(self.epoch_secret(epoch), bytes.fromhex(claim), hashlib.sha256).hexdigest())

    def member(self, owner: str) -> Digest:
        """Return an owner's pseudonym in this run: stable, and not linkable to the same key in another run."""
        return member_of(self.run, owner)
