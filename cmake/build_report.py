"""What the CUDA kernels of a build use: registers, memory, spills, and the instructions that matter.

Usage: build_report.py [--nvcc NVCC] BUILD_FOLDER

Reads the `*.ptxas.log` files beside the object files and, where a cuobjdump is found, the machine code in the objects.
Writes `cuda_kernels.json` and, as a table, `cuda_kernels.md` into the build folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG = ".ptxas.log"
# Products on tensor cores (of a warp, of a warpgroup), and how data gets into shared memory and to the tensor cores.
INSTRUCTIONS = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG")

Entry = dict[str, Any]


def read_log(text: str) -> list[Entry]:
    """One entry per kernel and architecture of the output of `nvcc -Xptxas -v`."""
    entries: list[Entry] = []
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            entries.append({"mangled": found[1], "arch": found[2]})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            entries[-1].update(stack=int(found[1]), spills=int(found[2]) + int(found[3]))
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            entries[-1].update(registers=int(found[1]), static_shared=int(shared[1]) if shared else 0)
    return entries


def read_sass(lines: Iterator[str]) -> dict[tuple[str, str], set[str]]:
    """Which of the instructions each kernel has, by architecture and mangled name, from `cuobjdump -sass`."""
    used: dict[tuple[str, str], set[str]] = {}
    arch = ""
    current: set[str] = set()
    for line in lines:
        if "/*" in line:
            # An address, a predicate if there is one, the instruction with its modifiers.
            if found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line):
                current.add(found[1])
        elif found := re.search(r"code for (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            current = used.setdefault((arch, found[1]), set())
    return {kernel: {name for name in INSTRUCTIONS if name in names} for kernel, names in used.items()}


def find_cuobjdump(nvcc: str | None) -> str | None:
    """That of the toolkit, else that of Triton's package."""
    beside = [Path(nvcc).resolve().parent / "cuobjdump"] if nvcc else []
    spec = importlib.util.find_spec("triton")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    candidates = [*beside, *(folder / "backends/nvidia/bin/cuobjdump" for folder in folders)]
    return next((str(path) for path in candidates if path.is_file()), shutil.which("cuobjdump"))


def disassembled(cuobjdump: str, path: Path) -> dict[tuple[str, str], set[str]] | None:
    """The instructions of each kernel, or None where cuobjdump cannot read them: it may be older than the compiler."""
    with subprocess.Popen([cuobjdump, "-sass", str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        used = read_sass(iter(process.stdout))
    if process.returncode != 0:
        print(f"{cuobjdump} -sass {path} ended with {process.returncode}", file=sys.stderr)
        return None
    return used


def short_names(mangled: list[str]) -> list[str]:
    """Names as in the source, without the namespace and the parameters; the mangled ones without a c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not mangled:
        return mangled
    names = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return [shortened(name) for name in names.splitlines()]


def shortened(name: str) -> str:
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        # The parameters; a parenthesis in a template argument is a cast.
        if letter == "(" and depth == 0 and not name.startswith("(anonymous namespace)", i):
            name = name[:i]
            break
    name = re.sub(r"\((?:[\w:]+|anonymous namespace)\)(?:::)?", "", name).removeprefix("void ")
    return re.sub(r"\b(?:pruneops::)+", "", name)


def collect(folder: Path, cuobjdump: str | None) -> list[Entry]:
    """One entry per kernel and architecture; `instructions` is None where nothing reads machine code."""
    entries = []
    for log in sorted(folder.rglob(f"*{LOG}")):
        compiled = log.with_name(log.name.removesuffix(LOG))
        if not compiled.is_file():
            continue  # of a source that is gone
        report = read_log(log.read_text(encoding="utf-8"))
        used = disassembled(cuobjdump, compiled) if cuobjdump and report else None
        for entry, name in zip(report, short_names([entry["mangled"] for entry in report]), strict=True):
            found = None if used is None else used.get((entry["arch"], entry["mangled"]), set())
            instructions = None if found is None else [i for i in INSTRUCTIONS if i in found]
            entries.append(
                {"source": compiled.name.removesuffix(".o"), "kernel": name, **entry, "instructions": instructions}
            )
    return entries


def table(entries: list[Entry]) -> str:
    lines = [
        "| source | kernel | architecture | registers | static shared | stack | spills | instructions |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for entry in entries:
        numbers = (entry[key] for key in ("registers", "static_shared", "stack", "spills"))
        instructions = "unknown" if entry["instructions"] is None else " ".join(entry["instructions"]) or "-"
        cells = (entry["source"], f"`{entry['kernel']}`", entry["arch"], *numbers, instructions)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", help="the compiler, beside which cuobjdump is looked for")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    entries = collect(options.folder, find_cuobjdump(options.nvcc))
    (options.folder / "cuda_kernels.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (options.folder / "cuda_kernels.md").write_text(table(entries), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
