"""One torch thread, and one published run for all tests that only read it or copy it."""

from pathlib import Path

import pytest
import torch

from protocol import layout
from protocol.canonical import sha256_hex
from tests.verify.examples import SHARDS, PublishedRun, publish_run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    """A run with its shards. Never write into it; `published.copy(tmp_path / ...)` is there for that."""
    run = publish_run(tmp_path_factory.mktemp("run") / "public")
    for content in SHARDS:
        path = run.public / layout.shard_path(sha256_hex(content))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return run


@pytest.fixture(scope="session")
def run_directory(published: PublishedRun) -> Path:
    """A run's directory with its public/ in it."""
    return published.public.parent
