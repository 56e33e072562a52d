"""One served run for the tests that only ask, and fresh ones for those that break things."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.live_run import LiveRun


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    """A run with many units that is served for the whole session; nobody trains its rounds to their end."""
    settings = ("rounds.units=1000", "rounds.min_units=1000", "rounds.planned=3", "rounds.lease_seconds=600")
    with LiveRun(tmp_path_factory.mktemp("served"), settings) as run:
        yield run.start()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the test's own."""
    return tmp_path
