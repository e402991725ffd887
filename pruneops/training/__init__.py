"""Supervised fine-tuning with the stock Trainer: LLaVA's data format, and batches that every method can train on."""

from pruneops.training.collate import Collator
from pruneops.training.conversations import Conversation, Turn, encode, render
from pruneops.training.dataset import LlavaDataset
from pruneops.training.dynamic_llava import GumbelTemperature, parameter_groups

__all__ = [
    "Collator",
    "Conversation",
    "GumbelTemperature",
    "LlavaDataset",
    "Turn",
    "encode",
    "parameter_groups",
    "render",
]
