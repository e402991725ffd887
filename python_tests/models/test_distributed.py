"""Two processes train a p-MoD model and a Dynamic-LLaVA as one does: data parallel, and sharded."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sft_data
import torch
from distributed_worker import MODES

WORKER = Path(__file__).parent / "distributed_worker.py"
Steps = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def steps_of(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Loss and gradients of every mode of the worker, by name, for a method."""

    @functools.cache
    def steps(method: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("distributed")
        checkpoint, data = sft_data.write_checkpoint(folder), sft_data.write_data(folder / "data")
        command = [str(checkpoint), str(data), str(folder)]
        workers = [
            subprocess.Popen([sys.executable, WORKER, method, str(rank), *command], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            for worker in workers:
                _, error = worker.communicate(timeout=240)
                assert worker.returncode == 0, error
        finally:
            for worker in workers:
                worker.kill()
        return {file.stem: torch.load(file) for file in folder.glob("*.pt")}

    return steps


@pytest.mark.parametrize(("method", "mode"), [(method, mode) for method, modes in MODES.items() for mode in modes])
def test_two_processes_have_the_loss_and_the_gradients_of_one(method: str, mode: str, steps_of: Steps) -> None:
    """Although one of them has no image in its batch, and with it nothing to route or to predict from."""
    alone, together = steps_of(method)["alone"], steps_of(method)[mode]
    torch.testing.assert_close(together["loss"], alone["loss"], rtol=1e-6, atol=1e-6)
    assert together["gradients"].keys() == alone["gradients"].keys()
    largest = max(gradient.abs().max() for gradient in alone["gradients"].values())
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(
            together["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * float(largest), msg=name
        )


def test_every_trained_weight_has_a_gradient_routers_and_projector_included(steps_of: Steps) -> None:
    gradients = steps_of("pmod")["ddp"]["gradients"]
    for part in ("router.router.weight", "router.router.bias", "linear_1.weight", "decoder_layer.mlp.up_proj.weight"):
        found = [bool(gradient.any()) for name, gradient in gradients.items() if part in name]
        # What the last layer does to visual tokens reaches no supervised token, so its router learns nothing.
        expected = [True] * (len(found) - 1) + [".router" not in f".{part}"]
        assert found == expected, part


def test_both_predictors_have_gradients(steps_of: Steps) -> None:
    gradients = steps_of("dynamic-llava")["ddp"]["gradients"]
    for name in ("image_score_predictor.output_mlp.4.weight", "output_text_score_predictor.output_mlp.7.weight"):
        assert gradients[f"model.language_model.{name}"].any()
