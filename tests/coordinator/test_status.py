"""What an operator reads of a run."""

from coordinator.status import RunStatus
from protocol.documents import RunId


def test_members_stand_below_their_heading_and_one_is_not_told_as_many() -> None:
    status = RunStatus(
        run=RunId("ab" * 32), name="digits", join=None, planned_rounds=6, checkpoint=1, validation_loss=0.5, round=2,
        round_state="open", units={"open": 4}, members={"a" * 64: 1, "b" * 64: 2000}, devices=1,
        owners={"probation": 2}, audits={}, taken_down=1, to_take_down=0,
    )  # fmt: skip
    assert status.lines()[3:] == (
        "round: 2, open; units: 4 open",
        "members: 2 with merged or accepted units, 1 device seen",
        "  bbbbbbbbbbbb: 2,000 units",
        "  aaaaaaaaaaaa: 1 unit",
        "owners: 2 probation",
        "audits: 0 passed, 0 failed",
        "pictures taken down: 1",
    )
