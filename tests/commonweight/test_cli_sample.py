import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from commonweight.cli.sample import sample
from commonweight.png import png_bytes
from protocol import layout
from protocol.canonical import sha256_hex
from protocol.errors import CheckpointCorrupt, CommonweightError, DeviceUnavailable, DiskFull, LocalProblem, UsageError
from tests.verify.examples import RUN

app = typer.Typer()
app.command()(sample)
CAPTION = "a light square"


def _checkpoint(run_directory: Path, number: int) -> Path:
    return run_directory / "public" / layout.checkpoint_directory(number)


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _refusal(*arguments: object) -> CommonweightError:
    error = _invoke(*arguments).exception
    assert isinstance(error, CommonweightError), error
    return error


def _drawn(out: Path, *arguments: object) -> npt.NDArray[np.uint8]:
    """Draw into `out` and return its pixels [height, width]."""
    result = _invoke(*arguments, "-o", out, "--steps", "3")
    assert result.exit_code == 0, result.output
    raw = out.read_bytes()
    width, height = struct.unpack_from(">II", raw, 16)
    start = raw.index(b"IDAT")
    (length,) = struct.unpack_from(">I", raw, start - 4)
    rows = np.frombuffer(zlib.decompress(raw[start + 4 : start + 4 + length]), dtype=np.uint8)
    return rows.reshape(height, 1 + width)[:, 1:]


def test_a_picture_comes_out_of_a_checkpoint(run_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "light.png"
    place = _checkpoint(run_directory, 2)
    result = _invoke(place, CAPTION, "-o", out, "--steps", "2")
    assert result.exit_code == 0, result.output
    told = f"{out}: 'a light square', 1 picture of 4 x 4 pixels, seed 0, from {place}, in "
    assert result.output.startswith(told)
    assert re.fullmatch(r"\d+\.\d\d s \(\d+\.\d\d s each, cpu\)\n", result.output.removeprefix(told))
    assert [path.name for path in tmp_path.iterdir()] == ["light.png"]


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(run_directory: Path, tmp_path: Path) -> None:
    place = _checkpoint(run_directory, 2)
    first, again, other = (
        _drawn(tmp_path / f"{number}.png", place, CAPTION, "--seed", seed) for number, seed in enumerate((7, 7, 8))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_caption_and_the_guidance_reach_the_picture(run_directory: Path, tmp_path: Path) -> None:
    place = _checkpoint(run_directory, 2)
    light = _drawn(tmp_path / "1.png", place, "light", "--guidance", "50", "--seed", "3")
    dark = _drawn(tmp_path / "2.png", place, "dark", "--guidance", "50", "--seed", "3")
    unguided = _drawn(tmp_path / "3.png", place, "light", "--guidance", "1", "--seed", "3")
    assert not np.array_equal(light, dark)
    assert not np.array_equal(light, unguided)


@pytest.mark.parametrize("inside", ["", "public"])
def test_a_run_stands_for_its_newest_checkpoint(run_directory: Path, tmp_path: Path, inside: str) -> None:
    newest = _drawn(tmp_path / "1.png", _checkpoint(run_directory, 2), CAPTION)
    assert np.array_equal(_drawn(tmp_path / "2.png", run_directory / inside, CAPTION), newest)
    result = _invoke(run_directory / inside, CAPTION, "-o", tmp_path / "3.png", "--steps", "1")
    assert "checkpoints/000002, in " in result.output


def test_a_checkpoint_that_is_being_published_is_not_the_newest_yet(run_directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_directory / "public", tmp_path / "public"))
    (copy / layout.checkpoint_directory(2) / layout.MANIFEST).unlink()
    (copy / "checkpoints" / ".making-000003").mkdir()
    result = _invoke(copy, CAPTION, "-o", tmp_path / "1.png", "--steps", "1")
    assert "checkpoints/000001, in " in result.output


def test_several_pictures_come_side_by_side_and_the_first_is_the_single_one(
    run_directory: Path, tmp_path: Path
) -> None:
    place = _checkpoint(run_directory, 2)
    single = _drawn(tmp_path / "1.png", place, CAPTION, "--seed", "5")
    sheet = _drawn(tmp_path / "5.png", place, CAPTION, "--seed", "5", "--count", "5")
    assert sheet.shape == (8, 12), "two rows of three"
    # Other batch sizes may round otherwise in the last bit, which may move a pixel by one.
    assert np.abs(sheet[:4, :4].astype(int) - single.astype(int)).max() <= 1
    assert not np.array_equal(sheet[:4, :4], sheet[:4, 4:8])
    assert not sheet[4:, 8:].any(), "the place that no picture takes is black"


def test_enlarging_repeats_pixels(run_directory: Path, tmp_path: Path) -> None:
    place = _checkpoint(run_directory, 2)
    small = _drawn(tmp_path / "1.png", place, CAPTION)
    large = _drawn(tmp_path / "2.png", place, CAPTION, "--enlarge", "8")
    assert np.array_equal(large, small.repeat(8, axis=0).repeat(8, axis=1))


def test_pictures_can_have_another_size_that_the_model_can_draw(run_directory: Path, tmp_path: Path) -> None:
    place = _checkpoint(run_directory, 2)
    assert _drawn(tmp_path / "1.png", place, CAPTION, "--size", "4x2").shape == (2, 4)
    for size, words in (("4x3", "multiple of 2"), ("400x4", "at most 4"), ("4", "no width and height")):
        error = _refusal(place, CAPTION, "-o", tmp_path / "2.png", "--size", size)
        assert isinstance(error, UsageError)
        assert words in error.message


def test_a_directory_gets_a_file_for_each_caption_that_says_what_it_is(run_directory: Path, tmp_path: Path) -> None:
    place = _checkpoint(run_directory, 2)
    more = ("--count", "2", "--steps", "1", "--negative", "blurred", "--interval", "0.2-0.8", "--seed", "7")
    result = _invoke(place, "light", "dark", "-o", tmp_path, *more)
    assert result.exit_code == 0, result.output
    assert "'light', 'dark', 4 pictures of 4 x 4 pixels" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"000{number}.png" for number in range(4)]
    said = (tmp_path / "0002.png").read_bytes()
    for words in (
        b"parameters\0\0\0\0\0dark\nNegative prompt: blurred\nSteps: 1, Sampler: Euler, CFG scale: 3.0, Seed: 7",
        b"Size: 4x4, Guidance interval: 0.2-0.8, Model: 000002, Model hash: ",
        b", Noise: 2",
    ):
        assert words in said


