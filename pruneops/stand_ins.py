"""What stands in for a model's own methods while it is pruned.

All are plain functions that find the `Run` on the module they are bound to, so that a copy of a pruned model is a
pruned model of its own.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from pruneops.decoder import Positions, ragged_forward
from pruneops.media import MODALITIES, mark_frames
from pruneops.ragged import image_runs

if TYPE_CHECKING:
    from pruneops.pruning import Run

#: The attribute under which a pruned module finds its `Run`.
RUN_ATTRIBUTE = "_pruneops"
_NO_VIDEO = -1
#: What the stand-ins of a forward take beside its own arguments.
_EXTRA_ARGUMENTS = ("visual_token_mask", "num_frames")
#: Under which names models take images and videos.
_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")


def text_forward(
    self: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    visual_token_mask: Tensor | None = None,
    num_frames: Sequence[int] | Tensor | None = None,
    pruning_labels: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast | tuple[Any, ...]:
    """The text model's forward while it is pruned: the stock arguments, ``visual_token_mask`` and ``num_frames``."""
    run: Run = getattr(self, RUN_ATTRIBUTE)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids, inputs_embeds: got both or neither, expected exactly one of them")
    if inputs_embeds is None:
        inputs_embeds = self.embed_tokens(input_ids)
    output_hidden_states = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
    input_ids = run.notes.input_ids if input_ids is None else input_ids
    _refuse(self, kwargs, attention_mask, position_ids, inputs_embeds)
    if visual_token_mask is None:
        numbered = run.notes.number()
        if numbered is not None:
            visual_token_mask, frames = numbered
            num_frames = frames if num_frames is None else num_frames
    batch, columns = inputs_embeds.shape[:2]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    if use_cache is None:
        # A training step has no use for keys and values.
        use_cache = bool(self.config.use_cache) and not self.training
    if self.training and getattr(self, "gradient_checkpointing", False):
        use_cache = False
    if pruning_labels is not None and run.method.judges_answers:
        if past:
            raise ValueError(
                f"labels: got some together with a cache that holds {past} columns, expected the whole text in one "
                "call: which tokens the method drops depends on where in it the answers are"
            )
        if self.training and (use_cache or past_key_values is not None):
            warnings.warn(
                "`use_cache=True` is incompatible with training, where decisions are drawn for the whole text. Setting "
                "`use_cache=False`.",
                stacklevel=2,
            )
            use_cache, past_key_values = False, None
    prompt_length = None
    if run.generating and past_key_values is None:
        # Without a cache generate() feeds the whole text each time; the prompt is what came first.
        run.prompt_length = prompt_length = run.prompt_length or columns
        if run.method.positions is not Positions.GIVEN:
            position_ids = None
    elif isinstance(visual_token_mask, Tensor) and not use_cache and past == 0:
        # What comes behind the columns of the mask was generated.
        prompt_length = min(visual_token_mask.shape[-1], columns)
    if run.generating and not run.positions_given:
        # Behind right padding generate() counts on from the padding; the decoder numbers the real tokens.
        position_ids = None
    if self.training and pruning_labels is None and visual_token_mask is not None and run.method.asks_labels:
        warnings.warn(
            "training without labels in the call of the model (label smoothing and custom losses take them out): "
            "tokens are ranked by the end of each row, as for a prompt, not by what stands before the answers",
            stacklevel=2,
        )
    visual = _columns(visual_token_mask, "visual_token_mask", batch, past, columns, 0)
    labels = _columns(pruning_labels, "labels", batch, 0, columns, None)
    if labels is not None and visual is not None and run.method.judges_answers:
        labels.masked_fill_(visual != 0, -100)  # the head's copy, which the loss is of
    outputs = ragged_forward(
        self,
        run.method,
        run.trace,
        inputs_embeds=inputs_embeds,
        attention_mask=_columns(attention_mask, "attention_mask", batch, past, columns, None),
        position_ids=_last_columns(position_ids, batch, columns),
        visual_token_mask=visual,
        num_frames=_new_frames(num_frames, visual_token_mask, past, columns),
        labels=labels,
        past_key_values=past_key_values,
        use_cache=use_cache,
        output_hidden_states=bool(output_hidden_states),
        prompt_length=prompt_length,
        question_starts=None if past and columns == 1 else _question_starts(run, input_ids, batch, columns),
    )
    return outputs if kwargs.get("return_dict", True) is not False else outputs.to_tuple()


