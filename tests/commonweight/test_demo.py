from pathlib import Path

import pytest

from commonweight.demo import MARKER, prepare_folder
from coordinator.directory import RunDirectory
from protocol.errors import DirectoryInUse, DirectoryNotEmpty


def test_an_earlier_demo_makes_room_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / MARKER).touch()
    prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]


def test_a_demo_whose_run_is_served_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / MARKER).touch()
    with RunDirectory(tmp_path / "run").lock(), pytest.raises(DirectoryInUse):
        prepare_folder(tmp_path)
    assert (tmp_path / "run").is_dir()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(DirectoryNotEmpty):
        prepare_folder(tmp_path)
    assert (tmp_path / "precious").exists()
