"""The pruning methods: one file each."""

from pruneops.methods.average_pool import AveragePool
from pruneops.methods.base import PruningMethod, method_from_dict
from pruneops.methods.dynamic_llava import DynamicLlava
from pruneops.methods.pmod import PMoD
from pruneops.methods.prunevid import PruneVid
from pruneops.methods.pyramiddrop import KEEP_ALL, PyramidDrop
from pruneops.methods.random_drop import RandomDrop

__all__ = [
    "KEEP_ALL",
    "AveragePool",
    "DynamicLlava",
    "PMoD",
    "PruneVid",
    "PruningMethod",
    "PyramidDrop",
    "RandomDrop",
    "method_from_dict",
]
