"""The command line: ``pruneops run`` answers about images or videos dense and pruned, ``pruneops info`` says what is
installed; `pruneops.commands` has the others."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pruneops._version import __version__
from pruneops.commands import convert, data, evaluate, run_inputs, schedule, tune
from pruneops.commands.arguments import integers, not_negative, numbers, positive
from pruneops.environment import versions

if TYPE_CHECKING:
    from pruneops.methods import PruningMethod
    from pruneops.runner import Answer, Inputs, Loaded, Question

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

RUN_TEXT = """\
Answers a question about one or more images or videos three times: with the stock model, with
the ragged decoder but no pruning ("dense"), and pruned. Prints the answers and a table
of tokens, FLOPs, bytes of keys and values and measured time per group of layers, and
writes a picture of the patches that each stage kept; of a video, a contact sheet of
its frames with segments, static and dynamic patches and what was kept.

Without an image or video, a picture of small shapes and signs is rendered from --seed,
and questions that come with it are asked; the right answers are shown beside the others.
The small model that ships with pruneops was trained on such pictures, and knows no others.

Several --image, --video or --prompt make one batch: a single one serves every entry of
the other.
"""
RUN_EXAMPLES = """\
examples:
  pruneops run
  pruneops run --seed 7 --layers 2,4,6 --keep 0.25,0.1,0.05
  pruneops run --seed 7 --prompt "Describe the picture." --max-new-tokens 300
  pruneops run --video clip.mp4 --prompt "What does the cat do?"
  pruneops run --video clip.mp4 --num-frames 8 --tau 0.9 --alpha 0.2
  pruneops run --model llava-hf/llava-1.5-7b-hf --image cat.jpg --prompt "What animal is this?" --out kept.png

exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong on one line instead of printing the whole usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="pruneops", description="Multimodal language models that carry fewer visual tokens.")
    parser.add_argument("--version", action="version", version=f"pruneops {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        help="answer about images or videos, dense and pruned, and show what was kept",
        description=RUN_TEXT,
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask = run.add_argument_group("what to answer")
    ask.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="PATH",
        help="an image file; may be repeated (default: a picture rendered from --seed)",
    )
    ask.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the question; may be repeated (default: those that come with the rendered picture, or "
        f"{run_inputs.DEFAULT_PROMPT!r}, or {run_inputs.DEFAULT_VIDEO_PROMPT!r})",
    )
    ask.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="repeat the questions until the batch has N rows (default: one row a question)",
    )
    ask.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="tokens to answer with at most, chosen greedily (default: 64, or 16 with the untrained model)",
    )

    how = run.add_argument_group("model and method")
    how.add_argument(
        "--model",
        metavar="ID_OR_PATH",
        help="a LLaVA or LLaVA-NeXT checkpoint in Hugging Face format, for videos a LLaVA-NeXT-Video, LLaVA-OneVision "
        "or Video-LLaVA one: a folder or a hub name (default: the small one that ships with pruneops, trained on "
        "rendered pictures only; for videos one built on the spot, untrained: words mean nothing)",
    )
    how.add_argument(
        "--method",
        choices=["pyramiddrop", "prunevid"],
        help="the pruning method (default: pyramiddrop for images, prunevid for videos)",
    )
    how.add_argument(
        "--layers",
        type=integers,
        metavar="I,J,...",
        help="decoder layers that run before each drop (default: the quarter points of the depth, 8,16,24 of 32)",
    )
    how.add_argument(
        "--keep",
        type=numbers,
        metavar="R,S,...",
        help="share of an image's tokens kept after each drop, in (0, 1], not increasing (default: 0.5,0.25,0.125)",
    )
    how.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="dtype of the weights; auto is the checkpoint's own (default: %(default)s)",
    )
    how.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="torch device such as cpu or cuda (default: %(default)s)",
    )
    how.add_argument(
        "--seed",
        type=not_negative,
        default=0,
        help="seed of the rendered picture, of torch, and of the untrained model's weights (default: %(default)s)",
    )
    how.add_argument(
        "--repeat",
        type=positive,
        metavar="N",
        help="answer N times each way and report the fastest (default: up to 3, fewer if slow)",
    )

    run_inputs.add_video_options(run, ask)

    out = run.add_argument_group("output")
    out.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR|PNG",
        help="where the picture goes: a folder (then kept.png in it) or a picture file (default: %(default)s)",
    )
    out.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write everything as JSON: answers, both reports, kept patches, versions",
    )
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    run.set_defaults(action=_run)

    info = commands.add_parser(
        "info",
        help="show versions, the build, the instruction set, and which backend runs each op",
        description="Prints versions, how the compiled library was built, the instruction set that runs "
        "here, and for every op which backend runs it and why.",
    )
    info.set_defaults(action=_info)
    schedule.add_parser(commands)
    convert.add_parser(commands)
    tune.add_parser(commands)
    data.add_parser(commands)
    evaluate.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors become one line on stderr."""
    options = build_parser().parse_args(arguments)
    try:
        return options.action(options)
    except (ValueError, TypeError) as error:
        return _fail(error, BAD_INPUT)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        print("pruneops: interrupted", file=sys.stderr)
        return INTERRUPTED


def _fail(error: Exception, code: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name == "av":
        message = "--video needs PyAV: pip install pruneops[video]"
    if isinstance(error, ModuleNotFoundError) and error.name in ("transformers", "PIL", "tokenizers", "tqdm"):
        message = f"this command needs {error.name}: install pruneops[cli]"
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        message = "this command needs triton: install pruneops[triton]"
    print(f"pruneops: error: {message}", file=sys.stderr)
    return code


def _run(options: argparse.Namespace) -> int:
    from pruneops import runner, video_runner

    media = video_runner if options.video else runner
    progress = runner.Progress(options.quiet)
    picture_path = _picture_path(options.out)
    questions = run_inputs.questions(options, progress)
    opened = run_inputs.opened(options, questions, progress)
    for path in filter(None, (picture_path, options.json)):
        _make_writable(path)
    with progress.step("starting torch and transformers"):
        from pruneops.methods import KEEP_ALL

        method_for = run_inputs.method_for(options)
        _quiet_libraries(keep_bars=options.model is not None and not options.quiet)
    with progress.step("loading the model"):
        loaded = runner.load(
            options.model, method_for, options.dtype, options.device, options.seed, bool(options.video)
        )
    method = run_inputs.own_method(options, loaded)
    ways: dict[str, PruningMethod | None] = {}
    if method is None:
        method = method_for(loaded.depth)
        ways = {"stock": None, "dense": KEEP_ALL}
    ways["pruned"] = method
    inputs = media.prepare(loaded, questions, opened)
    answers: dict[str, Answer] = {}
    for name, way in ways.items():
        with progress.step(f"answering, {name}"):
            answers[name] = runner.answer(
                loaded,
                inputs,
                way,
                max_new_tokens=options.max_new_tokens or (16 if loaded.untrained else 64),
                repeat=options.repeat,
                seed=options.seed,
                progress=progress,
                what=name,
            )

    shown = range(len(set(questions)))
    print(_summary(loaded, questions, method, inputs, answers, shown))
    picture = media.draw(loaded, inputs, questions, method, answers["pruned"], shown)
    if picture is None:
        print("\nno picture: the patch layout of this checkpoint is not known")
    else:
        picture.save(picture_path)
        print(f"\npicture of the kept patches: {picture_path}")
    if options.json is not None:
        document = _document(loaded, questions, method, inputs, answers, None if picture is None else picture_path)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"everything as JSON: {options.json}")
    return OK


def _info(options: argparse.Namespace) -> int:
    import torch

    import pruneops
    from pruneops import backends

    width = 22
    for name, version in versions().items():
        print(f"{name:<{width}}{version}")
    print()
    for name, value in pruneops.build_info().items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        if isinstance(value, dict):
            shown = ", ".join(f"{key}={entry}" for key, entry in value.items())
        print(f"{name:<{width}}{shown}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        print(f"\nbackend of each op on {device}, float32")
        for op in backends.OPS:
            chosen, *reasons = backends.explain(op, device).splitlines()
            print(f"{op:<{width + 4}}{chosen.rsplit(': ', 1)[1]}")
            # The last line is the backend that runs; what stands before it was refused.
            for reason in reasons[:-1]:
                print(f"  {reason}")
    return OK


def _picture_path(out: Path) -> Path:
    if out.suffix.lower() in PICTURE_SUFFIXES:
        return out
    if not out.is_dir() and (out.exists() or out.suffix):
        raise ValueError(f"--out must be a folder or a file ending in {', '.join(PICTURE_SUFFIXES)}, got {out}")
    return out / "kept.png"


def _make_writable(path: Path) -> None:
    """Finds out before the long work, not after it, that a file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write the file {path}")


