"""Fixtures of the GPU tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu_support import REHEARSAL

from pruneops import backends


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "triton: runs kernels in Triton")
    config.addinivalue_line("markers", "rehearsed: of those in Triton, which a rehearsal runs, interpreted")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a backend, marked and named by it, for every test that asks for one."""
    triton, mixed = (pytest.param(name, marks=pytest.mark.triton) for name in (backends.TRITON, "mixed"))
    choices = {
        "backend": [backends.NATIVE, triton],
        "model_backend": [backends.NATIVE, triton, mixed],
        "model_kernels": [backends.NATIVE, triton, mixed] if REHEARSAL else [triton, mixed],
    }
    for fixture, params in choices.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, params, indirect=True)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> Iterator[None]:
    """Seeds torch, and keeps float32 arithmetic float32 (convolutions use TF32 unless told not to)."""
    torch.manual_seed(0)
    previous = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = previous


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the compiled kernels in one test and those in Triton in another; an op without one raises."""
    with backends.use(request.param):
        yield request.param


@pytest.fixture
def native() -> Iterator[None]:
    """Forces the compiled kernels: for what is about their library alone."""
    with backends.use(backends.NATIVE):
        yield


@pytest.fixture
def triton() -> Iterator[None]:
    """Forces the kernels in Triton: for ops that have no other kernel for a GPU."""
    with backends.use(backends.TRITON):
        yield


@contextmanager
def _of_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``native``, ``triton``, or ``mixed`` as users are to get them: compiled kernels first, Triton for the rest.

    Lets every compiled kernel run that there is, also one that no GPU has proven yet. What has none runs its reference
    under ``native``.
    """
    if name == backends.TRITON:
        with backends.use(backends.TRITON):
            yield name
        return
    if not REHEARSAL:
        for backend in (backends.NATIVE, backends.TRITON):
            wanted = backend == backends.NATIVE or name == "mixed"
            registered = backends._ops[backend]["cuda"] if wanted else frozenset()
            monkeypatch.setitem(backends._defaults[backend], "cuda", registered)
    yield name


@pytest.fixture
def model_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whole models on each backend, and on both together."""
    with _of_whole_models(request.param, monkeypatch) as name:
        yield name


@pytest.fixture
def model_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whole models in the ways in which every op is a kernel (on the CPU all): references may wait for the device."""
    with _of_whole_models(request.param, monkeypatch) as name:
        yield name
