"""What ``bench/gpu.sh`` found, as ``bench.json`` and ``summary.md``.

``python -m bench.gpu_report environment FILE`` writes what the numbers depend on; ``... summary DIR`` joins whatever
is there by then, also after a failure. The summary needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BACKENDS = ("native", "triton")
MODULES = ("torch", "triton", "transformers", "numpy", "pytest", "pytest_benchmark", "hypothesis")


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def _version(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return "missing"
    return str(getattr(module, "__version__", "unknown"))


def _cutlass(folder: str) -> str:
    """The version of the CUTLASS headers in a folder; no kernel uses them yet."""
    if not folder:
        return "PRUNEOPS_CUTLASS_DIR not set"
    for include in (Path(folder) / "include", Path(folder)):
        header = include / "cutlass" / "version.h"
        if header.is_file():
            numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text()))
            return ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    return f"no cutlass/version.h in {folder}"


def _commit() -> str:
    given = os.environ.get("PRUNEOPS_COMMIT") or _output("git", "rev-parse", "HEAD")
    if not given:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{given} with local changes" if changed else given


def environment() -> dict[str, Any]:
    """Device, driver, versions and commit."""
    found: dict[str, Any] = {
        "commit": _commit(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "nvcc": (re.findall(r"release [^\n]*", _output(os.environ.get("CUDACXX", "nvcc"), "--version")) or ["missing"])[
            0
        ],
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "cutlass": _cutlass(os.environ.get("PRUNEOPS_CUTLASS_DIR", "")),
        "rehearsal": os.environ.get("PRUNEOPS_GPU_REHEARSAL") == "1",
        "versions": {name: _version(name) for name in MODULES},
    }
    import torch

    found["cuda_of_torch"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gb"] = round(properties.total_memory / 2**30)
        found["cache_mb"] = round(properties.L2_cache_size / 1e6)
    return found


# ---------------------------------------------------------------------- reading what the steps left


def read_json(path: Path) -> Any:
    """The content, or None if the file is missing or was cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def test_counts(path: Path) -> dict[str, Any] | None:
    """Tests, failures and names of failed tests in a JUnit file."""
    try:
        suites = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    cases = list(suites.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname', '')}::{case.get('name', '')}" for case in failed]
    return {"tests": len(cases), "failed": len(failed), "skipped": len(skipped), "names": names}


def collect(state: Path) -> dict[str, Any]:
    """Everything in the state folder of a run, in the order in which the steps ran."""
    steps = [step for step in map(read_json, state.glob("*.status")) if step]
    steps.sort(key=lambda step: (step.get("began", 0), step["step"]))
    for step in steps:
        step["counts"] = test_counts(state / f"{step['step']}.xml")
    plan = state / "plan"
    planned = plan.read_text().split() if plan.is_file() else []
    ran = {step["step"] for step in steps}
    steps += [{"step": name, "status": "not run"} for name in planned if name not in ran]
    # What is planned first comes first in the table as well.
    places = {name: i for i, name in enumerate(planned)}
    benchmarks = []
    for path in sorted(state.glob("bench_*.json"), key=lambda path: (places.get(path.stem, len(places)), path.stem)):
        benchmarks += (read_json(path) or {}).get("benchmarks", [])
    return {"environment": read_json(state / "environment.json") or {}, "steps": steps, "benchmarks": benchmarks}


# ---------------------------------------------------------------------- writing


def _us(ms: float) -> str:
    us = ms * 1e3
    return f"{us:.2f}" if us < 100 else f"{us:.0f}"


def _ratio(result: dict[str, Any]) -> str:
    return f"**{result['ratio']:.2f}** ({result['ratio_low']:.2f} to {result['ratio_high']:.2f})"


def target_verdicts(info: dict[str, Any]) -> list[tuple[str, bool]]:
    """Every target of a comparison in words, and whether it was met. All are judged on graph replays."""
    targets = info.get("targets") or {}
    verdicts = []
    if targets.get("ratio") is not None:
        met = info["ratio"] >= targets["ratio"]
        verdicts.append((f"{info['ratio']:.2f}x, target {targets['ratio']:g}x", met))
    if targets.get("us") is not None:
        met = info["ours_ms"] * 1e3 <= targets["us"]
        verdicts.append((f"{info['ours_ms'] * 1e3:.2f} us, target {targets['us']:g} us", met))
    if targets.get("of_copy") is not None:
        met = info["of_ceiling"] >= targets["of_copy"]
        verdicts.append((f"{info['of_ceiling']:.2f} of the copy, target {targets['of_copy']:g}", met))
    return verdicts


@dataclass
class Case:
    """What was timed of one op, workload and peer, by backend."""

    sides: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def any(self) -> dict[str, Any]:
        return next(iter(self.sides.values()))


def cases(infos: list[dict[str, Any]]) -> list[Case]:
    """One for each row of the table, in the order of their first measurement."""
    found: dict[tuple[str, ...], Case] = {}
    for info in infos:
        key = info["op"], info["workload"], info["dtype"], info["peer"]
        found.setdefault(key, Case()).sides[info["backend"]] = info
    return list(found.values())


def _on_each(case: Case, cell: Callable[[dict[str, Any]], str]) -> str:
    """What a cell says of each backend, a dash where nothing was timed or there is nothing to say."""
    return " / ".join(cell(case.sides[name]) if name in case.sides else "-" for name in BACKENDS)


def _rate(info: dict[str, Any]) -> str:
    return f"{info['rate']:.0f} {info['rate_unit']} ({info['of_ceiling']:.0%})" if "rate" in info else "-"


def _eager(info: dict[str, Any]) -> str:
    eager = info.get("eager")
    return f"{_us(eager['ours_ms'])}: {eager['ratio']:.2f}" if eager else "-"


def _marks(info: dict[str, Any]) -> str:
    return " ".join("met" if met else "MISSED" for _, met in target_verdicts(info)) or "-"


def _bench_row(case: Case) -> str:
    info = case.any
    cells = [f"`{info['op']}`", info["workload"], info["dtype"], info["peer"], _us(info["peer_ms"])]
    for name in BACKENDS:
        side = case.sides.get(name)
        cells += [_us(side["ours_ms"]), _ratio(side)] if side else ["-", "-"]
    cells += [_on_each(case, cell) for cell in (_eager, _rate, lambda side: f"{side.get('spread', 0):.0%}", _marks)]
    return "| " + " | ".join(cells) + " |"


def _totals(infos: list[dict[str, Any]]) -> list[str]:
    """Targets met and missed, backend by backend."""
    lines = []
    for name in BACKENDS:
        verdicts = [(info, *verdict) for info in infos if info["backend"] == name for verdict in target_verdicts(info)]
        if not verdicts:
            continue
        missed = [(info, text) for info, text, met in verdicts if not met]
        lines += [f"Targets met by {name}: {len(verdicts) - len(missed)} of {len(verdicts)}.", ""]
        lines += [
            f"- missed: `{info['op']}`, {info['workload']}, {info['dtype']}, against {info['peer']}: {text}"
            for info, text in missed
        ]
        lines += [""] if missed else []
    return lines


def _step_row(step: dict[str, Any]) -> str:
    counts = step.get("counts")
    tests = "-"
    if counts:
        tests = f"{counts['tests'] - counts['failed'] - counts['skipped']} passed, {counts['failed']} failed"
        if counts["skipped"]:
            tests += f", {counts['skipped']} skipped"
    return f"| {step['step']} | {step['status']} | {step.get('seconds', '-')} | {tests} |"


def conditions(found: dict[str, Any]) -> list[str]:
    """The lines about device, versions and commit."""
    versions = found.get("versions") or {}
    device = found.get("device", "unknown device")
    if "multiprocessors" in found:
        device += (
            f", compute capability {found['compute_capability']}, {found['multiprocessors']} multiprocessors, "
            f"{found['memory_gb']} GiB, {found['cache_mb']} MB of L2 cache"
        )
    return [
        f"- Device: {device}; driver {found.get('driver', 'unknown')}; {found.get('cpus', '?')} CPUs",
        f"- torch {versions.get('torch', '?')} (CUDA {found.get('cuda_of_torch', '?')}), "
        f"nvcc {found.get('nvcc', '?')}, Python {found.get('python', '?')}, "
        f"transformers {versions.get('transformers', '?')}, triton {versions.get('triton', '?')}",
        f"- Commit: {found.get('commit', 'unknown')}",
        f"- CUTLASS headers (unused): {found.get('cutlass', 'unknown')}",
    ]


def verdict(steps: list[dict[str, Any]]) -> str:
    """One line about all steps: what failed first, then what is missing."""
    fine = ("passed", "not available")
    failed = [step["step"] for step in steps if step["status"] not in (*fine, "not run")]
    absent = {
        "not finished": [step["step"] for step in steps if step["status"] == "not run"],
        "not available here": [step["step"] for step in steps if step["status"] == "not available"],
    }
    passed = sum(step["status"] == "passed" for step in steps)
    parts = [f"FAILED: {', '.join(failed)}"] if failed else []
    parts += [f"{passed} of {len(steps)} steps passed"]
    parts += [f"{what}: {', '.join(names)}" for what, names in absent.items() if names]
    return "; ".join(parts)


HOW_TO_READ = """\
Times are microseconds per call, medians of alternating rounds in one process; buffers rotate. The main columns are
replays of a CUDA graph; eager times include the host's cost of a launch. A ratio is peer time over pruneops time
(above 1: pruneops is faster), with the lowest and highest ratio of a single round behind it. Each backend was timed in
turn with the peer, and its ratio is to the peer's time in those rounds; the peer's column shows one of them. The spread
is that of pruneops' own rounds: differences below it are noise. A rate counts the bytes or operations that the result
needs, and the percentage is of the ceiling measured in the same process. Cells with a slash: native / triton."""


def markdown(run: dict[str, Any]) -> str:
    """The summary of a run, whole or partial."""
    found, steps = run["environment"], run["steps"]
    lines = ["# pruneops on a GPU", ""]
    if found.get("rehearsal"):
        lines += ["**A rehearsal on the CPU: it tries the scripts and says nothing about a GPU.**", ""]
    lines += [f"Result: **{verdict(steps)}**", "", *conditions(found), ""]
    lines += ["| step | result | seconds | tests |", "|---|---|---:|---|", *map(_step_row, steps), ""]
    failures = [name for step in steps for name in (step.get("counts") or {}).get("names", [])]
    if failures:
        lines += ["Failed tests:", "", *(f"- `{name}`" for name in failures[:40]), ""]
        if len(failures) > 40:
            lines += [f"... and {len(failures) - 40} more, see gpu_tests.log", ""]
    infos = [bench["extra_info"] for bench in run["benchmarks"] if "ratio" in bench.get("extra_info", {})]
    if not infos:
        return "\n".join([*lines, "No benchmark has finished.", ""])
    ceilings = infos[0]["ceilings"]
    lines += [
        "## Benchmarks",
        "",
        f"Ceilings measured in the first suite: copy {ceilings['copy_gbs']:.0f} GB/s (bytes read plus written), "
        f"bfloat16 product {ceilings['bf16_gemm_tfs']:.0f} TF/s, tf32 {ceilings['tf32_gemm_tfs']:.0f} TF/s, "
        f"float32 {ceilings['fp32_gemm_tfs']:.0f} TF/s; a tiny kernel takes {ceilings['launch_graph_us']:.2f} us in a "
        f"graph and {ceilings['launch_eager_us']:.2f} us eagerly.",
        "",
        HOW_TO_READ,
        "",
        "| op | workload | dtype | peer | peer us | native us | native ratio | triton us | triton ratio "
        "| eager us: ratio | rate | spread | targets |",
        "|---|---|---|---|---:|---:|---|---:|---|---|---|---|---|",
        *map(_bench_row, cases(infos)),
        "",
        *_totals(infos),
    ]
    return "\n".join(lines)


def write_summary(folder: Path) -> dict[str, Any]:
    """Writes ``bench.json`` and ``summary.md`` into the folder of a run."""
    run = collect(folder / "state")
    (folder / "bench.json").write_text(json.dumps(run, indent=1) + "\n")
    (folder / "summary.md").write_text(markdown(run))
    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("environment", "the JSON file to write"), ("summary", "the folder of the run")):
        commands.add_parser(name).add_argument("path", type=Path, help=what)
    args = parser.parse_args(argv)
    if args.command == "environment":
        args.path.write_text(json.dumps(environment(), indent=1) + "\n")
        return 0
    if not (args.path / "state").is_dir():
        print(f"bench.gpu_report: {args.path} holds no run: there is no folder state/ in it", file=sys.stderr)
        return 1
    write_summary(args.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
