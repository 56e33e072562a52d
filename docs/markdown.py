"""The few forms of Markdown that generated parts are made of."""

from collections.abc import Iterable, Sequence


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a blank line around it."""
    lines = [_row(heading), _row(["---"] * len(heading)), *(_row([_cell(text) for text in row]) for row in rows)]
    return "\n" + "\n".join(lines) + "\n\n"


def fenced(language: str, text: str) -> str:
    """Return a code block with a blank line around it."""
    return f"\n```{language}\n{text.rstrip()}\n```\n\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    # A bar ends a cell, also inside backticks.
    return " ".join(text.split()).replace("|", "\\|") or " "
