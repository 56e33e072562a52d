"""One torch thread, and the parts that most of the worker's tests start from."""

import threading
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def never() -> threading.Event:
    """A cancellation that does not come."""
    return threading.Event()
