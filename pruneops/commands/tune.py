"""``pruneops tune``: measure the tile sizes of the Triton kernels on the GPU at hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

TEXT = """\
Times the candidate tile sizes of every Triton kernel for every class of shapes on one
GPU, and keeps the fastest in a table that later programs on this GPU model read. Without
the table the kernels run with the sizes that pruneops ships; nothing is ever tuned by a
call. What the table already has is not measured again, so an interrupted run goes on
where it stopped. Candidates whose results differ are refused.
"""
EXAMPLES = """\
examples:
  pruneops tune --list
  pruneops tune
  pruneops tune --kernels varlen_forward,varlen_backward_keys --device cuda:1
  pruneops tune --again --out triton.json

exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted
"""


def add_parser(commands: Any) -> None:
    """Describe the command to the parser of all commands."""
    parser = commands.add_parser(
        "tune",
        help="measure the tile sizes of the Triton kernels on this GPU",
        description=TEXT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernels", metavar="A,B,...", help="only these (default: all that --list shows)")
    parser.add_argument("--list", action="store_true", help="show kernels, classes of shapes and candidates")
    parser.add_argument("--again", action="store_true", help="measure what the table has, too")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="the GPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table (default: in the user's cache folder)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(action=run)


def run(options: argparse.Namespace) -> int:
    """Tune, and print what was chosen."""
    from pruneops.triton import TUNABLES, tuning

    tunables = _chosen(options.kernels, TUNABLES)
    if options.list:
        for tunable in tunables:
            print(tunable.name)
            for shape_class in tunable.shape_classes:
                print(f"  {shape_class}: {len(tunable.candidates(shape_class))} candidates")
        return 0

    from tqdm import tqdm

    from pruneops.triton import tune

    device = _gpu(options.device)
    path = options.out or tuning.user_table_path()
    table = {} if options.again else tuning.read_table(path)
    work = tune.work_left(tunables, tuning.device_class(device.index)[1], table)
    # disable=None: tqdm shows nothing unless the stream is a terminal.
    bar = tqdm(total=len(work), unit="class", file=sys.stderr, disable=True if options.quiet else None)
    with bar:
        for outcome in tune.tune(work, device, path):
            gain = outcome.default_ms / outcome.best_ms
            what = f"{outcome.kernel}, {outcome.shape_class}"
            chosen = f"{outcome.best_ms:.4f} ms, {gain:.2f}x the default, {outcome.best.to_dict()}"
            bar.write(f"{what}: {chosen}", sys.stdout)
            for reason in outcome.refused:
                bar.write(f"pruneops: note: {what}: refused {reason}", sys.stderr)
            bar.update()
    print(f"{path}: {len(work)} measured" if work else f"{path} is up to date")
    return 0


def _chosen(names: str | None, tunables: Any) -> list[Any]:
    if names is None:
        return list(tunables)
    known = {tunable.name: tunable for tunable in tunables}
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"--kernels must be some of {', '.join(known)}, got {unknown[0]!r}")
    return [known[name] for name in wanted]


def _gpu(name: str) -> Any:
    """The device of ``--device``, with its index."""
    import torch

    device = torch.device(name)
    if device.type != "cuda":
        raise ValueError(f"--device must be a GPU such as cuda or cuda:1, got {name!r}")
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a GPU, and torch finds none that it can use")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device must be one of the {torch.cuda.device_count()} GPUs, got {name!r}")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device
