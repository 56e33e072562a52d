"""Rewrites the generated parts of the documentation from the code that they describe.

    python -m docs.generate            rewrite what has changed
    python -m docs.generate --check    change nothing; exit code 1 if something would change

A generated part stands between two comments in a Markdown file; everything else is written by people.

    <!-- generated: NAME -->
    <!-- end -->
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from coordinator import audits, owners, rounds, units
from coordinator.diagram import diagram
from coordinator.settings import describe_settings
from docs import benchmark_tables, command_reference, protocol_tables, worker_tables
from docs.markdown import fenced, table
from worker import lifecycle

DOCS: Final = Path(__file__).parent
_BLOCK: Final = re.compile(
    r"^<!-- generated: (?P<name>[a-z0-9-]+) -->\n(?P<body>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)


def settings() -> str:
    """Return the table of run.toml's settings."""
    changeable = ("server.", "storage.")
    return table(
        ("setting", "must be", "default", "what it does", "may change"),
        [
            (
                f"`{setting.name}`",
                setting.type,
                f"`{setting.default}`",
                setting.sentence,
                "any time" if setting.name.startswith(changeable) else "fixed at `init`",
            )
            for setting in describe_settings()
        ],
    )


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    "lifecycle-unit": lambda: fenced("mermaid", diagram(units.UNIT_TRANSITIONS, "a unit")),
    "lifecycle-attempt": lambda: fenced("mermaid", diagram(units.ATTEMPT_TRANSITIONS, "an attempt")),
    "lifecycle-round": lambda: fenced("mermaid", diagram(rounds.TRANSITIONS, "a round")),
    "lifecycle-audit": lambda: fenced(
        "mermaid", diagram(audits.TRANSITIONS, "an audit", reopened_by={audits.Appealed})
    ),
    "lifecycle-owner": lambda: fenced("mermaid", diagram(owners.TRANSITIONS, "an owner", reopened_by={owners.Cleared})),
    "lifecycle-spool": lambda: fenced("mermaid", diagram(lifecycle.TRANSITIONS, "a finished unit on a worker's disk")),
    "settings": settings,
    "documents": protocol_tables.documents,
    "calls": protocol_tables.calls,
    "messages": protocol_tables.messages,
    "errors": protocol_tables.errors,
    "limits": protocol_tables.limits,
    "events": worker_tables.events,
    "audit-events": worker_tables.audit_events,
    "commands": command_reference.commands,
    "benchmarks": benchmark_tables.benchmarks,
    "convergence": benchmark_tables.convergence,
}
"""Every generated part, by name."""


def rewritten(text: str, path: Path) -> str:
    """Return a page's text with every generated part as the code has it now.

    Raises:
        ValueError: a part has a name that nothing generates, or its end is missing.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"{path} asks for {name}, which nothing generates; there are {', '.join(BLOCKS)}")
        return f"<!-- generated: {name} -->\n{BLOCKS[name]()}<!-- end -->"

    result, found = _BLOCK.subn(replace, text)
    if found != len(re.findall(r"^<!-- generated: ", text, re.MULTILINE)):
        raise ValueError(f"{path} has a generated part without its <!-- end -->")
    return result


def pages() -> list[Path]:
    """Return every page of the documentation."""
    return sorted(DOCS.rglob("*.md"))


def generate(*, check: bool) -> list[Path]:
    """Bring every page up to date, or with `check` only look; return the pages that were not."""
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        fresh = rewritten(text, path)
        if fresh != text:
            stale.append(path)
            if not check:
                path.write_text(fresh, encoding="utf-8")
    return stale


def main() -> int:
    """Run the generator; the exit status says whether the pages were up to date (with --check) or are now."""
    parser = argparse.ArgumentParser(description="Rewrite the generated parts of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something would change")
    check: bool = parser.parse_args().check
    stale = generate(check=check)
    for path in stale:
        said = "is not up to date; run `make docs`" if check else "rewritten"
        sys.stdout.write(f"{path.relative_to(DOCS.parent)}: {said}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