def _summary(
    loaded: Loaded,
    questions: Sequence[Question],
    method: PruningMethod,
    inputs: Inputs,
    answers: dict[str, Answer],
    shown: Sequence[int],
) -> str:
    from pruneops import runner, video_runner
    from pruneops.report import compare

    rows = []
    for row in shown:
        question = questions[row]
        visual = len(runner.visual_positions(inputs, row))
        tokens = int(inputs.features["attention_mask"][row].sum())
        rows += [
            "",
            f"[{row}] {question.name}: {question.prompt}",
            f"    {visual} visual + {tokens - visual} text tokens{run_inputs.about(inputs.media[row])}",
            *_answer_lines(question, {name: answered.texts[row] for name, answered in answers.items()}),
        ]
    note = runner.caution(loaded, questions)
    pruned = answers["pruned"].report
    table = compare(answers["dense"].report, pruned) if "dense" in answers else str(pruned)
    lines = [
        "",
        f"model   {loaded.name} ({str(loaded.model.dtype).removeprefix('torch.')}, {loaded.model.device})",
    ]
    if note and not loaded.untrained:
        lines.append(f"note    {note}")
    lines += [f"method  {method}", f"batch   {len(questions)} row{'s' if len(questions) > 1 else ''}", *rows]
    known = [row for row in shown if questions[row].truth is not None]
    if known:
        counts = [
            f"{name} {sum(runner.is_right(answered.texts[row], questions[row].truth) for row in known)}"
            for name, answered in answers.items()
        ]
        lines += ["", f"right of {len(known)}: {', '.join(counts)}"]
    lines += ["", "prefill of the language model, all rows together; layers count from 0", ""]
    lines += [table, *video_runner.describe_stages(pruned)]
    lines += ["", "whole answer, vision tower included"]
    for name, answered in answers.items():
        line = f"    {name:<7} {answered.seconds:8.3f} s, {answered.new_tokens:3d} new tokens"
        if "stock" in answers:
            line += f"   {answers['stock'].seconds / answered.seconds:5.2f} x stock speed"
        lines.append(line)
    return "\n".join(lines)


def _answer_lines(question: Question, texts: dict[str, str]) -> list[str]:
    """The right answer, if it is known, and those of each way with what there is to remark."""
    from pruneops import runner

    lines = [] if question.truth is None else [f"    truth   {question.truth}"]
    for name, text in texts.items():
        remarks = []
        if question.truth is not None:
            remarks.append("right" if runner.is_right(text, question.truth) else "wrong")
        if name == "dense" and text == texts["stock"]:
            remarks.append("as stock")
        lines.append(f"    {name:<7} {_printable(text)}" + (f"   ({', '.join(remarks)})" if remarks else ""))
    return lines


def _document(
    loaded: Loaded,
    questions: Sequence[Question],
    method: PruningMethod,
    inputs: Inputs,
    answers: dict[str, Answer],
    picture: Path | None,
) -> dict[str, Any]:
    from pruneops import runner

    rows = []
    for row, question in enumerate(questions):
        rows.append(
            {
                **run_inputs.source(question, inputs.media[row]),
                "prompt": question.prompt,
                "truth": question.truth,
                "visual_tokens": len(runner.visual_positions(inputs, row)),
                "answers": {name: answered.texts[row] for name, answered in answers.items()},
                "kept": runner.kept_tokens(inputs, answers["pruned"], row),
            }
        )
    return {
        "model": loaded.name,
        "untrained": loaded.untrained,
        "note": runner.caution(loaded, questions),
        "method": method.to_dict(),
        "rows": rows,
        "reports": {name: answered.report.to_dict() for name, answered in answers.items() if answered.report},
        "seconds": {name: answered.seconds for name, answered in answers.items()},
        "picture": None if picture is None else str(picture),
        "versions": versions(),
    }


def _quiet_libraries(keep_bars: bool) -> None:
    """Keeps transformers' notes out of the output; its loading bars stay for checkpoints of some size."""
    import transformers

    transformers.logging.set_verbosity_error()
    if not keep_bars:
        transformers.logging.disable_progress_bar()


def _printable(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text).strip() or "(no words)"


if __name__ == "__main__":
    sys.exit(main())
