"""The work behind ``pruneops run``: load a checkpoint, answer dense and pruned, draw what was kept.

Every function raises ``ValueError`` with one clear line for bad input; the command line turns these into exit
codes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from pruneops.analysis.pictures import StageView
    from pruneops.data import Sample
    from pruneops.methods import PruningMethod
    from pruneops.report import Report

ASSET = Path(__file__).resolve().parent / "assets" / "coffee.jpg"
"""The photograph that ships with the package (CC0, see the text file beside it)."""

MODEL_TYPES = ("llava", "llava_next")
MAX_TURNS, SECONDS_FOR_TURNS = 3, 5.0
SHIPPED_LABEL = "scene LLaVA, the small model that ships with pruneops"
UNTRAINED_LABEL = "small LLaVA-NeXT-Video, built here and untrained: its words mean nothing"


@dataclass(frozen=True)
class Question:
    """One row of the batch: what is asked of an image or video file, or of the picture of a sample."""

    path: Path | None
    prompt: str
    sample: Sample | None = None

    @property
    def source(self) -> Path | Sample:
        """What the picture or video is read or rendered from."""
        return self.sample if self.path is None else self.path

    @property
    def name(self) -> str:
        """What to call the picture or video."""
        return f"rendered picture {self.sample.name}" if self.path is None else self.path.name

    @property
    def truth(self) -> str | None:
        """The right answer; known of a sample's own questions only."""
        if self.sample is None:
            return None
        from pruneops.data.questions import description, questions

        scene = self.sample.source
        answers = {asked.text: asked.answer for asked in (*questions(scene), description(scene))}
        return answers.get(self.prompt.strip())


@dataclass(frozen=True)
class Loaded:
    """A model with its processor and the name to show for it.

    ``note`` says what its answers are worth if it was trained on nothing but rendered pictures, otherwise it is empty;
    ``method`` is the one it was trained with, if that has modules in the model, without which it cannot run.
    """

    model: Any
    processor: Any
    name: str
    untrained: bool
    note: str = ""
    method: PruningMethod | None = None

    @property
    def depth(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers


@dataclass(frozen=True)
class Inputs:
    """What the processor made of the questions, and the images or clips as they were read.

    ``placeholder`` is the id of the visual tokens; the last ``separators`` of a row are none.
    """

    features: Any
    media: list[Any]
    placeholder: int
    separators: int = 0

    @property
    def prompt_length(self) -> int:
        return int(self.features["input_ids"].shape[1])


@dataclass(frozen=True)
class Answer:
    """The texts of one way of answering, its wall-clock seconds, and what the ragged decoder recorded."""

    texts: list[str]
    seconds: float
    new_tokens: int
    report: Report | None = None
    records: list[Any] = field(default_factory=list)


class Progress:
    """Plain lines on stderr, one per step with its seconds; bars for tokens only where stderr is a
    terminal."""

    def __init__(self, quiet: bool = False, stream: Any = None) -> None:
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        self._write(f"{what} ...\n")
        start = time.perf_counter()
        yield
        self._write(f"{what}: {time.perf_counter() - start:.2f} s\n")

    def token_counter(self, what: str, total: int) -> Any:
        """A stopping criterion that never stops: it moves a bar by one per generated token."""
        import torch
        from tqdm import tqdm
        from transformers import StoppingCriteria

        # disable=None: tqdm shows nothing unless the stream is a terminal.
        bar = tqdm(
            total=total,
            desc=what,
            unit="token",
            leave=False,
            file=self.stream,
            disable=True if self.quiet else None,
        )

        class Counter(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
                bar.update(1)
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

            def close(self) -> None:
                bar.close()

        return Counter()

    def _write(self, text: str) -> None:
        if not self.quiet:
            self.stream.write(text)
            self.stream.flush()


def check_images(questions: Sequence[Question]) -> list[Image]:
    """Opens or renders the image of every question; equal paths are read once.

    Raises
    ------
    ValueError
        If a file is missing or is not an image PIL can read; the message names the path.
    """
    from PIL import Image, UnidentifiedImageError

    opened: dict[Path | Sample, Image.Image] = {}
    for question in questions:
        path = question.path
        if question.source in opened:
            continue
        if path is None:
            opened[question.sample] = Image.fromarray(question.sample.pictures[0])
            continue
        if not path.exists():
            raise ValueError(f"image: no such file: {path}")
        if not path.is_file():
            raise ValueError(f"image: not a file: {path}")
        try:
            with Image.open(path) as image:
                opened[path] = image.convert("RGB")
        except UnidentifiedImageError:
            raise ValueError(f"image: not an image that PIL can read: {path}") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"image: cannot read {path}: {error}") from None
    return [opened[question.source] for question in questions]


def load(
    model: str | None,
    method_for: Callable[[int], PruningMethod],
    dtype: str,
    device: str,
    seed: int,
    videos: bool = False,
) -> Loaded:
    """Loads a LLaVA or LLaVA-NeXT checkpoint, by default the small one that ships with pruneops.

    With ``videos`` it is a model that takes videos, by default a small, untrained one that is built, and the processor
    is a :class:`~pruneops.models.video_inputs.VideoReader`. ``method_for`` gives the method for a number of layers.

    Raises
    ------
    ValueError
        If the folder or hub entry is missing, incomplete or another kind of model, or if the method does not
        fit its depth (found out before the weights are read).
    """
    import torch

    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be a torch device such as cpu or cuda, got {device!r}") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one torch can use here, got {device!r}: no CUDA device was found")
    if model is None and videos:
        from pruneops.models.small_video import build_small_video

        # The folder is only needed while loading.
        with tempfile.TemporaryDirectory(prefix="pruneops-") as folder:
            path = str(build_small_video(folder, seed=seed))
            loaded = _load_checkpoint(path, method_for, dtype, target, UNTRAINED_LABEL, videos)
            # A mapped file keeps its folder busy; own memory does not.
            for tensor in [*loaded.model.parameters(), *loaded.model.buffers()]:
                tensor.data = tensor.data.clone()
        return loaded
    if model is None:
        from pruneops.models.scene import scene_llava_folder

        return _load_checkpoint(str(scene_llava_folder()), method_for, dtype, target, SHIPPED_LABEL, videos)
    return _load_checkpoint(model, method_for, dtype, target, model, videos)


