"""Fixtures that every test file may use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from pruneops import backends


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many tiny calls: these gain nothing from threads and, on a busy machine, wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Records the op calls of the test, which fails if one of them, or none at all, ran a compiled kernel."""
    with backends.record_calls() as calls:
        yield calls
    assert calls, "the test called no op"
    fallen_back = [op for op, backend in calls if backend != backends.NATIVE]
    assert not fallen_back, f"these ops did not run natively: {fallen_back}"
