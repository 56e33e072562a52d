"""The picture of a lifecycle, drawn from its table, so that the documentation can't drift away from the code."""

import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, TypeVar

S = TypeVar("S", bound=Enum)


def diagram(transitions: Mapping[tuple[S, type[Any]], S], name: str, *, reopened_by: Collection[type[Any]] = ()) -> str:
    """Return a Mermaid state diagram of a table `(state, event type) -> state`, ending in a newline.

    The first state of the enum is where things begin. A state without a way out is an end, and so is one that only an
    event of `reopened_by` leaves, such as an appeal.
    """
    kind = type(next(iter(transitions.values())))
    states = list(kind)
    lines = ["stateDiagram-v2", f"    accTitle: Lifecycle of {name}", f"    [*] --> {states[0].value}"]
    lines += [f"    {state.value} --> {after.value}: {_words(event)}" for (state, event), after in transitions.items()]
    leaving = {
        state for (state, event), after in transitions.items() if after is not state and event not in reopened_by
    }
    lines += [f"    {state.value} --> [*]" for state in states if state not in leaving]
    return "\n".join(lines) + "\n"


def _words(event: type[Any]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", event.__name__).lower()
