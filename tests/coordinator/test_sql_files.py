import re
import sys
import zipfile
from pathlib import Path

import pytest

from coordinator.sql_files import MIGRATIONS, parse_queries, read_sql


def test_queries_are_found_by_their_names() -> None:
    queries = parse_queries("-- about the file\n\n-- name: one\nSELECT 1;\n\n-- name: two\n-- why\nSELECT\n  2;\n")
    assert queries == {"one": "SELECT 1;", "two": "-- why\nSELECT\n  2;"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("-- name: one\nSELECT 1;\n-- name: one\nSELECT 2;\n", "there twice"),
        ("-- name: One more\nSELECT 1;\n", "no name"),
        ("-- name: one\n-- name: two\nSELECT 2;\n", "query one must be one statement"),
        ("-- name: one\nSELECT 1; SELECT 2;\n", "query one must be one statement"),
        ("SELECT 1;\n-- name: one\nSELECT 1;\n", "before the first name"),
    ],
)
def test_a_file_that_could_be_misread_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_queries(text)


def test_the_store_uses_every_query_that_there_is_and_no_other() -> None:
    code = (Path(__file__).parents[2] / "coordinator" / "sqlite_store.py").read_text()
    used = set(re.findall(r"self\._(?:write|save|count)\(\"(\w+)\"", code)) | set(
        re.findall(r"self\._(?:one|all)\(\s*(?:lambda row: .*|\w+), \"(\w+)\"", code)
    )
    assert used == set(parse_queries(read_sql("queries.sql")))


def test_the_sql_is_found_where_the_package_is_no_plain_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(__file__).parents[2] / "coordinator"
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("coordinator/__init__.py", "")
        for file in ("sql_files.py", "sql/schema.sql", "sql/queries.sql"):
            packed.write(here / file, f"coordinator/{file}")
    for name in [name for name in sys.modules if name.split(".")[0] == "coordinator"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "packed.zip"))

    import coordinator.sql_files as from_zip

    assert "packed.zip" in (from_zip.__file__ or "")
    assert [from_zip.read_sql(name) for name in MIGRATIONS] == [read_sql(name) for name in MIGRATIONS]
    assert from_zip.parse_queries(from_zip.read_sql("queries.sql"))
    for name in [name for name in sys.modules if name.split(".")[0] == "coordinator"]:
        monkeypatch.delitem(sys.modules, name)