def _question_starts(run: Run, input_ids: Tensor | None, batch: int, columns: int) -> Tensor | None:
    """``(batch, columns)`` bool: where the tokens that the method seeks begin; None if it seeks none."""
    tokens = run.method.sought_tokens
    if tokens is None:
        return None
    if input_ids is None or input_ids.shape != (batch, columns):
        warnings.warn(
            "question_start: the model got inputs_embeds without input_ids, so where questions begin is not known; "
            "all text behind the last image counts as the question",
            stacklevel=3,
        )
        return None
    following = nn.functional.pad(input_ids, (0, len(tokens) - 1), value=-1)
    return torch.stack([following[:, i : i + columns] == token for i, token in enumerate(tokens)]).all(0)


def _refuse(
    text_model: nn.Module,
    kwargs: dict[str, Any],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor,
) -> None:
    """Refuse what cannot be right with pruned tokens."""
    if kwargs.get("output_attentions", getattr(text_model.config, "output_attentions", False)):
        raise ValueError(
            "output_attentions: got True, expected False; attention maps of pruned, ragged layers have no common "
            "shape and the kernels never build them (prune(..., record=True) keeps the scores that pruning used)"
        )
    packed = [k for k in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if kwargs.get(k) is not None]
    if packed:
        raise ValueError(
            f"{packed[0]}: got a tensor, expected None; rows that hold several packed sequences are not supported"
        )
    unmasked = position_ids is not None and attention_mask is None and inputs_embeds.shape[1] > 1
    if unmasked and bool((position_ids[..., 1:] < position_ids[..., :-1]).any()):
        raise ValueError(
            "position_ids: got positions that decrease within a row, expected increasing ones (rows that hold "
            "several packed sequences are not supported; for padding pass attention_mask)"
        )


def _columns(mask: Tensor | None, name: str, batch: int, past: int, columns: int, pad: int | None) -> Tensor | None:
    """The part of a ``(batch, n)`` mask that belongs to the `columns` columns after `past` ones."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, expected a tensor of shape (batch, length)")
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(
            f"{name}: got shape {tuple(mask.shape)}, expected ({batch}, length); 4-D masks cannot be packed"
        )
    if name == "visual_token_mask" and mask.is_floating_point():
        raise TypeError(f"{name}: got {mask.dtype}, expected bool, or integers with the number of the row's image")
    if mask.shape[1] == columns:
        return mask
    if mask.shape[1] >= past + columns:
        if mask.shape[1] > past + columns and name != "visual_token_mask":
            raise ValueError(
                f"{name}: got {mask.shape[1]} columns, expected {past + columns} ({past} in the cache, {columns} new)"
            )
        return mask[:, past : past + columns]
    if pad is None:
        raise ValueError(
            f"{name}: got {mask.shape[1]} columns, expected {columns} or {past + columns} ({past} in the cache)"
        )
    # The mask of a prompt, while generated tokens follow.
    return nn.functional.pad(mask, (0, past + columns - mask.shape[1]), value=pad)[:, past:]


def _frames(num_frames: Sequence[int] | Tensor) -> list[int]:
    """Frames of every video in order, from what the caller gave or from the rows that `frames_by_row` made of it."""
    if isinstance(num_frames, Tensor):
        if num_frames.is_floating_point() or num_frames.is_complex() or num_frames.dtype == torch.bool:
            raise TypeError(f"num_frames: got {num_frames.dtype}, expected integers")
        if num_frames.dim() == 2:
            num_frames = num_frames[num_frames != _NO_VIDEO]
        if num_frames.dim() != 1:
            raise ValueError(f"num_frames: got shape {tuple(num_frames.shape)}, expected (videos,)")
        return num_frames.tolist()
    if not isinstance(num_frames, (list, tuple)) or not all(type(n) is int for n in num_frames):
        raise TypeError(f"num_frames: got {num_frames!r}, expected a 1-D int tensor or a list of ints")
    return list(num_frames)


def _new_frames(
    num_frames: Sequence[int] | Tensor | None, visual_token_mask: Tensor | None, past: int, columns: int
) -> list[int] | None:
    """`_frames` of the videos in the `columns` columns after `past` ones, where the mask covers all turns."""
    if num_frames is None or (past and columns == 1):  # decoding: nothing to read back
        return None
    frames = _frames(num_frames)
    if visual_token_mask is None or visual_token_mask.shape[1] < past + columns or not past:
        return frames
    numbered = _numbered(visual_token_mask)[:, : past + columns]
    videos = [torch.unique(row[row > 0]).tolist() for row in numbered]
    if len(frames) != sum(map(len, videos)):
        return frames
    frames_of = iter(frames)
    pairs = [[(video, next(frames_of)) for video in row] for row in videos]
    return [n for row, of_row in zip(numbered, pairs, strict=True) for v, n in of_row if bool((row[past:] == v).any())]


def _numbered(visual_token_mask: Tensor) -> Tensor:
    visual = visual_token_mask.cpu()
    return image_runs(visual) if visual.dtype == torch.bool else visual


def frames_by_row(
    num_frames: Sequence[int] | Tensor, visual_token_mask: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """``(batch, most videos a row)`` int64 on the CPU: the frames of every row's videos; `generate` can repeat rows."""
    visual, frames = _numbered(visual_token_mask), _frames(num_frames)
    counts = [int(torch.unique(row[row > 0]).numel()) for row in visual]
    if len(frames) != sum(counts) and attention_mask is not None and attention_mask.shape == visual.shape:
        counts = [int(torch.unique(row[row > 0]).numel()) for row in visual * (attention_mask.cpu() != 0)]
    if len(frames) != sum(counts):
        raise ValueError(
            f"num_frames: got {len(frames)} entries, expected {sum(counts)}, one for each video or image of "
            "visual_token_mask in order of appearance in the batch"
        )
    rows = torch.tensor(frames, dtype=torch.int64).split(counts)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_NO_VIDEO)