def test_a_directory_is_made_and_later_pictures_are_numbered_on(run_directory: Path, tmp_path: Path) -> None:
    place, out = _checkpoint(run_directory, 2), tmp_path / "pictures"
    first = _invoke(place, "light", "dark", "-o", out, "--steps", "1")
    assert first.exit_code == 0, first.output
    assert first.output.startswith(f"{out / '0000.png'} to 0001.png: ")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "0000.png").unlink()
    (out / "0007.png").write_bytes(b"another's")
    second = _invoke(place, "light", "-o", out, "--steps", "1", "--seed", "9")
    assert second.output.startswith(f"{out / '0008.png'}: ")
    assert sorted(path.name for path in out.iterdir()) == ["0001.png", "0007.png", "0008.png"]
    assert (out / "0001.png").read_bytes() == before["0001.png"]
    nowhere = _refusal(place, CAPTION, "-o", tmp_path / "not" / "there")
    assert "There is no directory" in nowhere.message


def _parameters(path: Path) -> str:
    raw = path.read_bytes()
    start = raw.index(b"parameters\0\0\0\0\0")
    (length,) = struct.unpack_from(">I", raw, start - 8)
    return raw[start : start + length].decode()


def test_a_picture_names_the_run_and_the_weights_that_drew_it(run_directory: Path, tmp_path: Path) -> None:
    place, older = _checkpoint(run_directory, 2), _checkpoint(run_directory, 1)
    averaged, raw = (sha256_hex((place / name).read_bytes()) for name in (layout.EMA, layout.WEIGHTS))
    _drawn(tmp_path / "1.png", place, CAPTION)
    assert f"Model: 000002, Model hash: {averaged}, Model run: {RUN}" in _parameters(tmp_path / "1.png")
    _drawn(tmp_path / "2.png", place, CAPTION, "--raw", "--guide", older)
    said = _parameters(tmp_path / "2.png")
    assert f"Model: 000002, Model hash: {raw}, Model run: {RUN}" in said
    assert f"Guide: 000001, Guide hash: {sha256_hex((older / layout.WEIGHTS).read_bytes())}, Guide run: {RUN}" in said


