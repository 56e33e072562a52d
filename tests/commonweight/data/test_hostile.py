"""Sources and data sets from strangers: nothing outside of them is read, nothing waits, nothing false is signed."""

import fcntl
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from commonweight.cli.main import app
from commonweight.data.dataset import open_dataset
from commonweight.data.index import Rules, look
from commonweight.data.layout import HELDOUT, MANIFEST, REPORT, SKIPPED, WORK
from commonweight.data.pictures import Bucket, PictureSkipped, decode
from commonweight.data.sources import Item, items_of, list_sources, read_place
from protocol.documents import sign
from protocol.errors import CommonweightError, DatasetInvalid, DirectoryInUse, UsageError
from protocol.keys import PrivateKey
from tests.commonweight.data.drawn import folder, picture

RULES = Rules(
    among=(Bucket(height=8, width=8),),
    channels=1,
    least_side=4,
    licence="CC0-1.0",
    source="here",
    licences=None,
    most_caption=99,
)
RECIPE = ("--preset", "digits", "--licence", "CC0-1.0", "--heldout", "2", "--least-side", "8", "--processes", "1")


def _prepare(source: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(
        app, ["data", "prepare", str(source), "-o", str(out), *RECIPE, "--shard-mib", "0.02", *more]
    )


def _refusal(result: Result) -> CommonweightError:
    assert isinstance(result.exception, CommonweightError), (result.exception, result.output)
    return result.exception


def _items(path: Path, pictures: Path | None = None) -> dict[str, Item]:
    return {item.key: item for file in list_sources(path) for item in items_of(file, pictures)}


def _png() -> bytes:
    buffer = io.BytesIO()
    picture(1)[0].save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("source") / "pictures", 40)


@pytest.fixture(scope="module")
def prepared(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    assert _prepare(small, out).exit_code == 0
    return out


def test_links_and_pipes_beside_a_picture_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the curator's own key")
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("linked", "piped", "large"):
        (root / f"{name}.png").write_bytes(_png())
    (root / "linked.txt").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "piped.json")
    (root / "large.json").write_bytes(b" " * ((1 << 20) + 1))
    (root / "elsewhere.png").symlink_to(tmp_path / "secret")
    items = _items(root)
    assert set(items) == {"linked.png", "piped.png", "large.png"}
    for item in items.values():
        row = look(item, RULES)
        assert (row.skipped, row.caption) == ("unreadable", "")