def _last_columns(position_ids: Tensor | None, batch: int, columns: int) -> Tensor | None:
    if position_ids is None:
        return None
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] < columns:
        raise ValueError(
            f"position_ids: got shape {tuple(position_ids.shape)}, expected ({batch}, {columns}) or (1, {columns})"
        )
    return position_ids[:, -columns:]


@functools.cache
def dressed(stand_in: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """`stand_in` with the stock name, docstring and signature; a forward also takes `_EXTRA_ARGUMENTS`."""

    @functools.wraps(stock)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return stand_in(self, *args, **kwargs)

    signature = inspect.signature(stock)
    if stock.__name__ == "forward":
        parameters = list(signature.parameters.values())
        at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        parameters[at:at] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in _EXTRA_ARGUMENTS
            if name not in signature.parameters
        ]
        signature = signature.replace(parameters=parameters)
    method.__signature__ = signature
    return method


def head_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of the model with the head: shows the labels to the decoder, which ranks by them."""
    stock = getattr(self, RUN_ATTRIBUTE).stock(self, "forward")
    if not args and kwargs.get("labels") is None:  # every decoding step: no need to look at the signature
        return stock(**kwargs)
    bound = inspect.signature(stock).bind_partial(*args, **kwargs)
    labels = bound.arguments.get("labels")
    if labels is None:
        return stock(*args, **kwargs)
    # A copy: the decoder masks labels that no token is left to predict.
    bound.arguments["labels"] = labels.clone()
    outputs = stock(*bound.args, **bound.kwargs, pruning_labels=bound.arguments["labels"])
    trace = getattr(self, RUN_ATTRIBUTE).trace
    extra, trace.auxiliary_loss = trace.auxiliary_loss, None
    if extra is None:
        return outputs
    items = kwargs.get("num_items_in_batch")
    if items is not None:
        # The stock loss is a sum over this batch divided by the labels of all batches of a step; so each batch brings
        # its share of the method's loss.
        extra = extra * (labels[:, 1:] != -100).sum() / items
    if isinstance(outputs, tuple):
        return outputs[0] + extra, *outputs[1:]
    outputs.loss = outputs.loss + extra
    return outputs


def multimodal_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of the model between encoders and text: notes which tokens are whose image or video."""
    run: Run = getattr(self, RUN_ATTRIBUTE)
    run.notes.clear()
    stock = run.stock(self, "forward")
    if run.method.sought_tokens is not None:
        run.notes.input_ids = inspect.signature(stock).bind_partial(*args, **kwargs).arguments.get("input_ids")
    encoded = kwargs.get("mm_encoder_outputs") or {}
    for modality in MODALITIES:
        if encoded.get(modality) is not None:
            run.notes.note_features(self, modality, encoded[modality])
    try:
        return stock(*args, **kwargs)
    finally:
        run.notes.clear()


