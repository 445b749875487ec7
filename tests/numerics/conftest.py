"""One thread and a fixed seed for every numerical test."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed() -> Iterator[None]:
    """Seeds torch and keeps it to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
