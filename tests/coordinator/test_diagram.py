from coordinator import audits, owners, rounds, units
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


def test_what_an_appeal_reopens_is_drawn_as_an_end_all_the_same() -> None:
    without = diagram(owners.TRANSITIONS, "an owner")
    assert "banned --> [*]" not in without
    drawn = diagram(owners.TRANSITIONS, "an owner", reopened_by={owners.Cleared})
    assert drawn == without + "    banned --> [*]\n"


def test_a_move_that_leads_back_to_where_it_began_is_no_way_out() -> None:
    drawn = diagram(units.ATTEMPT_TRANSITIONS, "an attempt")
    assert "    judged --> judged: rejudged\n" in drawn
    assert drawn.endswith("    judged --> [*]\n    handed_back --> [*]\n")


def test_every_table_can_be_drawn_and_none_of_its_moves_is_left_out() -> None:
    def arrows(text: str) -> int:
        return text.count(": ") - 1  # the title has one as well

    assert arrows(diagram(units.UNIT_TRANSITIONS, "a unit")) == len(units.UNIT_TRANSITIONS)
    assert arrows(diagram(units.ATTEMPT_TRANSITIONS, "an attempt")) == len(units.ATTEMPT_TRANSITIONS)
    assert arrows(diagram(owners.TRANSITIONS, "an owner")) == len(owners.TRANSITIONS)
    assert arrows(diagram(audits.TRANSITIONS, "an audit")) == len(audits.TRANSITIONS)
