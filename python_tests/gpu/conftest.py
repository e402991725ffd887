"""Fixtures of the GPU tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pruneops import backends


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> Iterator[None]:
    """Seeds torch, and keeps float32 arithmetic float32 (convolutions use TF32 unless told not to)."""
    torch.manual_seed(0)
    previous = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = previous


@pytest.fixture
def native() -> Iterator[None]:
    """Forces the compiled kernels; an op without one raises."""
    with backends.use(backends.NATIVE):
        yield


@pytest.fixture
def native_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every compiled kernel run that there is, also one that no GPU has proven; the rest falls back."""
    monkeypatch.setitem(backends._unproven, "cuda", frozenset())
