"""The pruning methods: one file each."""

from pruneops.methods.base import PruningMethod, method_from_dict
from pruneops.methods.pyramiddrop import PyramidDrop

__all__ = ["PruningMethod", "PyramidDrop", "method_from_dict"]
