"""One of two processes that train a tiny Dynamic-LLaVA together: python dllava_distributed_worker.py RANK CHECKPOINT
DATA OUT

As distributed_worker.py, with predictors whose draws have no noise.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_worker import shard, step
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoProcessor

from pruneops.methods import DynamicLlava
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.models import LlavaForConditionalGeneration
from pruneops.pruning import find_text_model
from pruneops.training import Collator, LlavaDataset

METHOD = DynamicLlava(0.4, 0.6, 3, d_model=16, nhead=2, dim_feedforward=24, sparse_layer=1)


def load(checkpoint: str, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, pruning=METHOD).train()
    for predictor in predictors_of(find_text_model(model)).values():
        predictor.noise = lambda shape, device: torch.zeros(shape, device=device)
    model.model.vision_tower.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def main() -> None:
    rank, checkpoint, data, out = int(sys.argv[1]), *sys.argv[2:5]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    processor = AutoProcessor.from_pretrained(checkpoint)
    dataset, collate = LlavaDataset(data, processor), Collator(processor)
    batch = collate([dataset[i] for i in ((0, 1), (2, 3))[rank]])
    for mode in ("alone", "ddp", "fsdp2", "fsdp2-accelerate-checkpointed"):
        model = load(checkpoint, "checkpointed" in mode)
        if mode == "alone":
            loss = step(model, collate([dataset[i] for i in range(4)]))
        elif mode == "ddp":
            loss = step(DistributedDataParallel(model), batch)
        else:
            shard(model, mode)
            loss = step(model, batch)
        if mode != "alone":
            dist.all_reduce(loss)
            loss /= 2
        gradients = {}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                gradient = weight.grad
                gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        if rank == 0:
            torch.save({"loss": loss, "gradients": gradients}, Path(out) / f"{mode}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