def test_an_id_leads_nowhere_but_into_the_folder_of_pictures(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "p.png").write_bytes(_png())
    (tmp_path / "fetched").mkdir()
    table = pyarrow.table({"id": ["../private/p.png", "../private/p"], "caption": ["one", "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    items = _items(tmp_path / "t.parquet", tmp_path / "fetched")
    assert [item.problem for item in items.values()] == ["it was not fetched"] * 2
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no table PAR1")
    with pytest.raises(UsageError, match="can't be read as parquet"):
        _items(tmp_path / "bad.parquet", tmp_path / "fetched")


def test_a_licence_that_cannot_be_read_is_not_taken_for_the_default(tmp_path: Path) -> None:
    for name, said in (("broken", "{"), ("listed", '{"caption": "a", "license": ["CC0-1.0"]}')):
        (tmp_path / f"{name}.png").write_bytes(_png())
        (tmp_path / f"{name}.json").write_text(said)
    (tmp_path / "capital.png").write_bytes(_png())
    (tmp_path / "capital.json").write_text('{"caption": "a", "License": "All rights reserved"}')
    rows = {key: look(item, RULES) for key, item in _items(tmp_path).items()}
    assert rows["broken.png"].skipped == rows["listed.png"].skipped == "unreadable"
    assert rows["capital.png"].licence == "All rights reserved"


def test_a_tar_that_lies_about_sizes_costs_nothing(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (
            ("sparse.png", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**46)}),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 512, headers
            tar.addfile(info, io.BytesIO(b"1\n0\n1\n" + bytes(506)))
        info = tarfile.TarInfo("caf\udce9.png")
        content = _png()
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("caf\udce9.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"odd"))
    items = _items(tmp_path / "t.tar")
    assert list(items) == ["t.tar/caf?"]
    assert look(items["t.tar/caf?"], RULES).caption == "odd"
    huge = Item(
        key="x", place=items["t.tar/caf?"].place.__class__(path=str(tmp_path / "t.tar"), size=2**46), caption="x"
    )
    with pytest.raises(ValueError, match="more than"):
        read_place(huge.place)


def test_only_picture_formats_that_start_no_programs_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "EPS")
    with pytest.raises(PictureSkipped):
        decode(buffer.getvalue(), RULES.among, channels=1, least_side=4)
    assert not (tmp_path / "started").exists()


def test_two_at_once_in_one_directory_are_not_possible(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / WORK).mkdir(parents=True)
    with (tmp_path / "out" / WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert isinstance(_refusal(_prepare(small, tmp_path / "out")), DirectoryInUse)
        assert isinstance(_refusal(_prepare(small, tmp_path / "out", "--restart")), DirectoryInUse)
    assert _prepare(small, tmp_path / "out").exit_code == 0


def test_a_source_that_has_changed_since_is_noticed(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "pictures", 20), tmp_path / "out"
    assert "held-out pictures" in _refusal(_prepare(source, out, "--heldout", "999")).message
    index = out / WORK / "index.jsonl"
    index.write_bytes(b"".join(index.read_bytes().splitlines(keepends=True)[:9]))
    image, _ = picture(77)
    image.save(source / "000-first.png")
    (source / "000-first.txt").write_text("a new one")
    assert "another state of the source" in _refusal(_prepare(source, out)).message
    assert _prepare(source, out, "--restart").exit_code == 0


def test_a_note_of_a_shard_that_is_not_there_is_not_believed(small: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    key = ("--key", str(prepared.parent / "data-curator.pem"), "--name", "data")
    assert _prepare(small, out, *key).exit_code == 0
    dataset = open_dataset(out)
    # As a crash before the last step leaves it: notes, no manifest, and a shard lost besides.
    assert _refusal(_prepare(small, tmp_path / "other", *key, "--heldout", "999"))
    (tmp_path / "other" / WORK).rename(out / WORK)
    (out / MANIFEST).unlink()
    dataset.path(dataset.manifest.shards[0]).unlink()
    assert _prepare(small, out, *key).exit_code == 0
    assert open_dataset(out).manifest == open_dataset(prepared).manifest
    assert CliRunner().invoke(app, ["data", "verify", str(out)]).exit_code == 0


def test_starting_again_leaves_nothing_of_what_was_there(small: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for path in prepared.iterdir():
        if path.name != MANIFEST:
            (out / path.name).write_bytes(path.read_bytes())
    (out / WORK).mkdir()
    assert _prepare(small, out, "--accept", "CC-BY-4.0", "--restart").exit_code == 0
    assert CliRunner().invoke(app, ["data", "verify", str(out)]).exit_code == 0
    (out / "stray.safetensors").write_bytes(b"")
    stray = CliRunner().invoke(app, ["data", "verify", str(out)]).exception
    assert isinstance(stray, DatasetInvalid)
    assert "nobody has signed for it" in stray.message


def _copy(prepared: Path, to: Path) -> Path:
    to.mkdir()
    for path in prepared.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_pipes_and_devices_in_a_data_set_are_not_read(prepared: Path, tmp_path: Path) -> None:
    for name, make in (("pipe", os.mkfifo), ("zero", lambda path: path.symlink_to("/dev/zero"))):
        copy = _copy(prepared, tmp_path / name)
        (copy / HELDOUT).unlink()
        make(copy / HELDOUT)
        for arguments in (
            ["data", "verify", str(copy)],
            ["coordinator", "init", str(tmp_path / "run"), "--data", str(copy)],
        ):
            assert isinstance(CliRunner().invoke(app, arguments).exception, DatasetInvalid), arguments
        (copy / MANIFEST).unlink()
        unsigned = CliRunner().invoke(app, ["coordinator", "init", str(tmp_path / "run"), "--data", str(copy)])
        assert isinstance(unsigned.exception, CommonweightError)


def test_what_a_stranger_wrote_is_shown_without_its_control_characters(prepared: Path, tmp_path: Path) -> None:
    copy = _copy(prepared, tmp_path / "copy")
    key = PrivateKey.generate()
    from dataclasses import replace

    manifest = replace(open_dataset(prepared).manifest, name="nice\x1b]0;pwned\x07\nrun id: 0000")
    (copy / MANIFEST).write_bytes(sign(manifest, key))
    (copy / "curator.pub").write_text(key.public.hex)
    settings = ["--set", "model.max_tokens=64", "--set", "rounds.shards_per_unit=1"]
    result = CliRunner().invoke(app, ["coordinator", "init", str(tmp_path / "run"), "--data", str(copy), *settings])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("run id: ")]) == 1
    assert f"signed by the curator {key.public.hex}" in result.output
    honest = (prepared / "curator.pub").read_text().strip()
    pinned = ["coordinator", "init", str(tmp_path / "other"), "--data", str(copy), "--curator", honest, *settings]
    assert isinstance(CliRunner().invoke(app, pinned).exception, DatasetInvalid)
    for content in ("{}", "[1", json.dumps({"caption_characters": {}, "repeated_captions": [{}]})):
        (copy / REPORT).write_text(content)
        assert f"{REPORT} can't be read" in CliRunner().invoke(app, ["data", "inspect", str(copy)]).output
    assert (prepared / SKIPPED).exists()
