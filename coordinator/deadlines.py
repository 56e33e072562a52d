"""What ends by time alone: leases, claims whose bytes never came, replicas and second referees that nobody was."""

from coordinator import leasing, referees, replicas
from coordinator.desk import Desk
from protocol.limits import COME_BACK_MS


def end_what_is_due(desk: Desk) -> int:
    """End everything whose time is over; return how much that was."""
    return leasing.expire_due(desk) + replicas.expire_audits(desk) + referees.expire_second_opinions(desk)


def forgive_absence(desk: Desk, stopped_ms: int) -> None:
    """Let the time in which nobody was served count against nobody; all who wait get as much time again to come back.

    Args:
        stopped_ms: when the coordinator was last seen to work.
    """
    away_ms = desk.clock.now_ms() - stopped_ms
    if away_ms > 0:
        desk.store.postpone(stopped_ms, away_ms + min(away_ms, COME_BACK_MS))
