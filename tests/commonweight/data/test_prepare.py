"""A whole preparation: what comes out, that it is the same however it was interrupted, and what is refused."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from commonweight.cli.main import app
from commonweight.data.dataset import check_shards, open_dataset
from commonweight.data.layout import MANIFEST, REPORT, SKIPPED, WHEREABOUTS, WORK
from coordinator.directory import RunDirectory
from diloco.shards import Shard
from protocol import layout
from protocol.canonical import sha256_hex
from protocol.documents import sign
from protocol.errors import CommonweightError, ConfigInvalid, DatasetInvalid, DirectoryNotEmpty, UsageError
from protocol.keys import PrivateKey
from tests.commonweight.data.drawn import SKIPPED as EXPECTED_SKIPS
from tests.commonweight.data.drawn import folder, picture

COUNT = 150
RECIPE = ("--preset", "rgb32", "--licence", "CC0-1.0", "--accept", "CC0-1.0", "--accept", "CC-BY-4.0")
SIZES = ("--heldout", "20", "--shard-mib", "0.25", "--max-tokens", "8", "--name", "shapes", "--origin", "drawn")


def _command(source: Path, out: Path, *more: str) -> list[str]:
    key = out.parent / "curator.pem"
    return ["data", "prepare", str(source), "-o", str(out), *RECIPE, *SIZES, "--key", str(key), *more]


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def _refusal(*arguments: str) -> CommonweightError:
    error = _invoke(*arguments).exception
    assert isinstance(error, CommonweightError), error
    return error


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("source") / "pictures", COUNT)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "shapes"
    result = _invoke(*_command(source, out, "--processes", "2"))
    assert result.exit_code == 0, result.output
    return out


def _files(out: Path) -> dict[str, str]:
    return {path.name: sha256_hex(path.read_bytes()) for path in out.iterdir() if path.is_file()}


def test_every_picture_is_in_one_shard_or_is_skipped_for_a_reason(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    manifest = dataset.manifest
    assert {reason.name: reason.pictures for reason in manifest.skipped} == EXPECTED_SKIPS
    assert sum(shard.samples for shard in manifest.shards) == COUNT - 20
    assert manifest.heldout.samples == 20
    assert (manifest.name, manifest.source, manifest.licence) == ("shapes", "drawn", "CC-BY-4.0, CC0-1.0")
    assert len(manifest.shards) > 2
    counts = [shard.samples for shard in manifest.shards]
    assert max(counts) - min(counts) <= 1
    check_shards(dataset)
    skipped = [json.loads(line) for line in (prepared / SKIPPED).read_bytes().splitlines()]
    assert {row["key"] for row in skipped} >= {"corrupt.jpg", "tiny.png", "silent.png", "zz-odd.png"}
    details = {row["key"]: row["detail"] for row in skipped}
    assert details["empty.jpg"] == "not a picture, or of a format that is not read"
    assert not (prepared / WORK).exists()


def test_a_picture_is_found_in_its_shard_by_a_part_of_its_key(prepared: Path, source: Path) -> None:
    listed = [json.loads(line) for line in (prepared / WHEREABOUTS).read_bytes().splitlines()]
    assert len({row["key"] for row in listed}) == len(listed) == COUNT
    assert stat.S_IMODE((prepared / WHEREABOUTS).stat().st_mode) == 0o600
    said = _invoke("data", "find", str(prepared), "0007").output
    (row,) = (row for row in listed if row["key"].startswith("0007."))
    assert f"shard {row['shard']}, sample {row['sample']}, 32x32" in said
    assert said.endswith(f": '{picture(7)[1]}'\n")
    dataset = open_dataset(prepared)
    shards = {shard.sha256: Shard.open(dataset.path(shard)) for shard in dataset.manifest.shards}
    for row in (row for row in listed if row["shard"] in shards):
        assert shards[row["shard"]].caption(row["sample"]) == picture(int(row["key"][:4]))[1]
    assert len(_invoke("data", "find", str(prepared), "000").output.splitlines()) == 10
    assert _invoke("data", "find", str(prepared), "zz-ag").output == "zz-again.png: left out, duplicate of 0001.png\n"
    assert "in its key" in _refusal("data", "find", str(prepared), "nobody").message


def test_pictures_of_two_sizes_are_counted_once_and_a_tenth_is_held_out(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    made = _invoke(
        "data", "prepare", str(source), "-o", str(out), *RECIPE, "--side", "8", "--side", "16", "--least-side", "16",
        "--processes", "1",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "135 pictures, in 2 sizes (270 samples), in 2 shards" in made.output
    report = json.loads((out / REPORT).read_bytes())
    assert (report["pictures"], report["samples"]) == (135, 270)
    assert all(len(set(group["keys"])) == len(group["keys"]) for group in report["near_duplicates"])
    assert sum(group["pictures"] for group in report["repeated_captions"]) == 135
    assert sum(report["sizes"].values()) == 270
    assert len(_invoke("data", "find", str(out), "0007").output.splitlines()) in (1, 2), "held out, or in both sizes"


def test_samples_hold_the_pixels_and_the_captions_shuffled(prepared: Path) -> None:
    channel = {"red": 0, "green": 1, "blue": 2}
    dataset = open_dataset(prepared)
    shard = Shard.open(dataset.path(dataset.manifest.shards[0]))
    assert shard.size == (3, 32, 32)
    seen = []
    for number in range(shard.n):
        _, colour, _ = (shard.caption(number) or "").split()
        seen.append(colour)
        latent = np.asarray(shard.latent[number], np.float32)
        darkest = latent.sum(axis=0).argmin()
        assert latent.reshape(3, -1)[:, darkest].argmax() == channel[colour]
    assert len(set(seen[:20])) == 3


def test_one_process_and_another_order_of_work_give_the_same_bytes(
    source: Path, prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "curator.pem").write_bytes((prepared.parent / "curator.pem").read_bytes())
    result = _invoke(*_command(source, tmp_path / "again", "--processes", "1"))
    assert result.exit_code == 0, result.output
    assert _files(tmp_path / "again") == _files(prepared)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(
    source: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    (tmp_path / "curator.pem").write_bytes((prepared.parent / "curator.pem").read_bytes())
    command = [sys.executable, "-P", "-m", "commonweight", *_command(source, out, "--processes", "1")]
    for wanted in ("index.jsonl", "0*.json"):  # while it looks at pictures, and while it writes shards
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + 120
        while not list((out / WORK).glob(wanted)) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    index = out / WORK / "index.jsonl"
    if index.exists():  # as a machine leaves it that lost its power
        with index.open("ab") as file:
            file.write(b'{"half a li')
    result = _invoke(*_command(source, out, "--processes", "1"))
    assert result.exit_code == 0, result.output
    assert _files(out) == _files(prepared)


def test_another_recipe_does_not_go_on_with_the_first_ones_index(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    few = _refusal(*_command(source, out, "--heldout", "500"))
    assert isinstance(few, UsageError)
    assert "500 held-out pictures" in few.message
    assert "corrupt 2" in few.message
    other = _refusal(*_command(source, out, "--least-side", "48"))
    assert "--restart throws it away" in other.message
    assert _invoke(*_command(source, out, "--least-side", "48", "--restart")).exit_code == 0


def test_a_finished_data_set_is_never_written_over(source: Path, prepared: Path) -> None:
    before = _files(prepared)
    refused = _refusal(*_command(source, prepared))
    assert isinstance(refused, DirectoryNotEmpty)
    assert "Remove it, or choose another --out" in refused.message
    assert _files(prepared) == before


def test_a_directory_with_something_else_in_it_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "precious.safetensors").write_bytes(b"mine")
    assert isinstance(_refusal(*_command(source, tmp_path / "models")), DirectoryNotEmpty)
    (tmp_path / "models" / WORK).mkdir()  # as if it had been let in
    assert _invoke(*_command(source, tmp_path / "models", "--restart")).exit_code != 0
    assert (tmp_path / "models" / "precious.safetensors").read_bytes() == b"mine"


def test_inspecting_says_what_is_in_it_and_what_stands_out(prepared: Path, tmp_path: Path) -> None:
    result = _invoke("data", "inspect", str(prepared), "--sheet", str(tmp_path / "sheet.png"))
    assert result.exit_code == 0, result.output
    for words in (
        "130 pictures",
        "20 held out",
        "32x32 150",
        "CC0-1.0",
        "duplicate 1",
        "a unit that draws",
        "curator: ",
    ):
        assert words in result.output
    assert "repeated caption: 'a " in result.output
    assert "other choices of text" not in result.output, "it has no text encoders, and paints in pixels"
    assert f"{prepared}: 130 pictures" in result.output, "its name is that of the directory"
    assert "caption characters: least 12, tenth 12, median 13, nine tenths 14, most 14" in result.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * (128 + 6) + 6, 8 * (128 + 2 * 13 + 12) + 6)
        assert len({sheet.getpixel((6 + x, 6 + y)) for x in range(4) for y in range(4)}) == 1, "32 x 32, four times"
        below = np.asarray(sheet)[136:160, 6:134]
        assert below.min() < 128 < below.max(), "words in a dark colour on white"
    report = json.loads((prepared / REPORT).read_bytes())
    assert report["pictures"] == 130
    assert report["caption_characters"]["most"] == len("a green square")


def test_a_try_that_takes_no_picture_leaves_nothing_so_that_the_next_one_can_ask_otherwise(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    none = _refusal(*_command(source, out, "--least-side", "1000"))
    assert isinstance(none, UsageError)
    assert "No picture is left: " in none.message
    assert not list(tmp_path.iterdir()), "neither the beginning of a data set nor a curator's key"
    out.mkdir()
    assert "No picture is left: " in _refusal(*_command(source, out, "--least-side", "1000")).message
    result = _invoke(*_command(source, out))
    assert result.exit_code == 0, result.output
    assert f"pictures 0/{COUNT + 6}" in result.output
    assert (tmp_path / "curator.pem").exists()


def test_a_source_that_is_not_there_leaves_no_key(tmp_path: Path) -> None:
    missing = _refusal(*_command(tmp_path / "nowhere", tmp_path / "data"))
    assert "is neither a folder nor" in missing.message
    assert not list(tmp_path.iterdir())
    no_place = _refusal(*_command(tmp_path, tmp_path / "data", "--key", str(tmp_path / "not" / "there.pem")))
    assert "to write the curator's key to" in no_place.message


def test_one_of_something_is_not_called_several(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        image = Image.new("RGB", (32, 32), (number, 0, 0))
        image.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("red")
    out = tmp_path / "data"
    made = _invoke(*_command(pictures, out, "--heldout", "1", "--processes", "1"))
    assert made.exit_code == 0, made.output
    assert "3 pictures in 1 shard (" in made.output
    shown = _invoke("data", "inspect", str(out)).output
    assert "look alike: 3 pictures under 1 caption, such as" in shown


def _copy(prepared: Path, to: Path) -> Path:
    to.mkdir()
    for path in prepared.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_verifying_finds_a_changed_byte_a_missing_shard_and_another_curator(prepared: Path, tmp_path: Path) -> None:
    assert "right: " in _invoke("data", "verify", str(prepared)).output
    stranger = PrivateKey.generate().public.hex
    assert isinstance(_refusal("data", "verify", str(prepared), "--curator", stranger), DatasetInvalid)
    copy = _copy(prepared, tmp_path / "copy")
    shard = next(path for path in sorted(copy.glob("*.safetensors")))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    changed = _refusal("data", "verify", str(copy))
    assert isinstance(changed, DatasetInvalid)
    assert shard.name in changed.message
    shard.unlink()
    assert "is missing" in _refusal("data", "verify", str(copy)).message
    (copy / MANIFEST).write_bytes(b"{}")
    assert isinstance(_refusal("data", "verify", str(copy)), DatasetInvalid)
    assert isinstance(_refusal("data", "verify", str(tmp_path)), UsageError)


def test_a_run_takes_the_data_set_with_its_curator_and_publishes_what_he_signed(prepared: Path, tmp_path: Path) -> None:
    result = _invoke("coordinator", "init", str(tmp_path / "run"), "--data", str(prepared))
    assert result.exit_code == 0, result.output
    dataset = open_dataset(prepared)
    run = RunDirectory(tmp_path / "run")
    data = run.config().data
    assert (data.name, data.source, data.licence) == ("shapes", "drawn", "CC-BY-4.0, CC0-1.0")
    assert (data.curator, data.root) == (dataset.curator.hex, dataset.manifest.root)
    assert data.manifest_sha256 == dataset.signed.curated.manifest_sha256
    assert (run.public / layout.DATASET).read_bytes() == (prepared / MANIFEST).read_bytes()
    assert [shard.sha256 for shard in data.shards] == [shard.sha256 for shard in dataset.manifest.shards]


def test_a_run_takes_its_model_and_its_name_from_the_data_set(prepared: Path, tmp_path: Path) -> None:
    init = ("coordinator", "init", str(tmp_path / "run"), "--data", str(prepared))
    told = _invoke(*init, "--template-only").output
    assert told.endswith(f"then: commonweight coordinator init {tmp_path / 'run'} --data {prepared}\n")
    settings = RunDirectory(tmp_path / "run").settings()
    assert (settings.model.preset, settings.model.text, settings.model.max_tokens) == ("rgb32", "byte-patch", 8)
    assert settings.run.name == "shapes"
    assert _invoke(*init, "--set", "run.name=mine").exit_code == 0
    assert RunDirectory(tmp_path / "run").config().name == "mine"


@pytest.mark.parametrize("where", ["run.toml", "--set"])
@pytest.mark.parametrize(
    ("section", "setting", "words"),
    [
        ("model", "max_tokens = 9", "model.max_tokens is 9, but the data set was prepared with 8"),
        ("model", 'text = "bytes"', 'model.text is "bytes", but the data set was prepared with "byte-patch"'),
        ("model", 'preset = "digits"', 'model.preset is "digits" with the space\'s channels 1, but the data set was'),
    ],
)
def test_a_setting_that_the_data_set_was_not_prepared_for_is_refused_with_both_values(
    prepared: Path, tmp_path: Path, where: str, section: str, setting: str, words: str
) -> None:
    run = tmp_path / "run"
    more: tuple[str, ...] = ()
    if where == "run.toml":
        run.mkdir()
        (run / "run.toml").write_text(f"[{section}]\n{setting}\n")
    else:
        more = ("--set", f"{section}.{setting.replace(' = ', '=').replace(chr(34), '')}")
    refused = _refusal("coordinator", "init", str(run), "--data", str(prepared), *more)
    assert isinstance(refused, ConfigInvalid)
    assert words in refused.message
    assert refused.message.endswith("leave the setting out, or prepare the data set for that.")


@pytest.mark.parametrize(
    ("encoder", "named"),
    [
        ({"preset": None}, ""),  # as a version wrote it that named no preset
        ({"preset": "nobody's"}, 'model.preset is "nobody\'s"; it must be '),
        ({"preset": 7}, "model.preset is 7"),
        ({"conditioning": {"max_tokens": 10**9}}, "model.max_tokens is 1000000000"),
        ({"conditioning": "bytes", "space": []}, "the data set was prepared with null"),
    ],
)
def test_whatever_a_curator_wrote_of_the_model_is_checked_like_a_setting(
    prepared: Path, tmp_path: Path, encoder: dict[str, object], named: str
) -> None:
    copy, key = _copy(prepared, tmp_path / "copy"), PrivateKey.generate()
    manifest = open_dataset(prepared).manifest
    described = {name: value for name, value in {**manifest.encoder, **encoder}.items() if value is not None}
    (copy / MANIFEST).write_bytes(sign(replace(manifest, encoder=described), key))
    (copy / "curator.pub").write_text(key.public.hex)
    init = ("coordinator", "init", str(tmp_path / "run"), "--data", str(copy))
    if named:
        assert named in _refusal(*init).message
        assert not (tmp_path / "run").exists()
    else:
        assert _invoke(*init).exit_code == 0
        assert RunDirectory(tmp_path / "run").settings().model.preset == "rgb32"
