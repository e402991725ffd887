"""PLLaVA: LLaVA-NeXT weights over the pooled frames of a video, with LoRA adapters on the language model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaConfig, LlavaModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from pruneops.models._pruned import PrunedModelMixin

#: From the names in released checkpoints, whose language model holds its head, to those of the classes here.
_RENAMED = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^vision_tower\.": "model.vision_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
}
# PEFT wraps the language model, and the layers that it adapts.
_PEFT_WRAPPER, _PEFT_LAYER = "base_model.model.", ".base_layer."
_INDEX, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


class PllavaConfig(LlavaConfig):
    """Config of a PLLaVA model: a LLaVA config, and the shapes before and after pooling.

    Parameters
    ----------
    pooling_shape : (int, int, int)
        Frames of a video, and rows and columns of each after pooling. Only rows and columns are pooled: videos may have
        any number of frames, and keep it.
    frame_shape : (int, int)
        Rows and columns of the vision tower's patches.
    """

    model_type = "pllava"

    pooling_shape: list[int] | tuple[int, ...] = (16, 12, 12)
    frame_shape: list[int] | tuple[int, ...] = (24, 24)

    def __post_init__(self, **kwargs: Any) -> None:
        for name, length in (("pooling_shape", 3), ("frame_shape", 2)):
            shape = getattr(self, name)
            if len(shape) != length or not all(type(n) is int and n > 0 for n in shape):
                raise ValueError(f"{name}: got {shape!r}, expected {length} positive whole numbers")
        super().__post_init__(**kwargs)


class PllavaModel(LlavaModel):
    """The model between encoders and text: `transformers.LlavaModel` with frames of videos that are pooled.

    All patches of a frame but the class token go through the projector, then a mean over ``frame_shape`` makes
    ``pooling_shape[1:]`` of them. Tokens of a video follow each other frame by frame, row by row.
    """

    config_class = PllavaConfig
    input_modalities = ("image", "video", "text")

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """``pooler_output``: for each of ``(videos, frames, 3, height, width)`` a ``(frames, patches, hidden)``."""
        if pixel_values_videos.dim() != 5:
            raise ValueError(
                f"pixel_values_videos: got shape {tuple(pixel_values_videos.shape)}, expected (videos, frames, 3, "
                "height, width)"
            )
        outputs = super().get_image_features(pixel_values_videos.flatten(0, 1), **{**kwargs, "return_dict": True})
        pooled = self._pool(outputs.pooler_output)
        outputs.pooler_output = list(pooled.unflatten(0, pixel_values_videos.shape[:2]))
        return outputs

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """``pooler_output``: for each of ``(images, 3, height, width)`` a video that shows it in every frame."""
        outputs = super().get_image_features(pixel_values, **{**kwargs, "return_dict": True})
        frames = self.config.pooling_shape[0]
        outputs.pooler_output = [image.expand(frames, -1, -1) for image in self._pool(outputs.pooler_output)]
        return outputs

    def _pool(self, features: list[Tensor]) -> Tensor:
        """``(n, pooled patches, hidden)`` of n ``(patches, hidden)``."""
        rows, columns = self.config.frame_shape
        frames = torch.stack(list(features))
        if frames.shape[1] != rows * columns:
            raise ValueError(
                f"pixel_values, pixel_values_videos: got frames of {frames.shape[1]} patches, expected "
                f"{rows} x {columns} as in config.frame_shape"
            )
        grid = frames.transpose(1, 2).unflatten(2, (rows, columns))
        pooled = nn.functional.adaptive_avg_pool2d(grid, tuple(self.config.pooling_shape[1:]))
        return pooled.flatten(2).transpose(1, 2)

    def get_placeholder_mask(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        image_features: Tensor | None = None,
        video_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(batch, length, 1)`` bool, once for images and once for videos, which share their placeholder.

        Raises
        ------
        ValueError
            If there are more or fewer placeholders than features.
        """
        features = image_features if video_features is None else video_features
        mask = super().get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=features)
        return mask, mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As `transformers.LlavaModel`, with ``pixel_values_videos`` ``(videos, frames, 3, height, width)``.

        Raises
        ------
        ValueError
            If both images and videos are given: they share one placeholder, so nothing says which is which.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: got both or neither, expected exactly one of them")
        if pixel_values is not None and pixel_values_videos is not None:
            raise ValueError(
                "pixel_values, pixel_values_videos: got both, expected one of them; images and videos share one "
                "placeholder. Pass an image as a video that repeats it"
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = None
        if pixel_values is not None or pixel_values_videos is not None:
            if pixel_values is not None:
                kind, of_each = "image_features", self.get_image_features(pixel_values).pooler_output
            else:
                kind, of_each = "video_features", self.get_video_features(pixel_values_videos).pooler_output
            features = torch.cat([one.flatten(0, 1) for one in of_each])
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            mask, _ = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, **{kind: features})
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )


