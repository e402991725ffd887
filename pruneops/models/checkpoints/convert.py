"""Converts checkpoints between a method's original layout and Hugging Face's, and loads the original one directly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneops.methods.base import PruningMethod, method_from_dict
from pruneops.models.checkpoints import llava
from pruneops.models.checkpoints import processor as processors
from pruneops.models.checkpoints.layouts import Layout, layout_named, layout_of, unknown_type
from pruneops.models.checkpoints.tensors import StoredTensor, read_tensors, shorten, write_safetensors

#: New embedding rows come in such groups, because matrix products are faster with them.
_ROW_MULTIPLE = 64
HF = "hf"
_HF_TYPES = ("llava", "llava_next")


@dataclass(frozen=True)
class Source:
    """A checkpoint read as Hugging Face would have it; its weights are read when asked for.

    Attributes
    ----------
    config : LlavaConfig or LlavaNextConfig
        With the method under ``pruning``.
    tensors : dict of str to StoredTensor
        By published names.
    layout : Layout
    method : PruningMethod
    tokenizer : object or None
        With the image token added.
    tower : Path or None
        Folder of the vision tower, if one was given.
    notes : list of str
        What the user has to know or to do.
    """

    config: Any
    tensors: dict[str, StoredTensor]
    layout: Layout
    method: PruningMethod
    tokenizer: Any = None
    tower: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def class_name(self) -> str:
        """The drop-in class that loads it."""
        return self.config.architectures[0]

    def processor(self) -> Any:
        """The processor, or None without a tokenizer."""
        if self.tokenizer is None:
            return None
        ratio = getattr(self.config, llava.SOURCE_CONFIG).get("image_aspect_ratio")
        return processors.make_processor(self.config, self.tokenizer, ratio, self.tower)


def find_folder(checkpoint: str | Path, what: str = "checkpoint", **hub: Any) -> Path:
    """The folder of a checkpoint: a folder, or a name on the Hugging Face hub, which is downloaded.

    Raises
    ------
    ValueError
        If there is no such folder and no such name.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    text = str(checkpoint)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(f"{what}: no such folder: {checkpoint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, **hub))
    except Exception as error:  # no network, no such name, no access: all of them end here
        raise ValueError(
            f"{what}: {text} is neither a folder nor could it be fetched from the hub: {' '.join(str(error).split())}"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint; ValueError if there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {folder} has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint: {folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"checkpoint: {folder / 'config.json'} is not a JSON object")
    return config


def read_original(folder: Path, vision_tower: str | Path | None = None) -> Source:
    """Read a checkpoint of one of our layouts.

    Parameters
    ----------
    folder : Path
    vision_tower : str or Path, optional
        Folder or hub name of the CLIP checkpoint that the model was trained with. Needed where the weights of the tower
        are not in the checkpoint.

    Raises
    ------
    ValueError
        If the layout is not known, the config says what Hugging Face's classes cannot do, or tensors are missing, not
        expected, of the wrong shape or (those of the method) not finite.
    """
    original = read_config(folder)
    layout = layout_of(original)
    if layout is None:
        raise unknown_type(original)
    llava.check_original(original)
    try:
        method = layout.method(original)
    except TypeError as error:
        raise ValueError(f"config.json: {error}") from None
    stored = {name: t for name, t in read_tensors(folder).items() if not llava.is_computed(name)}
    layout.check(original, method, stored)
    tensors = {llava.published_name(name, layout.renames): t for name, t in stored.items()}
    tower = _tower_folder(original, vision_tower, needed=not llava.has_tower(tensors))
    if tower is not None and not llava.has_tower(tensors):
        tensors |= llava.tower_tensors(read_tensors(tower))
    vision_config = llava.tower_config(tensors, tower)

    notes: list[str] = []
    tokenizer = None
    try:
        tokenizer = processors.load_tokenizer(folder)
    except ValueError as error:
        notes.append(str(error))
    rows = original["vocab_size"]
    image_token_id = rows if tokenizer is None else processors.add_image_token(tokenizer)
    if tokenizer is None:
        notes.append(
            f"no tokenizer was converted: add the special token {processors.IMAGE_TOKEN!r} to the model's own, so that "
            f"it gets the id {image_token_id} (config.image_token_id), and save it beside the model"
        )
    if image_token_id >= rows:
        rows = -(-(image_token_id + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    config = llava.hf_config(original, method, vision_config, image_token_id, rows)
    for name in (llava.EMBEDDING, llava.HEAD):
        if name in tensors and tensors[name].shape[0] == original["vocab_size"]:
            tensors[name] = _with_rows(tensors[name], rows)
    _compare(tensors, config)
    return Source(config, tensors, layout, method, tokenizer, tower, notes)


def _tower_folder(original: Mapping[str, Any], given: str | Path | None, needed: bool) -> Path | None:
    if given is not None:
        return find_folder(given, "vision tower")
    named = original.get("mm_vision_tower")
    if isinstance(named, str) and Path(named).expanduser().is_dir():
        return Path(named).expanduser()
    if needed:
        raise ValueError(
            "vision tower: its weights are not in the checkpoint, expected the CLIP checkpoint that config.json calls "
            f"mm_vision_tower={named!r}, to be given as vision_tower (--vision-tower), a folder or a hub name"
        )
    return None


def _with_rows(stored: StoredTensor, rows: int) -> StoredTensor:
    """An embedding or head with rows added, or cut off.

    New rows are the mean of the others: zeros would win in a head whose other logits are negative.
    """
    have = stored.shape[0]

    def read() -> Tensor:
        tensor = stored.read()
        if rows <= have:
            return tensor[:rows]
        mean = tensor.mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(rows - have, -1)))

    return stored if rows == have else replace(stored, shape=(rows, *stored.shape[1:]), read=read)


def _compare(tensors: Mapping[str, StoredTensor], config: Any) -> None:
    """Refuse a checkpoint whose tensors are not those of the model that its config describes."""
    from pruneops import models

    with torch.device("meta"):
        model = getattr(models, config.architectures[0])(config)
    wanted = {llava.respelled(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and llava.HEAD not in tensors:
        del wanted[llava.HEAD]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"checkpoint: {len(missing)} tensors are missing: {shorten(missing)}")
    unknown = [name for name in tensors if name not in wanted]
    if unknown:
        raise ValueError(f"checkpoint: got {len(unknown)} tensors that the model does not have: {shorten(unknown)}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"checkpoint: {name} from {tensors[name].file.name} has shape {tensors[name].shape}, expected {shape}"
            )


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    source: str | None = None,
    target: str = HF,
    vision_tower: str | None = None,
    force: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Convert a checkpoint from a method's original layout to Hugging Face's, or back.

    Tensors are copied bit by bit, one at a time, so memory does not grow with the model. Only the embedding and the
    head change their size: an original LLaVA has no row for the image token, so rows are added (their mean) up to a
    multiple of 64, and cut off again on the way back.

    Parameters
    ----------
    checkpoint : str or Path
        Folder or hub name.
    out : str or Path
        Folder to write.
    source : str, optional
        ``"hf"`` or a layout such as ``"pmod"`` or ``"dynamic-llava"``. None: what ``config.json`` says; if given, it
        has to say the same.
    target : str
        ``"hf"`` or a layout.
    vision_tower : str, optional
        From a layout: the CLIP checkpoint, where the weights of the tower are not in the checkpoint or its sizes cannot
        be told from them. To a layout: the name to record for it.
    force : bool
        Write into a folder that is not empty; weights in it are replaced.
    max_shard_bytes : int
        Largest file of weights.
    progress : callable, optional
        ``progress(bytes_written, bytes_in_all)`` after each tensor.

    Returns
    -------
    list of str
        What the user has to know or to do.

    Raises
    ------
    ValueError
        As `read_original`, and if there is nothing to convert or `out` is in the way.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, expected at least 1")
    folder, out = find_folder(checkpoint), Path(out).expanduser()
    config = read_config(folder)
    found = _layout_name(config)
    for name in filter(None, (source, target)):
        if name != HF:
            layout_named(name)
    if source is not None and source != found:
        raise ValueError(f"checkpoint: config.json says that its layout is {found}, expected {source} as asked for")
    if found == target or HF not in (found, target):
        raise ValueError(f"checkpoint: its layout is {found}, expected one to convert to {target}")
    if out.exists() and out.resolve() == folder.resolve():
        raise ValueError(f"out: {out} is the checkpoint itself, expected another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (force and out.is_dir()):
        raise ValueError(f"out: {out} is there already, expected a new or empty folder, or force (--force)")
    if target == HF:
        read = read_original(folder, vision_tower)
        document, tensors, notes = json.loads(read.config.to_json_string()), read.tensors, read.notes
        processor = read.processor()
    else:
        document, tensors = _to_layout(folder, layout_named(target), vision_tower)
        notes, processor = [], None

    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("model*.safetensors"), *out.glob("model*.safetensors.index.json"), out / "config.json"):
        stale.unlink(missing_ok=True)
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0

    def count(_: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    write_safetensors(out, tensors, max_shard_bytes, count)
    processors.copy_files(folder, out, processor=processor is None)
    if processor is not None:
        processor.save_pretrained(out)
    # Last: a folder without it is not taken for a checkpoint, so one that was not finished is not either.
    (out / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return notes


def _layout_name(config: Mapping[str, Any]) -> str:
    layout = layout_of(config)
    if layout is not None:
        return layout.name
    if config.get("model_type") in _HF_TYPES:
        return HF
    raise unknown_type(config, *_HF_TYPES)


def _to_layout(
    folder: Path, layout: Layout, vision_tower: str | None
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Config and tensors, by original names, of a Hugging Face checkpoint."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    pruning = getattr(config, "pruning", None)
    if not isinstance(pruning, Mapping) or pruning.get("method") != layout.method_name:
        raise ValueError(
            f"checkpoint: config.json has the pruning {pruning!r}, expected one of the method "
            f"{layout.method_name!r}: the layout is for models that were trained with it"
        )
    method = method_from_dict(pruning)
    if config.architectures is None:
        config.architectures = [f"Llava{'Next' if config.model_type == 'llava_next' else ''}ForConditionalGeneration"]
    stored = {llava.respelled(name): t for name, t in read_tensors(folder).items() if not llava.is_computed(name)}
    _compare(stored, config)
    original = llava.original_config(config, processors.aspect_ratio_of(folder), vision_tower)
    rows = original["vocab_size"]
    for key, value in layout.keys(method, config.text_config.num_hidden_layers).items():
        before = original.get(key)
        # What else the authors wrote into an object of theirs stays.
        original[key] = {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    if not layout.recognises(original):
        original |= {"model_type": layout.model_types[0], "architectures": [layout.architecture]}
    for name in (llava.EMBEDDING, llava.HEAD):
        if name in stored:
            stored[name] = _with_rows(stored[name], rows)
    tensors = {llava.original_name(name, layout.renames): t for name, t in stored.items()}
    layout.check(original, method, tensors)
    return original, tensors
