"""What a result depends on beside its inputs: versions, the machine, and the state of the source."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pruneops._version import __version__


def versions() -> dict[str, str]:
    """Versions of what matters to a result, without importing it."""
    found = {"pruneops": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def revision() -> str | None:
    """The commit of the source, ``-dirty`` behind it if files were changed; None where pruneops was installed."""
    folder = Path(__file__).parent
    try:
        # In a repository of something else, of which pruneops is no file, this fails.
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=folder, check=True, capture_output=True
        )
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def machine(device: str) -> dict[str, Any]:
    """What computes on a torch device: its name, and for the CPU the threads and the instruction set."""
    import torch

    import pruneops

    if torch.device(device).type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "instruction set": pruneops.build_info()["active_isa"],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