class _DensePllava(transformers.LlavaForConditionalGeneration):
    """The model with its head, not pruned."""

    config_class = PllavaConfig
    input_modalities = ("image", "video", "text")
    # The image newline of the LLaVA-NeXT weights that some checkpoints began with.
    _keys_to_ignore_on_load_unexpected = [r"image_newline"]

    def __init__(self, config: PllavaConfig) -> None:
        # Past the class above, which would make a LlavaModel first.
        super(transformers.LlavaForConditionalGeneration, self).__init__(config)
        self.model = PllavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """As `transformers.LlavaForConditionalGeneration`, with ``pixel_values_videos``."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


class PllavaForConditionalGeneration(PrunedModelMixin, _DensePllava):
    """PLLaVA (Xu et al., "PLLaVA: Parameter-free LLaVA Extension from Images to Videos", arXiv 2404.16994), pruned.

    Transformers has no class for it; this one is made of its LLaVA classes, and loads released checkpoints.

    *Inputs.* ``pixel_values_videos`` ``(videos, frames, 3, height, width)``, each frame as a LLaVA image (336 x 336).
    A video of T frames has `video_tokens(T)` tokens (144 a frame), and needs as many ``<image>`` placeholders
    (``config.image_token_id``) in the prompt; the original prompt has one, to be repeated. T is free: only the patches
    of a frame are pooled. The original code repeats the frames of clips that are shorter than it was told; here nothing
    is repeated.

    *Images.* ``pixel_values`` ``(images, 3, height, width)``: each is seen as a video that shows it in all of
    ``config.pooling_shape[0]`` frames, and has as many tokens, as with the media type "image" of the original code. (To
    `PruneVid` all of them are static: one frame's tokens are left.) Images and videos share their placeholder, so a
    call may have either.

    *Newline tokens.* None.

    *Pruning.* As for the other drop-in classes, the method is stored in ``config.pruning``.
    """

    def video_tokens(self, num_frames: int) -> int:
        """Tokens, and so placeholders, of a video of `num_frames` frames."""
        _, rows, columns = self.config.pooling_shape
        return num_frames * rows * columns

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        lora_alpha: float | None = None,
        weight_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint, with its adapters merged into the weights, and prune it.

        Parameters
        ----------
        pretrained_model_name_or_path : str or Path
            A folder or the name of a repository, with ``config.json`` and safetensors files. Names of tensors are those
            of released checkpoints (``vision_tower.*``, ``multi_modal_projector.*``, ``language_model.model.*``,
            ``language_model.lm_head.*``, and with adapters as PEFT writes a wrapped model, see `merge_lora`) or those
            that ``save_pretrained`` of this class writes.
        lora_alpha : float, optional
            The adapters' alpha. No config holds it: the authors evaluate with 4 or 14, at rank 128. Needed if there
            are adapters.
        weight_dir : str or Path, optional
            A folder whose safetensors take precedence, as the original loader's argument of that name: what training
            saved, possibly only the adapters and the projector.
        *args, **kwargs
            As for Hugging Face classes, and ``pruning``; fields of the config (such as ``pooling_shape``) override it.

        Raises
        ------
        ValueError
            If there are adapters and no `lora_alpha`, or the reverse, or adapters fit no weight.
        FileNotFoundError
            If a folder has no safetensors files.

        Notes
        -----
        The names are read off the original loading code (the language model wrapped by PEFT 0.10, adapters on q_proj
        and v_proj named "default", the rest of the weights beside them), not off the released files themselves. Names
        of older releases of PEFT, where adapted weights are called as if there were no adapters, are understood too.
        """
        folder = _fetched(pretrained_model_name_or_path, kwargs) / kwargs.pop("subfolder", "")
        files = [*_tensor_files(folder), *(_tensor_files(Path(weight_dir)) if weight_dir is not None else ())]
        adapted = any(_is_adapter(name) for file in files for name in _names_in(file))
        if adapted != (lora_alpha is not None):
            raise ValueError(
                "lora_alpha: got None, expected the alpha of the LoRA adapters that the checkpoint holds (4 or 14 for "
                "released ones)"
                if adapted
                else f"lora_alpha: got {lora_alpha!r}, expected None: the checkpoint holds no LoRA adapters"
            )
        if not adapted and weight_dir is None:
            return super().from_pretrained(folder, *args, key_mapping=_RENAMED, **kwargs)
        state: dict[str, Tensor] = {}
        for file in files:
            state.update((_unwrapped(name), tensor) for name, tensor in _load(file).items())
        adapters = {name: state.pop(name) for name in [*state] if _is_adapter(name)}
        if adapters:
            state = merge_lora(state, adapters, lora_alpha)
        kwargs.setdefault("config", str(folder))
        loaded = super().from_pretrained(None, *args, state_dict=state, key_mapping=_RENAMED, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        if (folder / "generation_config.json").exists() and kwargs.get("generation_config") is None:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return loaded


def merge_lora(state: Mapping[str, Tensor], adapters: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Add LoRA adapters to the weights that they adapt: ``W + alpha / rank * B @ A``.

    Parameters
    ----------
    state : mapping of str to Tensor
        Weights of the model by name; names may still be those of a model wrapped by PEFT.
    adapters : mapping of str to Tensor
        ``<layer>.lora_A[.<adapter>].weight`` ``(rank, in)`` and ``<layer>.lora_B[.<adapter>].weight`` ``(out, rank)``
        for every adapted layer, named as in a state dict of the wrapped model, or as in PEFT's own adapter files, which
        count from the language model.
    alpha : float
        The adapters' alpha, above 0.

    Returns
    -------
    dict
        All of `state` under unwrapped names, adapted weights replaced; dtypes as in `state`. Sums are float32 and
        rounded once. `state` is left as it is. Adapters that are applied beside the layer in bfloat16 round differently
        than merged ones, by about one unit in the last place.

    Raises
    ------
    TypeError, ValueError
        If `alpha` is not a positive number, an adapter lacks its counterpart, or fits no weight.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"lora_alpha: got {alpha!r}, expected a number")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"lora_alpha: got {alpha!r}, expected a number above 0")
    merged = {_unwrapped(name): tensor for name, tensor in state.items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapters.items():
        if not _is_adapter(name):
            raise ValueError(f"adapters: got {name!r}, expected names with '.lora_A.' or '.lora_B.'")
        layer, _, rest = _unwrapped(name).partition(".lora_")
        pairs.setdefault(layer, {})[rest[0]] = tensor
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"adapters: got only lora_{''.join(pair)} of {layer}, expected lora_A and lora_B")
        weight = merged.get(f"{layer}.weight")
        if weight is None:
            raise ValueError(f"adapters: got one of {layer}, expected layers that the checkpoint has")
        down, up = pair["A"].float(), pair["B"].float()
        if weight.shape != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"adapters: got lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} of {layer}, expected "
                f"(rank, {weight.shape[1]}) and ({weight.shape[0]}, rank)"
            )
        added = torch.addmm(weight.float(), up, down, alpha=alpha / down.shape[0])
        merged[f"{layer}.weight"] = added.to(weight.dtype)
    return merged


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _unwrapped(name: str) -> str:
    """The name that a tensor has without PEFT."""
    if name.startswith(_PEFT_WRAPPER):  # a file of adapters only
        name = f"language_model.{name}"
    return name.replace(_PEFT_WRAPPER, "", 1).replace(_PEFT_LAYER, ".")


def _fetched(name_or_path: str | Path, options: Mapping[str, Any]) -> Path:
    """The folder of a checkpoint, downloaded if it is not on this machine."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    chosen = {key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options}
    return Path(snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.safetensors"], **chosen))


def _tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in a fixed order."""
    if (folder / _INDEX).exists():
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    for name in (_SINGLE_FILE, "adapter_model.safetensors"):
        if (folder / name).exists():
            return [folder / name]
    raise FileNotFoundError(f"{folder}: found no {_INDEX}, {_SINGLE_FILE} or adapter_model.safetensors")


def _names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
