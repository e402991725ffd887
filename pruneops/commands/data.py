"""``pruneops data``: pictures with questions that pruneops renders itself, as files or as a sheet to look at."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneops.commands.arguments import not_negative, positive

if TYPE_CHECKING:
    from pruneops.data import Samples

TEXT = """\
Renders a data set for visual question answering: small coloured shapes and signs on a
busy background, questions whose answers need few of a picture's patches or many, long
descriptions, and short clips. The same seed gives the same pictures everywhere.
"""
WRITE_TEXT = """\
Writes pictures (PNG) and conversations in LLaVA's format, as examples/train_sft.py reads
them: images/, clips/, SPLIT.json and, one sample a line, SPLIT.jsonl. The same command
again goes on where it was interrupted; with a larger --size it adds to what is there.
A clip is a list of images, one a frame.
"""
SHOW_TEXT = "Draws a contact sheet: pictures, enlarged, with their questions and answers."
EXAMPLES = """\
examples:
  pruneops data show --seed 3
  pruneops data show --kinds clip --count 2 --out clips.png
  pruneops data write DIR --split train --size 20000 --turns 6
  pruneops data write DIR --split test --size 4000 --turns 1
  pruneops data write DIR --split train --size 20000 --kinds questions,questions,description

exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted
"""


def add_parser(commands: Any) -> None:
    """Describe the command to the parser of all commands."""
    parser = commands.add_parser(
        "data",
        help="render pictures with questions and answers, to train on or to look at",
        description=TEXT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    write = actions.add_parser(
        "write",
        help="write a folder to train on",
        description=WRITE_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    write.add_argument("folder", type=Path, metavar="DIR", help="the folder; several splits may share one")
    write.add_argument("--size", type=positive, required=True, metavar="N", help="number of samples")
    _add_options(write, split="train", turns=4)
    write.add_argument("--quiet", action="store_true", help="no progress on stderr")
    write.set_defaults(action=run_write)

    show = actions.add_parser("show", help="draw a contact sheet to look at", description=SHOW_TEXT)
    show.add_argument("--count", type=positive, default=4, metavar="N", help="samples on it (default: %(default)s)")
    show.add_argument("--columns", type=positive, default=2, metavar="N", help="samples in a row (default: 2)")
    show.add_argument(
        "--out", type=Path, default=Path("data.png"), metavar="PNG", help="the picture file (default: %(default)s)"
    )
    _add_options(show, split="test", turns=6)
    show.set_defaults(action=run_show)


def _add_options(parser: argparse.ArgumentParser, split: str, turns: int) -> None:
    parser.add_argument(
        "--split", default=split, metavar="NAME", help="train, validation or test (default: %(default)s)"
    )
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--kinds",
        default="questions",
        metavar="A,B,...",
        help="questions, description, references (short questions about everything in a picture), clip: taken in turn; "
        "one that is named twice occurs twice as often (default: %(default)s)",
    )
    parser.add_argument(
        "--turns", type=positive, default=turns, metavar="N", help="questions a picture at most (default: %(default)s)"
    )
    parser.add_argument(
        "--patch-size",
        type=positive,
        default=8,
        metavar="N",
        help="pixels along a side of a patch; a picture is 24 patches wide, a frame of a clip 12 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--frames", type=positive, default=8, metavar="N", help="frames of a clip, 6 or more (default: %(default)s)"
    )


def _samples(options: argparse.Namespace, size: int) -> Samples:
    from pruneops.data import Samples

    return Samples(
        options.split,
        size,
        seed=options.seed,
        kinds=tuple(kind.strip() for kind in options.kinds.split(",")),
        turns=options.turns,
        patch_size=options.patch_size,
        frames=options.frames,
    )


def run_write(options: argparse.Namespace) -> int:
    """Write the folder."""
    from tqdm import tqdm

    from pruneops.data import export

    samples = _samples(options, options.size)
    # disable=None: tqdm shows nothing unless the stream is a terminal.
    with tqdm(total=len(samples), unit="sample", file=sys.stderr, disable=True if options.quiet else None) as bar:
        path = export(samples, options.folder, lambda done, total: bar.update(1))
    print(f"{path}: {len(samples)} samples")
    return 0


def run_show(options: argparse.Namespace) -> int:
    """Draw the sheet."""
    from pruneops.data import draw_samples

    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out must be a file ending in .png, got {options.out}")
    samples = list(_samples(options, options.count))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw_samples(samples, options.columns).save(options.out)
    for sample in samples:
        print(sample.name)
        for turn in sample.turns:
            print(f"  {turn.text}  {turn.answer}")
    print(f"pictures with questions and answers: {options.out}")
    return 0
