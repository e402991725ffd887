"""Checkpoints as the authors of methods publish them: recognised by their config, loaded, converted there and back.

A layout is one small file, such as `pmod` and `dynamic_llava`, which registers what its config says and what its
tensors have to be.
"""

from pruneops.models.checkpoints.convert import Source, convert, find_folder, read_config, read_original
from pruneops.models.checkpoints.dynamic_llava import DYNAMIC_LLAVA
from pruneops.models.checkpoints.layouts import Layout, layout_names, layout_of, register
from pruneops.models.checkpoints.loading import load_processor, loading_arguments
from pruneops.models.checkpoints.pmod import PMOD

__all__ = [
    "DYNAMIC_LLAVA",
    "PMOD",
    "Layout",
    "Source",
    "convert",
    "find_folder",
    "layout_names",
    "layout_of",
    "load_processor",
    "loading_arguments",
    "read_config",
    "read_original",
    "register",
]
