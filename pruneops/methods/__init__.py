"""The pruning methods: one file each."""

from pruneops.methods.base import PruningMethod, method_from_dict
from pruneops.methods.dynamic_llava import DynamicLlava
from pruneops.methods.pmod import PMoD
from pruneops.methods.prunevid import PruneVid
from pruneops.methods.pyramiddrop import PyramidDrop

__all__ = ["DynamicLlava", "PMoD", "PruneVid", "PruningMethod", "PyramidDrop", "method_from_dict"]
