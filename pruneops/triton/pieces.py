"""Into how many pieces work is cut so that a GPU is full."""

from __future__ import annotations

import torch
import triton


def pieces(programs: int, most: int, device: torch.device, wanted: int = 2) -> int:
    """How many pieces, at most ``most``, the work of ``programs`` programs is cut into; at least 1.

    ``wanted`` programs a multiprocessor: two run at once, so that one waits for memory while the other computes; more
    even out what differs in length. From shapes and the GPU model alone, so that equal calls give equal results.
    """
    return max(1, min(most, wanted * _multiprocessors(device) // max(1, programs)))


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # The interpreter does one program after the other: a few, for splitting to be seen at all. Without it a kernel is
    # only compiled, for a data-centre GPU.
    return 8 if triton.knobs.runtime.interpret else 132
