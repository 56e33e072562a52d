"""Folders, tars and tables: what they say of their pictures, and that the bytes are found again."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from commonweight.data.sources import Item, count_items, items_of, list_sources, read_place
from protocol.errors import UsageError
from tests.commonweight.data.drawn import folder, picture

pytest.importorskip("pyarrow")


def _png(number: int) -> bytes:
    image, _ = picture(number)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _items(path: Path, pictures: Path | None = None) -> list[Item]:
    items = [item for file in list_sources(path) for item in items_of(file, pictures)]
    assert sum(count_items(file) for file in list_sources(path)) == len(items), "as many as were counted beforehand"
    return items


def test_a_folder_gives_its_pictures_in_order_with_what_lies_beside_them(tmp_path: Path) -> None:
    items = _items(folder(tmp_path / "pictures", 4))
    assert [item.key for item in items[:4]] == ["0000.jpg", "0001.png", "0002.png", "0003.jpg"]
    assert items[1].caption == picture(1)[1]
    assert (items[1].licence, items[1].source) == (None, None)
    assert (items[2].caption, items[2].licence, items[2].source) == (picture(2)[1], "CC-BY-4.0", "https://example.org")
    assert read_place(items[1].place) == (tmp_path / "pictures" / "0001.png").read_bytes()
    silent = next(item for item in items if item.key == "silent.png")
    assert silent.caption is None


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_webdataset_tar_is_read_without_being_unpacked(tmp_path: Path) -> None:
    members = [
        ("a/0001.png", _png(1)),
        ("a/0001.txt", b"first"),
        ("a/0002.json", json.dumps({"text": "second", "license": "CC0-1.0"}).encode()),
        ("a/0002.jpg", _png(2)),
        ("a/0003.txt", b"no picture"),
        ("b/0001.webp", _png(3)),
    ]
    items = _items(_tar(tmp_path / "00000.tar", members))
    assert [(item.key, item.caption, item.licence) for item in items] == [
        ("00000.tar/a/0001", "first", None),
        ("00000.tar/a/0002", "second", "CC0-1.0"),
        ("00000.tar/b/0001", None, None),
    ]
    assert [read_place(item.place) for item in items] == [_png(1), _png(2), _png(3)]
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 100)
    for look in (_items, count_items):
        with pytest.raises(UsageError, match="uncompressed tar"):
            look(tmp_path / "broken.tar")


def _table(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_a_table_with_links_takes_the_pictures_from_a_folder_by_id(tmp_path: Path) -> None:
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    (fetched / "one.png").write_bytes(_png(1))
    (fetched / "two.jpeg").write_bytes(_png(2))
    table = _table(
        tmp_path / "pd12m.parquet",
        {
            "id": ["one", "x2", "lost"],
            "url": ["https://h/1", "https://h/two.jpeg", "https://h/lost.png"],
            "caption": ["first", "second\nline", "third"],
            "width": [64, 64, 64],
            "license": ["CC0-1.0", "PDM", None],
            "source": ["museum", "museum", "museum"],
        },
    )
    items = _items(table, fetched)
    assert [(item.caption, item.licence, item.source) for item in items] == [
        ("first", "CC0-1.0", "museum"),
        ("second line", "PDM", "museum"),
        (None, None, None),
    ]
    assert [read_place(item.place) for item in items[:2]] == [_png(1), _png(2)]
    assert items[2].problem == "it was not fetched"
    with pytest.raises(UsageError, match="holds links"):
        _items(table)


def test_a_table_with_pictures_in_it_needs_nothing_beside_it(tmp_path: Path) -> None:
    table = _table(
        tmp_path / "inside.parquet",
        {
            "image": [{"bytes": _png(number), "path": None} for number in range(5)],
            "text": [f"picture {number}" for number in range(5)],
        },
    )
    items = _items(table)
    assert [item.caption for item in items] == [f"picture {number}" for number in range(5)]
    assert [read_place(item.place) for item in items] == [_png(number) for number in range(5)]


def test_what_holds_no_pictures_is_a_mistake_in_usage(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError):
            list_sources(path)


def test_captions_are_one_line_of_real_text(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures", 2)
    (root / "silent.txt").write_bytes(b" two\n lines \xc3\xa4nd\0rubbish ")
    (root / "tiny.json").write_text('{"caption": "\\ud800 half a character"}')
    found = {item.key: item.caption for item in _items(root)}
    assert found["silent.png"] == "two lines \u00e4nd rubbish"
    assert found["tiny.png"] == "? half a character"


def test_a_caption_that_is_not_utf_8_is_not_guessed_at(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures", 2)
    (root / "silent.txt").write_bytes("ein roter Würfel".encode("latin-1"))
    found = next(item for item in _items(root) if item.key == "silent.png")
    assert (found.caption, found.reason) == (None, "caption not UTF-8")
    assert found.problem is not None
    assert "from byte 11 on" in found.problem
