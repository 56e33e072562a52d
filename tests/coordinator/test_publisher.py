"""Of old checkpoints only snapshots stay whole, and nothing that a snapshot does not replace is ever removed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coordinator.publisher import Publisher
from protocol import layout
from protocol.documents import Manifest
from tests.verify.examples import COORDINATOR, PublishedRun, publish_run


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    torch.set_num_threads(1)
    return publish_run(tmp_path_factory.mktemp("run") / "public")


@pytest.fixture
def run(published: PublishedRun, tmp_path: Path) -> PublishedRun:
    """A copy whose checkpoint 1 is no snapshot, and whose checkpoint 2 is one."""
    copy = published.copy(tmp_path / "public")

    def older(manifest: Manifest) -> Manifest:
        return replace(manifest, snapshot=0)

    copy.forge(1, older)
    return copy


def state_of(run: PublishedRun, number: int) -> set[str]:
    return {path for path in layout.STATE_ROLES if (run.checkpoint(number) / path).exists()}


def test_of_a_checkpoint_that_is_no_snapshot_all_but_the_state_stays(run: PublishedRun) -> None:
    publisher = Publisher(run.public, COORDINATOR)
    others = {path for path in run.checkpoint(1).rglob("*") if path.is_file()}
    for _ in range(2):  # a second time, as after a crash, does nothing
        publisher.thin(1)
        assert state_of(run, 1) == set()
    left = {path for path in run.checkpoint(1).rglob("*") if path.is_file()}
    assert others - left == {run.checkpoint(1) / path for path in layout.STATE_ROLES}
    assert run.checkpoint(1) / layout.PATCH in left


def test_a_snapshot_and_the_first_weights_stay_whole(run: PublishedRun) -> None:
    publisher = Publisher(run.public, COORDINATOR)
    for number in (0, 2, 3):
        publisher.thin(number)
    assert state_of(run, 0) == {layout.WEIGHTS}
    assert state_of(run, 2) == set(layout.STATE_ROLES)
