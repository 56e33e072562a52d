"""How the command's errors look: one sentence with a code, nothing that commands the terminal, no traceback."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commonweight.cli import main
from docs.command_reference import walk
from protocol import layout
from protocol.canonical import sha256_hex
from protocol.documents import digest_of, sign
from protocol.errors import CommonweightError, DiskFull, LocalProblem
from tests.verify.examples import ROOT, PublishedRun

ROOT_DIRECTORY = Path(__file__).parents[2]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ered"


def failing_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def shown(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(main, "app", failing_with(error))
    code = main.run([])
    return code, capsys.readouterr().err


def test_a_sentence_with_control_characters_is_shown_without_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = CommonweightError(f"first\n  {EVIL}")
    assert shown(error, monkeypatch, capsys) == (1, "error: first\n  ?]0;owned??[2J?31m?red [COMMONWEIGHT]\n")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "error: The disk that holds a file that was being written is full."),
        (OSError(122, "Disk quota exceeded", "/x/y"), "error: The disk that holds /x/y is full."),
        (PermissionError(13, "Permission denied", "/x"), "error: /x can't be used: Permission denied."),
    ],
)
def test_what_the_operating_system_says_is_no_mistake_of_ours(
    error: OSError, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = shown(error, monkeypatch, capsys)
    assert code == 1
    assert err.startswith(sentence)
    full = error.errno in (28, 122)
    assert err.endswith(f"[{(DiskFull if full else LocalProblem).code}]\n")


def test_a_mistake_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = shown(RuntimeError("odd"), monkeypatch, capsys)
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("[INTERNAL]\n")


def test_a_checkpoint_whose_run_has_a_commanding_name_is_verified_without_obeying(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = published.copy(tmp_path / "public")
    forged = replace(run.config, name="n" + EVIL, weights_licence="L" + EVIL)
    place = run.checkpoint(0)
    (place / layout.RUN_CONFIG).write_bytes(sign(forged, ROOT))
    raw = (place / layout.RUN_CONFIG).read_bytes()
    forged_run = PublishedRun(public=run.public, config=forged)
    forged_run.publish(
        [
            replace(
                manifest,
                config_sha256=digest_of(forged),
                files=tuple(
                    replace(entry, sha256=sha256_hex(raw), size=len(raw)) if entry.path == layout.RUN_CONFIG else entry
                    for entry in manifest.files
                ),
            )
            for manifest in [run.manifest(0)]
        ]
    )
    assert main.run(["checkpoint", "verify", str(place)]) == 0
    out = capsys.readouterr().out
    assert "  licence     L?]0;owned??[2J?31m?red\n" in out
    assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.parametrize(
    "arguments", [["checkpoint", "rebuild", "RUN"], ["checkpoint", "rebuild", "RUN", "--out", "OUT"]]
)
def test_a_full_disk_in_the_middle_of_a_rebuild_is_called_that(
    published: PublishedRun, tmp_path: Path, arguments: list[str]
) -> None:
    places = {"RUN": str(published.public), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 1; trap "" XFSZ; exec "$@"', "bash", sys.executable, "-P", "-m", "commonweight",
         *(places.get(argument, argument) for argument in arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT_DIRECTORY)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "can't be used: File too large. [LOCAL_PROBLEM]" in done.stderr


def test_a_reader_who_leaves_early_is_no_mistake(published: PublishedRun) -> None:
    command = [sys.executable, "-P", "-m", "commonweight", "checkpoint", "verify", str(published.public)]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT_DIRECTORY)},
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["models"], []])
def test_ctrl_c_while_the_command_is_being_imported_ends_it_without_a_traceback(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from commonweight.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT_DIRECTORY)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (main.INTERRUPTED, "", "")


def test_the_installed_command_begins_where_ctrl_c_is_caught() -> None:
    project = tomllib.loads((ROOT_DIRECTORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"commonweight": "commonweight.__main__:main"}


def _parts(command: Any) -> Iterator[str]:
    """Every paragraph and every option's sentence of a command's help."""
    yield from (" ".join(paragraph.split()) for paragraph in command.help.split("\n\n"))
    yield from (parameter.help for parameter in command.params if parameter.help)


@pytest.mark.parametrize(("name", "command"), list(walk()), ids=[name for name, _ in walk()])
def test_help_shows_every_word_that_was_written_for_it(
    name: str, command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # so that nothing is wrapped
    assert main.run([*name.split()[1:], "--help"]) == 0
    shown_help = capsys.readouterr().out
    for part in _parts(command):
        assert part in shown_help, part


def test_help_says_where_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    shown_help = capsys.readouterr().out
    for command in ("`demo`", "`worker start`", "`coordinator init`", "`sample`"):
        assert command in shown_help
