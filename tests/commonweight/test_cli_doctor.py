import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from commonweight.cli.main import app
from mmdit.presets import PRESETS


def doctor(tmp_path: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["worker", "doctor", "--home", str(tmp_path / "home"), *options])
    assert result.exit_code == 0, result.output
    return result.output


def row(output: str, model: str) -> list[str]:
    return next(line for line in output.splitlines() if line.startswith(f"{model} ")).split()


def test_the_doctor_names_the_machine_and_says_of_every_model_what_fits(tmp_path: Path) -> None:
    output = doctor(tmp_path, "--device", "cpu")
    assert "this computer's processor" in output
    assert str(tmp_path / "home") in output
    assert not (tmp_path / "home").exists()
    assert all(row(output, name) for name in PRESETS)
    assert "main memory, and updated there" not in output  # a processor has no other


def test_another_card_is_asked_for_by_its_memory(tmp_path: Path) -> None:
    output = doctor(tmp_path, "--memory", "12", "--ram", "32")
    assert "Device: a card with 12 GB" in output
    d18 = row(output, "d18")
    short, short_of = float(d18[4]), d18[5]
    assert 0 < short < 12  # on the card alone
    assert short_of == "short"
    assert int(d18[-3]) >= 1  # offloaded
    assert row(output, "d24")[-4:-2] == ["RAM", "short"]  # that would take more main memory than there is
    table = output[output.index("Samples that") :].splitlines()
    assert all(len(line) < 80 for line in table)
    assert int(row(doctor(tmp_path, "--memory", "24", "--ram", "64"), "d24")[-3]) >= 1


def test_a_program_gets_the_machine_and_each_model_as_objects(tmp_path: Path) -> None:
    lines = doctor(tmp_path, "--memory", "24", "--ram", "64", "--optimizer", "adamw-factored", "--json").splitlines()
    machine, *models = (json.loads(line) for line in lines)
    assert (machine["device_bytes"], machine["host_bytes"]) == (24 * 10**9, 64 * 10**9)
    assert machine["disk_bytes"] > 0
    d24 = next(model for model in models if model["model"] == "d24")
    assert d24["fits"]["narrow"]["samples"] >= 1
    assert d24["pixels"] == 512


@pytest.mark.parametrize("option", ["--memory", "--ram"])
@pytest.mark.parametrize("number", ["inf", "1e300", "nan", "0", "-1"])
def test_memory_that_no_machine_has_is_refused(option: str, number: str) -> None:
    result = CliRunner().invoke(app, ["worker", "doctor", option, number])
    assert result.exit_code != 0
    assert not isinstance(result.exception, (OverflowError, ValueError))


@pytest.mark.parametrize("pixels", ["500", "1024"])
def test_pictures_that_no_model_can_draw_are_refused(tmp_path: Path, pixels: str) -> None:
    result = CliRunner().invoke(app, ["worker", "doctor", "--pixels", pixels])
    assert "multiple of 16, up to 768" in str(result.exception)
