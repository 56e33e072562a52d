"""One torch thread, as the machine has few cores; and one published run for all tests that only read it or copy it."""

from dataclasses import replace

import pytest
import torch

from tests.verify.examples import REPLAY, PublishedRun, publish_run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    """Never write into it; `published.copy(tmp_path / ...)` is there for that.

    Weighed by the rule under which every bit of a sketch shows in the weights.
    """
    verification = replace(REPLAY, weighting="geometric-median")
    return publish_run(tmp_path_factory.mktemp("run") / "public", verification=verification)