def test_no_run_is_named_for_weights_that_it_has_not_signed_for(run_directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(_checkpoint(run_directory, 2), tmp_path / "copy"))
    (copy / layout.EMA).write_bytes((copy / layout.WEIGHTS).read_bytes())
    result = _invoke(copy, CAPTION, "-o", tmp_path / "1.png", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "note: no run is named" in result.output
    said = _parameters(tmp_path / "1.png")
    assert f"Model hash: {sha256_hex((copy / layout.WEIGHTS).read_bytes())}" in said
    assert RUN not in said


def test_what_is_to_be_avoided_changes_the_picture(run_directory: Path, tmp_path: Path) -> None:
    place, older = _checkpoint(run_directory, 2), _checkpoint(run_directory, 1)
    plain, avoiding, guided = (
        _drawn(tmp_path / f"{number}.png", place, CAPTION, "--guidance", "50", *more)
        for number, more in enumerate(((), ("--negative", "dark"), ("--guide", older)))
    )
    assert not np.array_equal(plain, avoiding)
    assert not np.array_equal(plain, guided)
    both = _refusal(place, CAPTION, "-o", tmp_path / "4.png", "--negative", "dark", "--guide", older)
    assert "give one of them" in both.message
    wrong = _refusal(place, CAPTION, "-o", tmp_path / "4.png", "--interval", "0.9-0.1")
    assert "the lower one first" in wrong.message


def test_the_running_average_draws_unless_the_weights_themselves_are_wanted(
    run_directory: Path, tmp_path: Path
) -> None:
    place = _checkpoint(run_directory, 2)
    averaged = _drawn(tmp_path / "1.png", place, CAPTION)
    raw = _drawn(tmp_path / "2.png", place, CAPTION, "--raw")
    assert not np.array_equal(averaged, raw)
    copy = Path(shutil.copytree(place, tmp_path / "copy"))
    (copy / layout.EMA).unlink()
    assert np.array_equal(_drawn(tmp_path / "3.png", copy, CAPTION), raw)


def test_a_picture_to_start_from_is_kept_as_far_as_its_strength_says(run_directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="pillow comes with the demo extra")
    place = _checkpoint(run_directory, 2)
    start = np.linspace(0, 255, 16, dtype=np.uint8).reshape(4, 4, 1)
    (tmp_path / "start.png").write_bytes(png_bytes(start))
    kept, changed, forgotten = (
        _drawn(tmp_path / f"{number}.png", place, CAPTION, "--init", tmp_path / "start.png", "--strength", strength)
        for number, strength in enumerate(("0", "0.7", "1"))
    )
    assert np.array_equal(kept, start[:, :, 0])
    assert "Denoising strength: 0.7" in _parameters(tmp_path / "1.png")
    assert "Init image: start.png" in _parameters(tmp_path / "1.png")
    assert not np.array_equal(changed, kept)
    assert np.array_equal(forgotten, _drawn(tmp_path / "plain.png", place, CAPTION))
    (tmp_path / "start.png").write_bytes(b"no picture")
    error = _refusal(place, CAPTION, "-o", tmp_path / "1.png", "--init", tmp_path / "start.png")
    assert isinstance(error, UsageError)
    assert "can't be read as a picture" in error.message


def test_a_strength_without_a_picture_to_start_from_is_refused(run_directory: Path, tmp_path: Path) -> None:
    error = _refusal(run_directory, CAPTION, "-o", tmp_path / "1.png", "--strength", "0.5")
    assert isinstance(error, UsageError)
    assert "--init" in error.message


def test_a_file_that_cannot_be_written_is_said_before_anything_is_drawn(run_directory: Path, tmp_path: Path) -> None:
    place = _checkpoint(run_directory, 1)
    jpeg = _refusal(place, CAPTION, "-o", tmp_path / "light.jpg")
    assert isinstance(jpeg, UsageError)
    assert "ends in .jpg, but pictures are written as PNG" in jpeg.message
    (tmp_path / "notes").write_text("mine")
    assert "neither ends in .png nor is a directory" in _refusal(place, CAPTION, "-o", tmp_path / "notes").message
    nowhere = _refusal(place, CAPTION, "-o", tmp_path / "nowhere" / "light.png")
    assert isinstance(nowhere, UsageError)
    assert "no directory" in nowhere.message
    (tmp_path / "folder.png").mkdir()
    assert isinstance(_refusal(place, CAPTION, "-o", tmp_path / "folder.png", "--steps", "1"), LocalProblem)


def test_a_directory_of_something_else_is_a_mistake_in_usage(tmp_path: Path) -> None:
    error = _refusal(tmp_path, CAPTION, "-o", tmp_path / "light.png")
    assert isinstance(error, UsageError)
    assert f"{tmp_path} is neither a checkpoint nor a run's directory" in error.message
    assert "There is no directory" in _refusal(tmp_path / "nowhere", CAPTION, "-o", tmp_path / "light.png").message
    (tmp_path / "checkpoints").mkdir()
    assert "holds no published checkpoint" in _refusal(tmp_path, CAPTION, "-o", tmp_path / "light.png").message


@pytest.mark.parametrize("name", ["transformer/config.json", "commonweight.json", layout.EMA])
def test_a_damaged_checkpoint_is_named(run_directory: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(_checkpoint(run_directory, 2), tmp_path / "copy"))
    (copy / name).write_bytes(b"{")
    error = _refusal(copy, CAPTION, "-o", tmp_path / "light.png")
    assert isinstance(error, CheckpointCorrupt)
    assert name in error.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that must be missing here")
def test_a_device_that_is_not_there_is_said(run_directory: Path, tmp_path: Path) -> None:
    error = _refusal(_checkpoint(run_directory, 2), CAPTION, "-o", tmp_path / "1.png", "--device", "cuda")
    assert isinstance(error, DeviceUnavailable)


def test_options_out_of_range_are_mistakes_in_usage(run_directory: Path, tmp_path: Path) -> None:
    for option in (("--steps", "0"), ("--count", "0"), ("--enlarge", "0"), ("--guidance", "-1"), ("--device", "tpu")):
        result = _invoke(run_directory, CAPTION, "-o", tmp_path / "1.png", *option)
        assert result.exit_code == 2, option
        assert option[0] in result.output


def _spoiled(run_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_checkpoint(run_directory, 2), tmp_path / "spoiled"))


