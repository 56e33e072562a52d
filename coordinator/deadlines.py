"""What ends by time alone: leases, claims whose bytes never came, replicas and second referees that nobody was."""

from coordinator import leasing, referees, replicas
from coordinator.desk import Desk


def end_what_is_due(desk: Desk) -> int:
    """End everything whose time is over; return how much that was."""
    return leasing.expire_due(desk) + replicas.expire_audits(desk) + referees.expire_second_opinions(desk)
