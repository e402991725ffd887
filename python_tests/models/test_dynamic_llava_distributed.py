"""Two processes train Dynamic-LLaVA as one does: data parallel, and sharded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sft_data
import torch

WORKER = Path(__file__).parent / "dllava_distributed_worker.py"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loss and gradients of every mode of the worker, by name."""
    folder = tmp_path_factory.mktemp("distributed")
    checkpoint, data = sft_data.write_checkpoint(folder), sft_data.write_data(folder / "data")
    command = [str(checkpoint), str(data), str(folder)]
    workers = [
        subprocess.Popen([sys.executable, WORKER, str(rank), *command], stderr=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp2-accelerate-checkpointed"])
def test_two_processes_have_the_loss_and_the_gradients_of_one(mode: str, steps: Any) -> None:
    """Although one of them has no image in its batch, and with it nothing for the image predictor."""
    alone, together = steps["alone"], steps[mode]
    torch.testing.assert_close(together["loss"], alone["loss"], rtol=1e-6, atol=1e-6)
    assert together["gradients"].keys() == alone["gradients"].keys()
    largest = max(gradient.abs().max() for gradient in alone["gradients"].values())
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(
            together["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * float(largest), msg=name
        )


def test_both_predictors_have_gradients(steps: Any) -> None:
    gradients = steps["ddp"]["gradients"]
    for name in ("image_score_predictor.output_mlp.4.weight", "output_text_score_predictor.output_mlp.7.weight"):
        assert gradients[f"model.language_model.{name}"].any()