def get_image_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Run = getattr(self, RUN_ATTRIBUTE)
    outputs = run.stock(self, "get_image_features")(*args, **kwargs)
    run.notes.note_features(self, "image", outputs)
    return outputs


def get_video_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Run = getattr(self, RUN_ATTRIBUTE)
    stock = run.stock(self, "get_video_features")
    outputs = stock(*args, **kwargs)
    given = inspect.signature(stock).bind_partial(*args, **kwargs).arguments
    pixels = next((given[name] for name in ("pixel_values_videos", "pixel_values") if name in given), None)
    if isinstance(pixels, Tensor) and pixels.dim() == 5:  # (videos, frames, channels, height, width)
        mark_frames(outputs, pixels.shape[1])
    run.notes.note_features(self, "video", outputs)
    return outputs


def get_placeholder_mask(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Run = getattr(self, RUN_ATTRIBUTE)
    stock = run.stock(self, "get_placeholder_mask")
    masks = stock(*args, **kwargs)
    given = inspect.signature(stock).bind_partial(*args, **kwargs).arguments
    for i, modality in enumerate(MODALITIES):
        if given.get(f"{modality}_features") is not None:
            mask = masks if isinstance(masks, Tensor) else masks[i]
            run.notes.placeholders[modality] = mask[..., 0]
    return masks


def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Run = getattr(self, RUN_ATTRIBUTE)
    bound = inspect.signature(run.stock(self, "generate")).bind_partial(*args, **kwargs)
    _refuse_generation(self, {**bound.arguments, **bound.arguments.get("kwargs", {})})
    if kwargs.get("num_frames") is not None and kwargs.get("visual_token_mask") is not None:
        kwargs["num_frames"] = frames_by_row(
            kwargs["num_frames"], kwargs["visual_token_mask"], kwargs.get("attention_mask")
        )
    run.generating, run.prompt_length = True, None
    run.positions_given = kwargs.get("position_ids") is not None
    try:
        return run.stock(self, "generate")(*args, **kwargs)
    finally:
        run.generating, run.prompt_length = False, None


def _refuse_generation(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse generation modes that need a cache whose rows and layers are equally long."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def setting(name: str) -> Any:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if setting(name) is not None:
            raise ValueError(
                f"{name}: assisted decoding takes tokens back from the cache, which a pruned cache cannot do because "
                f"its layers hold different tokens; expected {name}=None"
            )
    if setting("cache_implementation") not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation: got {setting('cache_implementation')!r}, expected None or 'dynamic'; static, "
            "quantized and offloaded caches give every row and layer the same length, pruning does not"
        )
    if setting("prefill_chunk_size") is not None:
        raise ValueError(
            f"prefill_chunk_size: got {setting('prefill_chunk_size')}, expected None; tokens are ranked by the end of "
            "the prompt, so the prompt has to come in one piece"
        )
    if setting("output_attentions"):
        raise ValueError(
            "output_attentions: got True, expected False; the attention kernels never build attention maps"
        )
    if (
        kwargs.get("inputs_embeds") is not None
        and kwargs.get("visual_token_mask") is None
        and all(kwargs.get(name) is None for name in (*_PIXELS, "mm_encoder_outputs"))
    ):
        warnings.warn(
            "generate() got inputs_embeds but neither pixel values nor visual_token_mask: no token is known to be "
            "visual, so nothing is pruned",
            stacklevel=3,
        )
