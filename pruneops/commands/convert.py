"""``pruneops convert``: checkpoints from the layout that a method's authors publish to Hugging Face's, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pruneops.commands.arguments import file_size

TEXT = """\
Converts a checkpoint between the layout that the authors of a method publish and that
of Hugging Face. The layout of CHECKPOINT is read off its config.json, never its name.

  pmod            p-MoD: LLaVA's original names and config keys, model_type pmod_llava_llama
  dynamic-llava   Dynamic-LLaVA: the same, model_type llava_llama or dynamic_llava_llama with
                  sparse_config
  hf              LLaVA or LLaVA-NeXT of transformers with config.pruning; load it with the class
                  of the same name in pruneops.models, since stock transformers ignores the method

Tensors are copied bit by bit, one at a time. To hf, the embedding and the head get rows
for the image token, which original LLaVA does not have; the way back removes them. If
the tokenizer cannot be loaded here, its files are copied as they are, and you have to
add the special token <image> to it yourself: it must get config.image_token_id as its id.
"""
EXAMPLES = """\
examples:
  pruneops convert --from pmod p-MoD-LLaVA-NeXT-7B pmod-next-hf
  pruneops convert --from pmod CHECKPOINT OUT --vision-tower openai/clip-vit-large-patch14-336
  pruneops convert --to pmod pmod-next-hf back
  pruneops convert --from dynamic-llava Dynamic-LLaVA-7B dynamic-llava-hf

exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted
"""
LAYOUTS = ["hf", "pmod", "dynamic-llava"]


def add_parser(commands: Any) -> None:
    """Describe the command to the parser of all commands."""
    parser = commands.add_parser(
        "convert",
        help="convert checkpoints between a method's original layout and Hugging Face's",
        description=TEXT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--from", dest="source", choices=LAYOUTS, help="the layout that CHECKPOINT must have (default: what it has)"
    )
    parser.add_argument("--to", dest="target", choices=LAYOUTS, default="hf", help="default: %(default)s")
    parser.add_argument(
        "--vision-tower",
        metavar="ID_OR_PATH",
        help="to hf: the CLIP checkpoint that the model was trained with, needed where its weights are not in "
        "CHECKPOINT; to an original layout: the name to record for it",
    )
    parser.add_argument(
        "--max-shard-size", type=file_size, default="5GB", metavar="SIZE", help="largest file (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="write into OUT although it is not empty")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(action=run)


def run(options: argparse.Namespace) -> int:
    """Convert, and say what is left to do."""
    bar = _Progress(options.quiet)
    bar.say(f"reading {options.checkpoint} ...")
    from pruneops.models.checkpoints import convert

    notes = convert(
        options.checkpoint,
        options.out,
        source=options.source,
        target=options.target,
        vision_tower=options.vision_tower,
        force=options.force,
        max_shard_bytes=options.max_shard_size,
        progress=bar.update,
    )
    for note in notes:
        print(f"pruneops: note: {note}", file=sys.stderr)
    print(f"wrote {options.out}, layout {options.target}")
    return 0


class _Progress:
    """Lines on stderr, one every tenth; a single line that is rewritten where stderr is a terminal."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._shown = -1

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def update(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        step = percent if self._terminal else percent - percent % 10
        if self._quiet or step == self._shown:
            return
        self._shown = step
        text = f"writing: {step:3d} % of {total / 1e9:.2f} GB"
        if self._terminal:
            print(f"\r{text}", end="\n" if step == 100 else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
