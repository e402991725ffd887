"""What ``pruneops run`` is asked, read off its options: questions about images or videos, and the method."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneops.commands.arguments import positive

if TYPE_CHECKING:
    from pruneops.methods import PruningMethod
    from pruneops.runner import Loaded, Progress, Question

DEFAULT_PROMPT, DEFAULT_VIDEO_PROMPT = "What is in this picture?", "What happens in this video?"
DEFAULT_NUM_FRAMES = 16
#: Questions of a rendered picture: one of each kind.
TURNS = 6
#: Method, field of it, option.
_METHOD_OPTIONS = (
    ("pyramiddrop", "layers", "layers"),
    ("pyramiddrop", "keep_ratios", "keep"),
    *(
        ("prunevid", name, name)
        for name in ("tau", "temporal_segment_ratio", "cluster_ratio", "alpha", "selected_layer")
    ),
)


def add_video_options(run: argparse.ArgumentParser, ask: argparse._ArgumentGroup) -> None:
    """Adds what is only for videos to the question's options, and PruneVid's fields as a group."""
    ask.add_argument(
        "--video",
        action="append",
        type=Path,
        metavar="PATH",
        help="a video file; may be repeated, not together with --image (needs pruneops[video])",
    )
    ask.add_argument(
        "--num-frames",
        type=positive,
        metavar="N",
        help=f"frames sampled of each video, evenly spaced (default: {DEFAULT_NUM_FRAMES})",
    )
    prunevid = run.add_argument_group("prunevid (defaults are the published ones)")
    options = {
        "tau": ("X", "similarity above which a patch is static within a segment (default: 0.8)"),
        "temporal-segment-ratio": ("R", "clusters of frames as a share of the frames (default: 0.25)"),
        "cluster-ratio": ("R", "clusters as a share of the tokens that are merged (default: 0.5)"),
        "alpha": ("R", "share of merged tokens kept in the language model (default: 0.4)"),
    }
    for name, (metavar, text) in options.items():
        prunevid.add_argument(f"--{name}", type=float, metavar=metavar, help=text)
    prunevid.add_argument(
        "--selected-layer",
        type=int,
        metavar="I",
        help="decoder layer, counted from 0, after which tokens are selected (default: 10 of 32, as deep elsewhere)",
    )


def questions(options: argparse.Namespace, progress: Progress) -> list[Question]:
    """Pairs images or videos with prompts; the one that was given once serves all of the other.

    Without either, a rendered picture is asked the prompts, or questions that come with it.
    """
    from pruneops.runner import Question

    if options.video and options.image:
        raise ValueError("--video cannot be given together with --image: a batch is of one kind")
    if options.num_frames is not None and not options.video:
        raise ValueError("--num-frames needs --video")
    kind, batch = "video" if options.video else "image", options.batch
    paths, sample = options.video or options.image or [None], None
    texts = options.prompt or [DEFAULT_VIDEO_PROMPT if options.video else DEFAULT_PROMPT]
    if paths == [None]:
        with progress.step("starting torch, rendering a picture"):
            from pruneops.data import Samples

            (sample,) = Samples("test", 1, seed=options.seed, turns=TURNS)
        texts = options.prompt or [turn.text for turn in sample.turns]
    if len(paths) != len(texts) and 1 not in (len(paths), len(texts)):
        raise ValueError(
            f"--prompt must be given once or once per {kind}, got {len(texts)} prompts for {len(paths)} {kind}s"
        )
    for text in texts:
        if not text.strip():
            raise ValueError("--prompt must not be empty")
    count = max(len(paths), len(texts))
    rows = [Question(paths[i % len(paths)], texts[i % len(texts)], sample) for i in range(count)]
    if batch is not None:
        if batch < count:
            raise ValueError(f"--batch must be at least the number of questions ({count}), got {batch}")
        rows = [rows[i % count] for i in range(batch)]
    return rows


def opened(options: argparse.Namespace, questions: Sequence[Question], progress: Progress) -> list[Any]:
    """The images of the questions, read or rendered, or the sampled frames of their videos."""
    from pruneops import runner, video_runner

    if not options.video:
        return runner.check_images(questions)
    with progress.step("decoding the videos"):
        return video_runner.check_clips(questions, options.num_frames or DEFAULT_NUM_FRAMES)


def _method(name: str, fields: dict[str, Any]) -> PruningMethod:
    from pruneops.methods import method_from_dict

    return method_from_dict({"method": name, **fields})


def method_for(options: argparse.Namespace) -> Callable[[int], PruningMethod]:
    """The method that was asked for, for a model of a given depth; says at once what is wrong at any depth."""
    name = options.method or ("prunevid" if options.video else "pyramiddrop")
    given: dict[str, dict[str, Any]] = {"pyramiddrop": {}, "prunevid": {}}
    for owner, field, option in _METHOD_OPTIONS:
        value = getattr(options, option)
        if value is not None:
            given[owner][field] = value
            if owner != name:
                raise ValueError(f"--{option.replace('_', '-')} is an option of --method {owner}, got --method {name}")
    fields = given[name]
    _method(name, fields)

    def at_depth(depth: int) -> PruningMethod:
        default = {"selected_layer": 10 * depth // 32} if name == "prunevid" else {}
        return _method(name, {**default, **fields}).for_depth(depth)

    return at_depth


def own_method(options: argparse.Namespace, loaded: Loaded) -> PruningMethod | None:
    """The method that a model was trained with, if it runs with nothing else; then none can be asked for.

    Raises
    ------
    ValueError
        If there are options of a method nevertheless.
    """
    if loaded.method is None:
        return None
    names = ("method", *(option for *_, option in _METHOD_OPTIONS))
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        raise ValueError(
            f"--{given[0].replace('_', '-')}: got it for a model that was trained with {loaded.method.name} and only "
            "runs with it, expected no options of a method"
        )
    return loaded.method


def about(medium: Any) -> str:
    """What there is to say of a clip beside its tokens."""
    from pruneops import video, video_runner

    return f", {video_runner.describe_clip(medium)}" if isinstance(medium, video.Clip) else ""


def source(question: Question, medium: Any) -> dict[str, Any]:
    """The file of a question, or the name of its rendered picture, and of a clip the frames that were sampled."""
    from pruneops.video import Clip

    if question.sample is not None:
        return {"sample": question.sample.name}
    if not isinstance(medium, Clip):
        return {"image": str(question.path)}
    return {"video": str(question.path), "frames": medium.indices, "total_frames": medium.total}