def _load_checkpoint(
    source: str,
    method_for: Callable[[int], PruningMethod],
    dtype: str,
    device: torch.device,
    name: str,
    videos: bool,
) -> Loaded:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from pruneops import models
    from pruneops.methods import PruningMethod, method_from_dict
    from pruneops.models.scene import training_of
    from pruneops.models.small import is_untrained
    from pruneops.models.video_inputs import VIDEO_MODEL_TYPES, VideoReader

    looks_local = source.startswith((".", "/", "~")) or os.path.exists(source)
    path = os.path.expanduser(source)
    if looks_local and not os.path.isdir(path):
        raise ValueError(f"model: no such folder: {name}")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: {name} is not a checkpoint that transformers can load: {_one_line(error)}") from None
    types = VIDEO_MODEL_TYPES if videos else MODEL_TYPES
    if config.model_type not in types:
        what = "takes no videos" if videos else "is not a LLaVA checkpoint"
        raise ValueError(
            f"model: {name} {what}: its model_type is {config.model_type!r}, expected one of {', '.join(types)}"
        )
    saved = getattr(config, "pruning", None)
    method = method_from_dict(saved) if saved is not None else None
    model_class: Any = AutoModelForImageTextToText
    if method is not None and type(method).prepare is not PruningMethod.prepare:
        model_class = getattr(models, (config.architectures or ["none"])[0], None)
        if model_class is None:
            raise ValueError(
                f"model: {name} was trained with {method.name} and is a {config.architectures}, expected one of "
                f"{', '.join(models.__all__)}"
            )
    else:
        method = None  # one without modules is a setting, and the one that was asked for applies
        method_for(config.get_text_config().num_hidden_layers)
    try:
        processor = VideoReader.from_pretrained(path, config) if videos else AutoProcessor.from_pretrained(path)
        model = model_class.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"model: {name} could not be loaded: {_one_line(error)}") from None
    if method is not None:
        model.pruning_run.remove()  # the modules stay, for `answer` to prune with
    untrained = is_untrained(config)
    processor.tokenizer.padding_side = "left"
    label = f"{name} (untrained)" if untrained and name == source else name
    note = training_of(config).get("note", "")
    return Loaded(model.to(device).eval(), processor, label, untrained, note, method)


def caution(loaded: Loaded, questions: Sequence[Question]) -> str:
    """What a reader of the answers has to know; empty where there is nothing.

    Of an untrained model always, of one that knows rendered pictures only where another kind of picture is asked about.
    """
    if loaded.untrained:
        return loaded.name
    return loaded.note if any(question.sample is None for question in questions) else ""


def is_right(text: str, truth: str) -> bool:
    """Whether an answer has the words of the right one; capitals and a full stop at the end do not count."""
    plain = [" ".join(answer.lower().split()).rstrip(".") for answer in (text, truth)]
    return plain[0] == plain[1]


def prepare(loaded: Loaded, questions: Sequence[Question], images: Sequence[Image]) -> Inputs:
    """One batch from all questions: a chat prompt with one image each, left-padded, on the model's device."""
    from pruneops.models.checkpoints.processor import chat_prompt

    processor = loaded.processor
    prompts = [chat_prompt(processor, question.prompt) for question in questions]
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    features = processor(images=list(images), text=prompts, padding=True, return_tensors="pt")
    features = features.to(loaded.model.device, loaded.model.dtype)
    return Inputs(features, list(images), loaded.model.config.image_token_id)


