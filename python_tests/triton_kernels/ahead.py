"""Compiles kernels for GPUs that are not there: launches are recorded, compiled and not run.

The launchers run as they do on a GPU, on tensors in CPU memory, under a stand-in for Triton's driver; so what is
compiled is what a GPU would get, with the same specialisations. Needs a process that was not started with
TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class _Driver:
    """What a launch asks of a driver before it launches. One device number per architecture keeps caches apart."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would be loaded onto a GPU."""

    name: str
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes a block
    ptx: str


@contextmanager
def _recorded(capability: int) -> Iterator[list]:
    kernels: list = []
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        return kernel

    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(capability))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = launch
        triton.runtime.driver._active = previous


def compiled_by(call: Callable[[], object], capability: int) -> list[Compiled]:
    """The kernels that ``call`` launches, compiled for a compute capability such as 90."""
    with _recorded(capability) as kernels:
        call()
    return [_inspect(kernel) for kernel in {id(kernel): kernel for kernel in kernels}.values()]


def _inspect(kernel) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(kernel.metadata.name, registers, max(stack, local), kernel.metadata.shared, kernel.asm["ptx"])
