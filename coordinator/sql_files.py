"""Reads the SQL that ships with the package: `sql/schema.sql` and the named statements of `sql/queries.sql`."""

import re
from collections.abc import Mapping
from importlib import resources
from typing import Final

MIGRATIONS: Final = ("schema.sql",)
"""The n-th file brings a database from `user_version` n - 1 to n. Files are never changed after a release."""

_NAME = re.compile(r"^-- name: (.*)$")


def read_sql(name: str) -> str:
    """Return the text of a file in `sql/`."""
    return resources.files("coordinator").joinpath("sql", name).read_text(encoding="utf-8")


def parse_queries(text: str) -> Mapping[str, str]:
    """Return the statements of a file in which each begins with a line `-- name: NAME`.

    Raises `ValueError` for a name that is malformed or taken, and for a name without a statement. What stands before
    the first name must be comments.
    """
    statements: dict[str, list[str]] = {}
    lines: list[str] = []
    preamble = lines
    for line in text.splitlines():
        match = _NAME.match(line)
        if match is None:
            lines.append(line)
            continue
        name = match[1].strip()
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{name!r} is no name for a query")
        if name in statements:
            raise ValueError(f"the query {name} is there twice")
        lines = statements[name] = []
    if any(line.strip() and not line.startswith("--") for line in preamble):
        raise ValueError("there is a statement before the first name")
    queries = {name: "\n".join(lines).strip() for name, lines in statements.items()}
    for name, statement in queries.items():
        if not statement.endswith(";") or statement.count(";") != 1:
            raise ValueError(f"the query {name} must be one statement that ends in a semicolon")
    return queries
