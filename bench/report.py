"""``python -m bench.report build/bench.json``: the JSON of a run as a markdown table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def _time(ms: float) -> str:
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def _row(info: dict[str, Any]) -> str:
    rate = f"{info['rate']:.0f} {info['rate_unit']} ({info['of_ceiling']:.0%})" if "rate" in info else "-"
    cells = (
        f"`{info['op']}`",
        info["workload"],
        info["dtype"],
        _time(info["ours_ms"]),
        rate,
        info["peer"],
        _time(info["peer_ms"]),
        f"**{info['ratio']:.2f}** ({info['ratio_low']:.2f} to {info['ratio_high']:.2f})",
    )
    return "| " + " | ".join(cells) + " |"


def _generation_row(info: dict[str, Any]) -> str:
    spread = f" ({info['ratio_low']:.2f} to {info['ratio_high']:.2f})" if info["ratio"] != 1 else ""
    cells = (
        info["workload"],
        info["side"],
        f"{info['kept']:.0%}",
        f"{info['used'] / 2**20:.1f}",
        f"{info['allocated'] / 2**20:.1f}",
        f"{info['growths']:.1f}",
        f"{info['copied'] / 2**10:.1f}",
        _time(info["ms"]),
        f"{info['quarters']:.2f}",
        f"**{info['ratio']:.2f}**{spread}",
    )
    return "| " + " | ".join(cells) + " |"


def generation(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the section on long generation; none without rows."""
    if not rows:
        return []
    return [
        "## Long generation",
        "",
        HOW_TO_READ_GENERATION,
        "",
        "| rows x (prompt + new) | decoder | new tokens kept | KV used MiB | KV allocated MiB "
        "| reallocations of a layer | KiB copied a step | ms a step | last / first quarter | time / Dynamic-LLaVA |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
        *map(_generation_row, rows),
        "",
    ]


def _training_row(info: dict[str, Any]) -> str:
    cells = (
        info["workload"],
        info["side"],
        _time(info["ms"]),
        f"**{info['time']:.2f}** ({info['time_low']:.2f} to {info['time_high']:.2f})",
        f"{info['flops']:.2f}",
        "-" if info["realised"] is None else f"{info['realised']:.0%}",
        f"{info['kept_bytes'] / 2**20:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def training(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the section on training steps; none without rows."""
    if not rows:
        return []
    return [
        "## Training steps",
        "",
        HOW_TO_READ_TRAINING,
        "",
        "| rows x (visual + text) | decoder | ms a step | time / keep all | FLOPs / keep all | realised "
        "| activations kept MiB |",
        "|---|---|---:|---|---:|---:|---:|",
        *map(_training_row, rows),
        "",
    ]


def conditions(run: dict[str, Any]) -> str:
    """One paragraph: the machine, the versions and the ceilings measured in the run."""
    machine = run["machine_info"]
    ours = machine["pruneops"]
    ceilings = ours["ceilings"]
    cpu = machine.get("cpu", {}).get("brand_raw") or machine.get("processor") or machine["machine"]
    parts = (
        run["datetime"][:10],
        cpu,
        f"{ours['threads']} threads",
        f"instruction set {ours['isa']}",
        f"Python {ours['python']}",
        f"torch {ours['torch']}",
        f"pruneops {ours['version']}",
    )
    return (
        f"{', '.join(parts)}. In the same run torch reached: "
        f"copy {ceilings['copy_gbs']:.0f} GB/s (bytes read plus written), "
        f"float32 product {ceilings['sgemm_gfs']:.0f} GF/s, "
        f"bfloat16 product {ceilings['bf16_gemm_gfs']:.0f} GF/s."
    )


HOW_TO_READ = """\
Times are medians of alternating rounds in one process, in milliseconds. The ratio is peer time over pruneops
time (above 1: pruneops is faster), with the lowest and highest ratio of a single round behind it. Rates
count the bytes or operations that the result needs (causal attention: pairs below the diagonal only). The
percentage compares a rate with torch's copy or matrix product of the same dtype in the same run. Neither is a
limit: inputs of a few megabytes stay in cache, and attention kernels may use the vector units better than
the matrix product of the library does."""


HOW_TO_READ_GENERATION = """\
Every decoder is fed the same tokens, one a step and row, in turns of 64 steps; a time is the mean over all steps, those
that grow the cache included. Used are the bytes of the keys and values held, allocated those of all slots. A
reallocation gives a layer new tensors and copies what it held: the KiB copied a step are all of it, spread over the
steps. Quarters compare median steps, so what is left of their growth is attention to a longer cache. The last column is
the time beside that of Dynamic-LLaVA (above 1: Dynamic-LLaVA is faster), with the extremes of the turns."""


HOW_TO_READ_TRAINING = """\
A step is forward, backward and AdamW of a decoder of 8 layers of 512, in float32; the sides take turns, and a time is
the median. Times and FLOPs stand beside those of the ragged decoder that keeps everything, with the extremes of the
turns. Realised is the share of the saving in FLOPs that is saved in time. The last column is what the forward pass
keeps for the backward pass, weights not counted."""


def markdown(run: dict[str, Any]) -> str:
    """The whole report: conditions, how to read it, one row a comparison."""
    rows = [bench["extra_info"] for bench in run["benchmarks"] if "ratio" in bench["extra_info"]]
    generated = [row for bench in run["benchmarks"] for row in bench["extra_info"].get("generation", ())]
    trained = [row for bench in run["benchmarks"] for row in bench["extra_info"].get("training", ())]
    lines = [
        "# pruneops against plain torch",
        "",
        conditions(run),
        "",
        HOW_TO_READ,
        "",
        "| op | workload | dtype | pruneops ms | rate | peer | peer ms | ratio |",
        "|---|---|---|---:|---:|---|---:|---|",
        *map(_row, rows),
        "",
        *generation(generated),
        *training(trained),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    try:
        run = json.loads(args.json.read_text())
    except (OSError, json.JSONDecodeError) as error:
        print(f"bench.report: cannot read {args.json}: {error}", file=sys.stderr)
        return 1
    table = markdown(run)
    print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
