"""One of two processes that train a tiny model together: python distributed_worker.py METHOD RANK CHECKPOINT DATA OUT

METHOD is pmod or dynamic-llava. Process 0 has the samples with images, process 1 those of text alone. Writes
``OUT/{mode}.pt`` with the mean of the losses and the gradients; mode "alone" is process 0 on all four samples without
the other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoProcessor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pruneops.methods import DynamicLlava
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.models import LlavaForConditionalGeneration
from pruneops.pruning import find_text_model
from pruneops.training import Collator, LlavaDataset

# Sharded as accelerate does it, and with what else may change the result; p-MoD wraps layers, so it is tried further.
MODES = {
    "pmod": ("ddp", "fsdp2", "fsdp2-accelerate", "ddp-checkpointed", "fsdp2-accelerate-checkpointed"),
    "dynamic-llava": ("ddp", "fsdp2", "fsdp2-accelerate-checkpointed"),
}
# The checkpoint itself carries p-MoD.
PRUNING = {
    "pmod": {},
    "dynamic-llava": {
        "pruning": DynamicLlava(0.4, 0.6, 3, d_model=16, nhead=2, dim_feedforward=24, sparse_layer=1),
    },
}


def load(method: str, checkpoint: str, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, **PRUNING[method]).train()
    if method == "dynamic-llava":
        for predictor in predictors_of(find_text_model(model)).values():
            predictor.noise = lambda shape, device: torch.zeros(shape, device=device)
    model.model.vision_tower.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def shard(model: Any, mode: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    text_model = find_text_model(model)
    layers = text_model.layers
    if "accelerate" in mode:  # as it cuts a model up: stock layers (routers stay with the root), both ends apart
        layers = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    if "accelerate" in mode:
        fully_shard(text_model.embed_tokens, mesh=mesh)
        fully_shard([text_model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def main() -> None:
    method, rank, checkpoint, data, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:6]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    processor = AutoProcessor.from_pretrained(checkpoint)
    dataset, collate = LlavaDataset(data, processor), Collator(processor)
    batch = collate([dataset[i] for i in ((0, 1), (2, 3))[rank]])
    for mode in ("alone", *MODES[method]):
        model = load(method, checkpoint, "checkpointed" in mode)
        if mode == "alone":
            loss = step(model, collate([dataset[i] for i in range(4)]))
        elif mode.startswith("ddp"):
            wrapped = DistributedDataParallel(model)
            loss = step(wrapped, batch)
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
