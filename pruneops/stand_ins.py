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
from pruneops.ragged import image_runs

if TYPE_CHECKING:
    from pruneops.pruning import Run

#: The attribute under which a pruned module finds its `Run`.
RUN_ATTRIBUTE = "_pruneops"
_NO_VIDEO = -1
#: What the stand-ins of a forward take beside its own arguments.
_EXTRA_ARGUMENTS = ("visual_token_mask", "num_frames")


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
    _refuse(self, kwargs, attention_mask, position_ids, inputs_embeds)
    if visual_token_mask is None:
        placeholders, run.placeholders = run.placeholders, None
        visual_token_mask = None if placeholders is None else number_images(placeholders, run.image_lengths)
    batch, columns = inputs_embeds.shape[:2]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    if use_cache is None:
        # A training step has no use for keys and values.
        use_cache = bool(self.config.use_cache) and not self.training
    if self.training and getattr(self, "gradient_checkpointing", False):
        use_cache = False
    prompt_length = None
    if run.generating and past_key_values is None:
        # Without a cache generate() feeds the whole text each time; the prompt is what came first.
        run.prompt_length = prompt_length = run.prompt_length or columns
        if run.method.positions is not Positions.GIVEN:
            # Behind right padding generate() counts on from the padding; the decoder numbers the real tokens.
            position_ids = None
    if self.training and pruning_labels is None and visual_token_mask is not None:
        warnings.warn(
            "training without labels in the call of the model (label smoothing and custom losses take them out): "
            "tokens are ranked by the last token of each row, as for a prompt, not by the tokens before the answers",
            stacklevel=2,
        )
    outputs = ragged_forward(
        self,
        run.method,
        run.trace,
        inputs_embeds=inputs_embeds,
        attention_mask=_columns(attention_mask, "attention_mask", batch, past, columns, None),
        position_ids=_last_columns(position_ids, batch, columns),
        visual_token_mask=_columns(visual_token_mask, "visual_token_mask", batch, past, columns, 0),
        num_frames=_frames(num_frames),
        labels=_columns(pruning_labels, "labels", batch, 0, columns, None),
        past_key_values=past_key_values,
        use_cache=use_cache,
        output_hidden_states=bool(output_hidden_states),
        prompt_length=prompt_length,
    )
    return outputs if kwargs.get("return_dict", True) is not False else outputs.to_tuple()


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


def _frames(num_frames: Sequence[int] | Tensor | None) -> list[int] | None:
    """Frames of every video in order, from what the caller gave or from the rows that `frames_by_row` made of it."""
    if num_frames is None:
        return None
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


def frames_by_row(num_frames: Sequence[int] | Tensor, visual_token_mask: Tensor) -> Tensor:
    """``(batch, most videos a row)`` int64: the frames of every row's videos, so that `generate` can repeat rows."""
    visual = visual_token_mask.cpu()
    visual = image_runs(visual) if visual.dtype == torch.bool else visual
    frames = _frames(num_frames)
    counts = [int(torch.unique(row[row > 0]).numel()) for row in visual]
    if len(frames) != sum(counts):
        raise ValueError(
            f"num_frames: got {len(frames)} entries, expected {sum(counts)}, one for each video or image of "
            "visual_token_mask in order of appearance in the batch"
        )
    rows = torch.tensor(frames, dtype=torch.int64).split(counts)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_NO_VIDEO).to(visual_token_mask.device)


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
    return stock(*bound.args, **bound.kwargs, pruning_labels=bound.arguments["labels"])


def multimodal_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of the model between images and text: notes which tokens are whose image."""
    run: Run = getattr(self, RUN_ATTRIBUTE)
    run.placeholders = run.image_lengths = None
    encoded = kwargs.get("mm_encoder_outputs")
    if encoded and encoded.get("image") is not None:
        run.image_lengths = [len(features) for features in encoded["image"].pooler_output]
    try:
        return run.stock(self, "forward")(*args, **kwargs)
    finally:
        run.placeholders = run.image_lengths = None


def get_image_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Run = getattr(self, RUN_ATTRIBUTE)
    outputs = run.stock(self, "get_image_features")(*args, **kwargs)
    features = getattr(outputs, "pooler_output", None)
    run.image_lengths = None if features is None else [len(f) for f in features]
    return outputs


def get_placeholder_mask(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Run = getattr(self, RUN_ATTRIBUTE)
    mask = run.stock(self, "get_placeholder_mask")(*args, **kwargs)
    run.placeholders = mask[..., 0]
    return mask


def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Run = getattr(self, RUN_ATTRIBUTE)
    bound = inspect.signature(run.stock(self, "generate")).bind_partial(*args, **kwargs)
    _refuse_generation(self, {**bound.arguments, **bound.arguments.get("kwargs", {})})
    if kwargs.get("num_frames") is not None and kwargs.get("visual_token_mask") is not None:
        kwargs["num_frames"] = frames_by_row(kwargs["num_frames"], kwargs["visual_token_mask"])
    run.generating, run.prompt_length = True, None
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
        and kwargs.get("pixel_values") is None
    ):
        warnings.warn(
            "generate() got inputs_embeds but neither pixel_values nor visual_token_mask: no token is known to be "
            "visual, so nothing is pruned",
            stacklevel=3,
        )


def number_images(placeholders: Tensor, image_lengths: list[int] | None) -> Tensor:
    """Number the images of each row.

    Parameters
    ----------
    placeholders : Tensor
        ``(batch, length)`` bool, True at image tokens.
    image_lengths : list of int or None
        Tokens of every image, in order over the whole batch; None: every maximal run is an image.

    Returns
    -------
    Tensor
        ``(batch, length)`` int64: 0 for text, i for the row's i-th image.

    Raises
    ------
    ValueError
        If an image would be spread over two rows.
    """
    if image_lengths is None:
        return image_runs(placeholders)
    flat = placeholders.flatten().cpu()
    columns = placeholders.shape[1]
    rows = flat.nonzero().squeeze(1) // columns
    image = torch.repeat_interleave(torch.arange(len(image_lengths)), torch.tensor(image_lengths, dtype=torch.int64))
    if image.numel() != rows.numel():
        raise ValueError(
            f"input_ids: got {rows.numel()} image placeholders, expected {image.numel()}, one for each token of the "
            f"{len(image_lengths)} images"
        )
    if not image.numel():
        return torch.zeros_like(placeholders, dtype=torch.int64)
    first_row = torch.full((len(image_lengths),), columns * placeholders.shape[0]).scatter_reduce(
        0, image, rows, "amin"
    )
    if bool((rows != first_row[image]).any()):
        spread = int(image[rows != first_row[image]][0])
        raise ValueError(
            f"input_ids: the placeholders of image {spread} are spread over two rows, expected all "
            f"{image_lengths[spread]} in one; the rows' numbers of placeholders do not match their images"
        )
    first_image = torch.full((placeholders.shape[0],), len(image_lengths)).scatter_reduce(0, rows, image, "amin")
    numbers = torch.zeros(flat.shape[0], dtype=torch.int64)
    numbers[flat] = image - first_image[rows] + 1
    return numbers.view_as(placeholders).to(placeholders.device)
