"""Every Triton kernel in every configuration compiles for the GPUs of today and fits into them."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from pruneops import _library
from pruneops.triton import KERNELS, TUNABLES, tuning
from pruneops.triton.tuning import Config, Tunable
from python_tests.test_opcheck import CASES
from python_tests.triton_kernels.ahead import Compiled, compiled_by

pytestmark = [pytest.mark.compiled, pytest.mark.slow]

CAPABILITIES = (80, 90, 100)
# Bytes of local memory a thread. A few are addresses parked outside of loops; more would be traffic inside them.
MOST_SPILLED = 32
CPU = torch.device("cpu")


def assert_fits(kernels: list[Compiled], capability: int) -> None:
    assert kernels, "nothing was launched"
    for kernel in kernels:
        assert kernel.spilled <= MOST_SPILLED, f"{kernel.name} spills {kernel.spilled} bytes a thread"
        most = tuning.SHARED_MEMORY[capability]
        assert kernel.shared <= most, f"{kernel.name} needs {kernel.shared} bytes of shared memory, there are {most}"


def configurations() -> list:
    return [
        pytest.param(tunable, shape_class, config, capability, id=f"{tunable.name}-{shape_class}-{i}-sm{capability}")
        for tunable in TUNABLES
        for shape_class in tunable.shape_classes
        for capability in CAPABILITIES
        for i, config in enumerate(tunable.candidates_for(shape_class, capability))
    ]


@pytest.mark.parametrize(("tunable", "shape_class", "config", "capability"), configurations())
def test_every_configuration_compiles(tunable: Tunable, shape_class: str, config: Config, capability: int) -> None:
    call = tunable.problem(shape_class, CPU)
    with tuning.use(tunable, config):
        assert_fits(compiled_by(call, capability), capability)


@pytest.mark.parametrize("tunable", TUNABLES, ids=lambda tunable: tunable.name)
def test_the_last_candidates_fit_any_gpu(tunable: Tunable) -> None:
    for shape_class in tunable.shape_classes:
        with ExitStack() as smallest:
            for other in TUNABLES:
                if shape_class in other.shape_classes:
                    smallest.enter_context(tuning.use(other, other.candidates(shape_class)[-1]))
            for kernel in compiled_by(tunable.problem(shape_class, CPU), 86):
                assert kernel.shared <= tuning.SHARED_MEMORY[86]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("op", "args"), CASES.values(), ids=CASES)
def test_every_op_compiles_for_odd_shapes_too(op, args, capability: int) -> None:
    """The cases of opcheck: small, off every tile, of several dtypes, with and without optional arguments."""
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args())
    assert_fits(compiled_by(lambda: KERNELS[op](*arguments), capability), capability)


def test_every_op_has_a_kernel() -> None:
    assert set(KERNELS) == set(_library.op_names()) == {op for op, _ in CASES.values()}


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
@pytest.mark.parametrize("name", ["varlen_forward", "varlen_backward_keys", "varlen_backward_queries"])
def test_large_products_run_on_tensor_cores(name: str, capability: int, instruction: str) -> None:
    tunable = next(tunable for tunable in TUNABLES if tunable.name == name)
    kernels = compiled_by(tunable.problem("d128 16-bit", CPU), capability)
    assert any(instruction in kernel.ptx for kernel in kernels)