def test_weights_that_are_not_numbers_draw_no_picture(run_directory: Path, tmp_path: Path) -> None:
    place, out = _spoiled(run_directory, tmp_path), tmp_path / "out.png"
    raw = bytearray((place / layout.EMA).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start:] = b"\xff" * (len(raw) - start)
    (place / layout.EMA).write_bytes(raw)
    error = _refusal(place, CAPTION, "-o", out, "--steps", "1")
    assert isinstance(error, CheckpointCorrupt)
    assert "not finite" in error.message
    assert not out.exists()


@pytest.mark.parametrize(
    "name", [layout.EMA, "commonweight.json", "transformer/config.json", "scheduler/scheduler_config.json"]
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(run_directory: Path, tmp_path: Path, name: str) -> None:
    place = _spoiled(run_directory, tmp_path)
    (place / name).unlink()
    os.mkfifo(place / name)
    error = _refusal(place, CAPTION, "-o", tmp_path / "out.png")
    assert isinstance(error, CheckpointCorrupt)
    assert "no plain file" in error.message


@pytest.mark.parametrize("number", ["NaN", "-1", "1" + "0" * 400])
def test_a_shift_that_no_schedule_has_is_the_checkpoints_fault(
    run_directory: Path, tmp_path: Path, number: str
) -> None:
    place = _spoiled(run_directory, tmp_path)
    path = place / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace('"shift": 1.0', f'"shift": {number}'))
    assert isinstance(_refusal(place, CAPTION, "-o", tmp_path / "out.png"), CheckpointCorrupt)


def test_a_full_disk_is_called_that(run_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    out.symlink_to("/dev/full")
    error = _refusal(_checkpoint(run_directory, 2), CAPTION, "-o", out, "--steps", "1")
    assert isinstance(error, DiskFull)
    assert str(out) in error.message
