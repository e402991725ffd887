"""Fixtures that every test file may use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from pruneops import backends
from pruneops._triton_library import interpreting
from pruneops.testing import backend_under_test

if interpreting:
    import triton_interpreter

    triton_interpreter.install()


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
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the choice of a backend, such as the reference for float64, where the environment forces one."""
    monkeypatch.setattr(backends, "_forced", None)


@pytest.fixture
def native_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Records the op calls of the test, which fails if one of them did not run a kernel, or none was called.

    The kernels are the compiled ones, or those of the backend that the environment forces.
    """
    with backends.record_calls() as calls:
        yield calls
    assert calls, "the test called no op"
    fallen_back = [op for op, backend in calls if backend != backend_under_test()]
    assert not fallen_back, f"these ops did not run in the {backend_under_test()} backend: {fallen_back}"
