"""What can be seen of a desk's decisions: units, audits, owners, verdicts and the public log."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from coordinator import verdicts
from coordinator.audits import OPEN_AUDITS, Audit, AuditState
from coordinator.desk import Desk
from coordinator.owners import OwnerState
from coordinator.sqlite_store import SqliteStore
from coordinator.units import Attempt, Unit, UnitState
from protocol.canonical import parse_json
from protocol.documents import (
    ClaimReceipt,
    LeaseId,
    UnitId,
    Verdict,
    verify,
)
from tests.coordinator.desk_people import Volunteer, Work
from tests.protocol.examples import COORDINATOR

T = TypeVar("T")


class Records:
    """The records of the run whose desk and store these are."""

    desk: Desk
    store: SqliteStore

    def _decide(self, work: Callable[[Desk], T]) -> T:
        with self.store.transaction():
            return work(self.desk)

    @property
    def round(self) -> int:
        """The number of the latest round."""
        current = self.store.latest_round()
        assert current is not None
        return current.round

    @property
    def is_closed(self) -> bool:
        """Whether the latest round's merge set is fixed and not published."""
        current = self.store.latest_round()
        return current is not None and current.closed_ms is not None and current.manifest_sha256 is None

    @property
    def is_over(self) -> bool:
        """Whether the last planned checkpoint is published."""
        current = self.store.latest_round()
        assert current is not None
        return current.round >= self.desk.config.rounds.planned and current.manifest_sha256 is not None

    def attempt_of(self, lease: str) -> Attempt:
        """The attempt under a lease."""
        found = self.store.attempt(LeaseId(lease))
        assert found is not None
        return found

    def attempt(self, work: Work) -> Attempt:
        """The attempt that this work is."""
        return self.attempt_of(work.lease.lease)

    def unit(self, work: Work) -> Unit:
        """The unit that this work is of."""
        found = self.store.unit(UnitId(work.lease.unit))
        assert found is not None
        return found

    def audits(self, work: Work) -> tuple[Audit, ...]:
        """The audits of this work's claim."""
        return self.store.audits_of_subject(LeaseId(work.lease.lease))

    def audit(self, work: Work) -> Audit:
        """The latest audit of this work's claim, which there must be."""
        return self.audits(work)[-1]

    def owner(self, of: Volunteer) -> tuple[OwnerState, int]:
        """An owner's state and audits passed in a row."""
        found = self.store.owner(of.session.owner)
        assert found is not None
        return found.state, found.valid_in_row

    def receipt(self, work: Work) -> ClaimReceipt:
        """The receipt of this work's claim."""
        envelope = self.attempt(work).claim_receipt
        assert envelope is not None
        return verify(ClaimReceipt, envelope, COORDINATOR.public)

    def verdict(self, work: Work) -> Verdict | None:
        """What its device is told of this work."""
        known = self._decide(lambda desk: verdicts.known(desk, work.by.session, (work.digest,)))
        return verify(Verdict, known[0], COORDINATOR.public) if known else None

    def code(self, work: Work) -> str | None:
        """The code of that verdict."""
        verdict = self.verdict(work)
        return None if verdict is None else verdict.code

    def log(self, kind: str | None = None) -> list[Mapping[str, Any]]:
        """The bodies of the public log's entries, of one kind or of all."""
        entries = self.store.log_entries(1, self.store.log_head()[0])
        return [parse_json(entry.body) for entry in entries if kind in (None, entry.kind)]

    def reasons(self) -> dict[str, int]:
        """How many audits were opened for each reason."""
        return dict(Counter(body["reason"] for body in self.log("audit")))

    def merged(self, round_number: int) -> set[str]:
        """The claims that a round's merge names."""
        found = self.store.round(round_number)
        assert found is not None
        return {entry.claim for entry in found.merge}

    def unmerged(self, round_number: int) -> set[str]:
        """The claims that a round takes out again."""
        found = self.store.round(round_number)
        assert found is not None
        return {entry.claim for entry in found.unmerge}

    def open_units(self) -> int:
        """How many of the round's units can be leased."""
        return self.store.unit_counts(self.round)[UnitState.OPEN]

    def open_audits(self) -> int:
        """How many audits wait for something."""
        counts = self.store.audit_counts()
        return sum(counts[state] for state in OPEN_AUDITS)

    def states(self, work: Work) -> list[AuditState]:
        """The states of this work's audits."""
        return [audit.state for audit in self.audits(work)]
