"""What the documentation shows can be done: its Python runs, its commands parse, its make targets exist."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from coordinator.settings import Settings
from diloco.checkpoint import write_checkpoint
from diloco.genesis import initial_state
from docs.command_reference import walk
from mmdit.export import WEIGHTS_PATH, write_description
from tests.docs.pages import DOCS, ROOT, Block, blocks, inline_code

COMMANDS = dict(walk())
TARGETS = set(re.findall(r"^([a-z.]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint in it, as a reader of the README has one."""
    place = tmp_path_factory.mktemp("reader")
    settings = Settings()
    checkpoint = place / "checkpoint"
    write_description(
        checkpoint, config=settings.model_shape(), conditioning=settings.conditioning(), space=settings.space()
    )
    write_checkpoint(checkpoint / WEIGHTS_PATH, initial_state(settings.model_shape(), bytes(32)))
    return place


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_python_example_runs(block: Block, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _command_lines() -> list[tuple[str, list[str]]]:
    """Return (place, words after `commonweight`) of every command line that is shown."""
    found = []
    for block in [*blocks("sh"), *blocks("ini")]:
        for number, line in enumerate(block.code.splitlines(), start=block.line + 1):
            shown = re.match(r"(?:ExecStart=)?(?:\S*/)?commonweight(?P<words> .*)$", line)
            if shown is not None:
                found.append((f"{block.page.name}:{number}", shlex.split(shown["words"], comments=True)))
    return found


def test_command_lines_are_found() -> None:
    assert len(_command_lines()) > 10
    assert {"README.md", "operating.md", "volunteering.md"} <= {
        place.partition(":")[0] for place, _ in _command_lines()
    }


@pytest.mark.parametrize(("place", "words"), _command_lines(), ids=lambda part: part if isinstance(part, str) else "")
def test_every_command_line_parses(place: str, words: list[str]) -> None:
    if words == ["--version"]:
        return
    for length in range(len(words), 0, -1):
        name = " ".join(["commonweight", *words[:length]])
        if name in COMMANDS:
            COMMANDS[name].make_context(name, list(words[length:]))  # raises for what the command does not take
            return
    raise AssertionError(f"{place}: there is no such command")


def test_every_command_that_is_mentioned_exists() -> None:
    groups = {name.rpartition(" ")[0] for name in COMMANDS}
    for code in inline_code():
        if re.match(r"commonweight [a-z]", code) and not any(
            code == name or code.startswith(f"{name} ") for name in COMMANDS
        ):
            assert code in groups, code


def test_every_make_target_that_is_mentioned_exists() -> None:
    shown = {line for block in blocks("sh") for line in block.code.splitlines()} | inline_code()
    mentioned = {match[1] for text in shown if (match := re.match(r"make ([a-z]+)$", text))}
    assert {"demo", "test", "lint", "docs", "bench"} <= mentioned
    assert mentioned <= TARGETS


def test_the_readme_shows_the_two_commands_that_do_everything() -> None:
    lines = [line for block in blocks("sh") if block.page == ROOT / "README.md" for line in block.code.splitlines()]
    assert "make demo" in lines
    assert "make test" in lines


def test_every_module_that_is_run_exists() -> None:
    modules = set(re.findall(r"python -m ([a-z_][\w.]*)", DOCS))
    assert {"benchmarks.merge", "commonweight"} <= modules
    for module in modules:
        assert find_spec(module) is not None, module
