import json

from typer.testing import CliRunner

from commonweight.cli.main import app
from mmdit.presets import PRESETS
from mmdit.transformer import trainable_schema


def test_every_preset_is_listed_with_the_parameters_that_it_has() -> None:
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0, result.output
    for name in PRESETS:
        assert f"\n{name:<9} " in result.output
    assert f"{2_028_334_144:,}" in next(line for line in result.output.splitlines() if line.startswith("d24 "))
    assert "RGB pixels, 16 x 16, up to 32 x 32" in result.output
    assert "grey pixels, 8 x 8\n" in result.output


def test_a_program_gets_the_same_numbers_smallest_first() -> None:
    result = CliRunner().invoke(app, ["models", "--json"])
    found = [json.loads(line) for line in result.output.splitlines()]
    assert {model["name"] for model in found} == set(PRESETS)
    assert [model["parameters"] for model in found] == sorted(model["parameters"] for model in found)
    digits = next(model for model in found if model["name"] == "digits")
    counted = sum(_product(shape) for _, shape in trainable_schema(PRESETS["digits"]))
    assert (digits["parameters"], digits["largest_pixels"]) == (counted, 8)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
