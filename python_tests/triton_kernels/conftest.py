"""The Triton kernels under Triton's interpreter: every test of this folder but the ahead-of-time compilation.

``TRITON_INTERPRET=1`` has to be set before Triton is imported, so these tests are their own run (``make test-triton``);
elsewhere they are deselected by the marker that this file gives them. They force the Triton backend themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pruneops import backends

COMPILED = "test_triton_ahead_of_time.py"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name != COMPILED:
            item.add_marker(pytest.mark.interpreted)


@pytest.fixture(autouse=True)
def _in_triton(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.name == COMPILED:
        yield
        return
    with backends.use(backends.TRITON):
        yield
