"""The table of what a worker tells with `--json`."""

import re
from dataclasses import fields

from docs.markdown import table
from worker import progress


def events() -> str:
    """Return every event with its fields and what it means, in the words of `worker.progress`."""
    meanings = _meanings()
    rows = []
    for event in progress.EVENTS:
        names = [field.name for field in fields(event)]
        meaning = meanings[event.NAME].removeprefix(", ".join(names)).strip()
        rows.append((f"`{event.NAME}`", ", ".join(f"`{name}`" for name in names), meaning[0].upper() + meaning[1:]))
    return table(("event", "fields", "when, and what the fields mean"), rows)


def _meanings() -> dict[str, str]:
    """Return the text of each event in the module's docstring: its name at the margin, the rest indented below."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in (progress.__doc__ or "").splitlines():
        if match := re.match(r" {4}([a-z_]+) {2,}(.*)", line):
            name = match[1]
            found[name] = [match[2]]
        elif line.startswith(" " * 8) and name:
            found[name].append(line.strip())
    return {name: " ".join(" ".join(lines).split()) for name, lines in found.items()}
