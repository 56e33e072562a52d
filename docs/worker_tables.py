"""The tables of what a worker and an auditor tell with `--json`."""

import re
from collections.abc import Sequence
from dataclasses import fields

from docs.markdown import table
from worker import audit_progress, progress


def events() -> str:
    """Return every event of a worker with its fields and what it means, in the words of `worker.progress`."""
    return _events(progress.EVENTS, progress.__doc__ or "")


def audit_events() -> str:
    """Return what an auditor tells beside a worker's events, in the words of `worker.audit_progress`."""
    return _events(audit_progress.AUDIT_EVENTS, audit_progress.__doc__ or "")


def _events(kinds: Sequence[type[progress.Event]], text: str) -> str:
    meanings = _meanings(text)
    rows = []
    for event in kinds:
        names = [field.name for field in fields(event)]
        meaning = meanings[event.NAME].removeprefix(", ".join(names)).strip()
        rows.append((f"`{event.NAME}`", ", ".join(f"`{name}`" for name in names), meaning[0].upper() + meaning[1:]))
    return table(("event", "fields", "when, and what the fields mean"), rows)


def _meanings(text: str) -> dict[str, str]:
    """Return the text of each event in a module's docstring: its name at the margin, the rest indented below."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r" {4}([a-z_]+) {2,}(.*)", line):
            name = match[1]
            found[name] = [match[2]]
        elif line.startswith(" " * 8) and name:
            found[name].append(line.strip())
    return {name: " ".join(" ".join(lines).split()) for name, lines in found.items()}
