import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import benchmark_tables, generate
from tests.docs.pages import DOCS, ROOT


def test_every_generated_part_is_up_to_date() -> None:
    stale = [str(path.relative_to(ROOT)) for path in generate.generate(check=True)]
    assert not stale, "run `make docs`"


def test_every_generated_part_stands_in_a_page() -> None:
    named = re.findall(r"^<!-- generated: (\S+) -->$", DOCS, re.MULTILINE)
    assert sorted(named) == sorted(generate.BLOCKS)


def test_a_part_that_nothing_generates_is_an_error() -> None:
    text = "<!-- generated: nothing -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match="nothing generates"):
        generate.rewritten(text, Path("page.md"))


def test_a_part_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="without its"):
        generate.rewritten("<!-- generated: errors -->\n", Path("page.md"))


def test_what_people_wrote_around_a_part_stays() -> None:
    text = "before\n\n<!-- generated: limits -->\nout of date\n<!-- end -->\n\nafter\n"
    fresh = generate.rewritten(text, Path("page.md"))
    assert fresh.startswith("before\n")
    assert fresh.endswith("\nafter\n")
    assert "out of date" not in fresh
    assert generate.rewritten(fresh, Path("page.md")) == fresh


def test_without_results_the_benchmarks_page_says_so(tmp_path: Path) -> None:
    assert "No results are recorded yet" in benchmark_tables.benchmarks(tmp_path)


def test_a_missed_target_is_shown_as_missed(tmp_path: Path) -> None:
    (tmp_path / "example.json").write_text(
        '{"name": "example", "date": "2026-11-23", "commit": "0123456789abcdef", "machine": {"cores": 2, "gpu": null},'
        ' "rows": [{"case": "a", "ratio": 1.25}, {"case": "b", "ratio": null}],'
        ' "targets": [{"what": "speed", "target": "at most 1.00", "value": 1.25, "met": false}]}'
    )
    shown = benchmark_tables.benchmarks(tmp_path)
    assert "| speed | at most 1.00 | 1.25 | no |" in shown
    assert "| a | 1.25 |" in shown
    assert "Machine: cores 2." in shown


def test_the_generator_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "docs.generate", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
