from coordinator import owners, rounds, units
from coordinator.diagram import diagram


def test_a_lifecycle_is_drawn_with_its_beginning_every_move_and_its_end() -> None:
    assert diagram(rounds.TRANSITIONS, "a round") == (
        "stateDiagram-v2\n"
        "    accTitle: Lifecycle of a round\n"
        "    [*] --> collecting\n"
        "    collecting --> closed: closed\n"
        "    closed --> merging: merge started\n"
        "    merging --> closed: merge interrupted\n"
        "    merging --> published: published\n"
        "    published --> [*]\n"
    )


def test_every_table_can_be_drawn_and_none_of_its_moves_is_left_out() -> None:
    def arrows(text: str) -> int:
        return text.count(": ") - 1  # the title has one as well

    assert arrows(diagram(units.UNIT_TRANSITIONS, "a unit")) == len(units.UNIT_TRANSITIONS)
    assert arrows(diagram(units.ATTEMPT_TRANSITIONS, "an attempt")) == len(units.ATTEMPT_TRANSITIONS)
    assert arrows(diagram(owners.TRANSITIONS, "an owner")) == len(owners.TRANSITIONS)
