"""``pruneops eval``: what pruning costs in right answers, and what it saves."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from pruneops.commands.arguments import integers, not_negative, numbers, positive

TEXT = """\
Asks models held-out questions about rendered pictures, dense and with every pruning method
over a range of budgets, beside random dropping and down-sampling, and writes how many
answers are exactly right, tokens, FLOPs, bytes of keys and values, and measured time:
eval.md (tables), eval.svg (accuracy against FLOPs and against time), eval.json (everything).

A budget is the share of an image's tokens that a decoder layer sees on average over the
layers; every method spends it in its own way. A model that was trained with a method is
run with that one, a dense model with those that need no training:

  dense, blank       nothing pruned; the same with a grey picture
  own                the method that the model was trained with
  pyramiddrop        PyramidDrop's stages at the quarter points of the depth
  one-shot           one drop after a quarter of the layers
  random, random-one-shot, random-input
                     tokens chosen at random, on the schedules of pyramiddrop and
                     one-shot, and before the decoder
  pool               neighbouring patches averaged before the decoder

Results are stored as they come. The same command again goes on where it was interrupted,
one with other models, methods or budgets adds to what is there.
"""
EXAMPLES = """\
examples:
  pruneops eval
  pruneops eval --questions 500 --batch 1 --methods dense,pyramiddrop,random
  pruneops eval --model runs/dense --model runs/pmod --out bench/results --keep 0.75,0.5,0.3

exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted
"""


def add_parser(commands: Any) -> None:
    """Describe the command to the parser of all commands."""
    parser = commands.add_parser(
        "eval",
        help="measure accuracy, tokens, FLOPs and time of pruning methods over a range of budgets",
        description=TEXT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to evaluate")
    what.add_argument(
        "--model",
        action="append",
        type=Path,
        metavar="FOLDER",
        help="a LLaVA for the pictures of pruneops.data, dense or trained with a method; may be repeated "
        "(default: the trained model that ships with pruneops)",
    )
    what.add_argument("--methods", metavar="A,B,...", help="some of the methods above (default: all that suit a model)")
    what.add_argument(
        "--keep",
        type=numbers,
        metavar="R,S,...",
        help="budgets, in (0, 1]; every method also runs as published or trained (default: 0.75,0.6,0.35,0.3)",
    )
    questions = parser.add_argument_group("questions")
    questions.add_argument("--questions", type=positive, metavar="N", help="how many, one a picture (default: 4000)")
    questions.add_argument("--split", metavar="NAME", help="train, validation or test (default: test)")
    questions.add_argument(
        "--seed", type=not_negative, metavar="N", help="of the pictures and of the random choices (default: 0)"
    )
    time = parser.add_argument_group("time")
    time.add_argument(
        "--batch", dest="time_batches", type=integers, metavar="N,M,...", help="sizes of batches (default: 1,8,32)"
    )
    time.add_argument("--rounds", type=positive, metavar="N", help="of every measurement (default: 5)")
    time.add_argument("--device", metavar="NAME", help="torch device such as cpu or cuda (default: cpu)")
    parser.add_argument(
        "--out", type=Path, default=Path("eval"), metavar="DIR", help="the folder to write (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(action=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate, and print the table of accuracy and cost."""
    import transformers

    from pruneops.evaluation import Plan, evaluate

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = ("keep", "questions", "split", "seed", "time_batches", "rounds", "device")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.methods is not None:
        given["methods"] = [way.strip() for way in options.methods.split(",")]
    plan = Plan(**given)
    folders = options.model or [_shipped_model()]

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr, flush=True)

    evaluate(folders, options.out, plan, command=_command(options, given), say=say)
    print((options.out / "eval.md").read_text(encoding="utf-8").partition("## Accuracy by kind")[0].rstrip())
    print(
        f"\ntables, chart and numbers: {', '.join(str(options.out / f'eval.{end}') for end in ('md', 'svg', 'json'))}"
    )
    return 0


def _shipped_model() -> Path:
    from pruneops.models.scene import scene_llava_folder

    return scene_llava_folder()


def _command(options: argparse.Namespace, given: dict[str, Any]) -> str:
    """The command again, with the values that matter to the result."""
    words = ["pruneops", "eval"]
    for folder in options.model or []:
        words += ["--model", str(folder)]
    for name, value in given.items():
        shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words += ["--batch" if name == "time_batches" else f"--{name}", shown]
    return shlex.join(words)
