"""Supervised fine-tuning with the stock Trainer: LLaVA's data format, and batches that every method can train on."""

from pruneops.training.alignment import AlignedLlavaForConditionalGeneration, AlignmentCollator, ReadPictures
from pruneops.training.collate import Collator
from pruneops.training.conversations import Conversation, Turn, encode, render
from pruneops.training.dataset import LlavaDataset
from pruneops.training.dynamic_llava import GumbelTemperature, parameter_groups
from pruneops.training.initialisation import match_and_copy
from pruneops.training.tower import PatchReader, patch_accuracy

__all__ = [
    "AlignedLlavaForConditionalGeneration",
    "AlignmentCollator",
    "Collator",
    "Conversation",
    "GumbelTemperature",
    "LlavaDataset",
    "PatchReader",
    "ReadPictures",
    "Turn",
    "encode",
    "match_and_copy",
    "parameter_groups",
    "patch_accuracy",
    "render",
]