def answer(
    loaded: Loaded,
    inputs: Inputs,
    method: PruningMethod | None,
    *,
    max_new_tokens: int,
    repeat: int | None,
    seed: int,
    progress: Progress,
    what: str,
) -> Answer:
    """Answers the batch ``repeat`` times, greedily, and keeps the fastest times.

    ``repeat`` None means up to three times, as long as that takes a few seconds at most.
    ``method`` None is the stock model, untouched, of which only the whole time is known. Otherwise the model
    runs in ``pruneops.prune``; the first round records what was kept, the others only measure.
    """
    import torch

    import pruneops

    model, tokenizer = loaded.model, loaded.processor.tokenizer
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = tokenizer.pad_token_id

    def generate() -> tuple[torch.Tensor, float]:
        counter = progress.token_counter(what, max_new_tokens)
        torch.manual_seed(seed)
        try:
            with torch.inference_mode():
                _synchronize(model.device)
                start = time.perf_counter()
                ids = model.generate(**inputs.features, stopping_criteria=[counter], **options)
                _synchronize(model.device)
                return ids, time.perf_counter() - start
        finally:
            counter.close()

    best: Answer | None = None
    spent = 0.0
    for turn in range(repeat or MAX_TURNS):
        if best is not None and repeat is None and spent > SECONDS_FOR_TURNS:
            break
        report, records = None, []
        if method is None:
            ids, seconds = generate()
        else:
            with pruneops.prune(model, method, record=turn == 0) as run:
                ids, seconds = generate()
            report, records = run.report(), list(run.records)
        spent += seconds
        new = ids[:, inputs.prompt_length :]
        if best is None:
            texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            best = Answer(texts, seconds, new.shape[1], report, records)
        elif report is None or report.seconds < best.report.seconds:
            best = dataclasses.replace(best, seconds=min(seconds, best.seconds), report=report)
        else:
            best = dataclasses.replace(best, seconds=min(seconds, best.seconds))
    return best


def visual_positions(inputs: Inputs, row: int) -> list[int]:
    """Positions of the row's visual tokens, counted in its own valid tokens before any pruning."""
    ids = inputs.features["input_ids"][row]
    valid = ids[inputs.features["attention_mask"][row].bool()]
    positions = (valid == inputs.placeholder).nonzero().flatten().tolist()
    return positions[: len(positions) - inputs.separators]


def kept_tokens(inputs: Inputs, answered: Answer, row: int) -> list[list[int]]:
    """Per stage, the visual tokens of the row that survive it, counted within the row's visual tokens."""
    index_of = {position: index for index, position in enumerate(visual_positions(inputs, row))}
    stages = sorted((record for record in answered.records if record.row == row), key=lambda record: record.stage)
    return [[index_of[p] for p in record.kept_positions.tolist() if p in index_of] for record in stages]


def stage_layers(method: PruningMethod, num_hidden_layers: int) -> list[str]:
    """The layers of each panel, the dense beginning first: ``["layers 0-7", "layers 8-15", ...]``."""
    from pruneops.methods import DynamicLlava, PMoD, PruneVid

    if isinstance(method, PruneVid):
        return ["before merging", *_layer_names([0, method.selected_layer + 1, num_hidden_layers])]
    if isinstance(method, PMoD):  # what goes through a layer; the next one can choose from all patches again
        return ["other layers", *(f"layer {i}" for i in method.keep_ratios(num_hidden_layers))]
    if isinstance(method, DynamicLlava):
        stages = [method.sparse_layer] if method.use_vision_predictor else []
        return _layer_names([0, *stages, num_hidden_layers])
    return _layer_names([0, *(getattr(method, "layers", None) or ()), num_hidden_layers])


def _layer_names(bounds: Sequence[int]) -> list[str]:
    names = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        names.append("after the last layer" if a == b else f"layer {a}" if b - a == 1 else f"layers {a}-{b - 1}")
    return names


def draw(
    loaded: Loaded,
    inputs: Inputs,
    questions: Sequence[Question],
    method: PruningMethod,
    answered: Answer,
    rows: Sequence[int],
) -> Image | None:
    """The picture of what each stage kept of the given rows; None if the patch layout is not known."""
    from pruneops.analysis.pictures import draw_stages

    views: list[StageView] = []
    for row in rows:
        views += _row_views(loaded, inputs, questions[row], answered, row)
    if not views:
        return None
    return draw_stages(
        views,
        stage_layers(method, loaded.depth),
        title=f"{type(method).__name__}: patches kept at each stage",
        note=caution(loaded, questions),
    )


def _row_views(loaded: Loaded, inputs: Inputs, question: Question, answered: Answer, row: int) -> Iterator[StageView]:
    from pruneops.analysis.pictures import StageView
    from pruneops.models.views import image_views

    kept = kept_tokens(inputs, answered, row)
    pixels = inputs.features["pixel_values"][row]
    views = image_views(
        loaded.model.config,
        loaded.processor.image_processor,
        inputs.media[row],
        pixels,
        len(visual_positions(inputs, row)),
    )
    for view in views:
        place = {token: index for index, token in enumerate(view.tokens)}
        title = f"{question.name}: {question.prompt}" + (f" ({view.title})" if view.title else "")
        inside = [[place[token] for token in stage if token in place] for stage in kept]
        yield StageView(view.image, view.boxes, inside, title)


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _one_line(error: BaseException) -> str:
    """The first sentence or so of an error's text, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
