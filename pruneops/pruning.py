"""`prune`, `attach` and `detach`: give a Hugging Face model the ragged decoder, and take it away again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, LlamaModel, MistralModel, PreTrainedModel, Qwen2Model

from pruneops import stand_ins
from pruneops.decoder import ATTENTION_NAME, Record, Trace
from pruneops.methods.base import PruningMethod
from pruneops.report import Report
from pruneops.stand_ins import RUN_ATTRIBUTE

#: Text models whose decoder layers run packed as they are.
SUPPORTED_TEXT_MODELS: tuple[type[nn.Module], ...] = (LlamaModel, Qwen2Model, MistralModel)


#: Names under which models and wrappers (DDP, FSDP, torch.compile, PEFT) hold what is inside them.
_INWARDS = ("language_model", "module", "_fsdp_wrapped_module", "_orig_mod", "model", "base_model")


class _Missing:
    """Marks an attribute that a module did not have; a class, because copying a model must not change its identity."""


class Run:
    """A model while it is being pruned; what `prune` yields and `attach` returns.

    Attributes
    ----------
    method : PruningMethod
        The method, with its layers filled in for the model's depth.
    records : list of Record
        With ``record=True``: what every stage did to every row in the latest forward pass over a prompt.
    layer_lengths : list of list of int
        Tokens per layer and row in the latest forward pass over a prompt.
    layer_seconds : list of float
        Time per layer in that pass, the pruning before it included. Waits for the device.
    """

    def __init__(self, model: nn.Module, method: PruningMethod, record: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: got {type(model).__name__}, expected a torch.nn.Module of Hugging Face transformers"
            )
        if not isinstance(method, PruningMethod):
            raise TypeError(
                f"method: got {type(method).__name__}, expected a pruneops.methods.PruningMethod such as PyramidDrop()"
            )
        chain = list(_towards_text_model(model))
        self._text_model = chain[-1]
        self._multimodal = next((m for m in chain if hasattr(m, "get_placeholder_mask")), None)
        self._head = next((m for m in chain if isinstance(m, PreTrainedModel) and isinstance(m, GenerationMixin)), None)
        self.method = method.for_depth(self._text_model.config.num_hidden_layers)
        self.trace = Trace(record=record)
        self._saved: list[tuple[nn.Module, str, Any]] = []
        # Notes of the stand-ins on the call under way: image tokens (batch, length) and tokens of each image,
        # whether generate() runs, and the columns of its prompt.
        self.placeholders: Tensor | None = None
        self.image_lengths: list[int] | None = None
        self.generating = False
        self.prompt_length: int | None = None

    @property
    def records(self) -> list[Record]:
        return self.trace.records

    @property
    def layer_lengths(self) -> list[list[int]]:
        return self.trace.layer_lengths

    @property
    def layer_seconds(self) -> list[float]:
        return self.trace.layer_seconds

    def report(self) -> Report:
        """Tokens, FLOPs, key/value bytes and measured time per layer of the latest forward pass over a prompt.

        Raises
        ------
        ValueError
            If the model has not been run yet.
        """
        if not self.layer_lengths:
            raise ValueError(
                "run: the model has not seen a prompt yet, expected a call of the model or of generate() before "
                "report()"
            )
        return Report.from_run(
            layer_lengths=self.layer_lengths,
            layer_seconds=self.layer_seconds,
            text_config=self._text_model.config,
            dtype=next(self._text_model.parameters()).dtype,
            ranked_layers=getattr(self.method, "layers", None) or (),
        )

    # -- patching ----------------------------------------------------------------------------------------------------

    def _patched_modules(self) -> list[nn.Module]:
        return [m for m in (self._text_model, self._multimodal, self._head) if m is not None]

    def __enter__(self) -> Run:
        self.install()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def install(self) -> None:
        for module in self._patched_modules():
            if getattr(module, RUN_ATTRIBUTE, None) is not None:
                raise ValueError(
                    f"model: got a {type(module).__name__} that is already pruned by "
                    f"{getattr(module, RUN_ATTRIBUTE).method}, expected one that is not; leave the other "
                    "`with pruneops.prune(...)` block or call pruneops.detach(model) first"
                )
        for module in self._patched_modules():
            self._set(module, RUN_ATTRIBUTE, self)
        self._replace(self._text_model, "forward", stand_ins.text_forward)
        if self._multimodal is not None:
            self._replace(self._multimodal, "forward", stand_ins.multimodal_forward)
            self._replace(self._multimodal, "get_image_features", stand_ins.get_image_features)
            self._replace(self._multimodal, "get_placeholder_mask", stand_ins.get_placeholder_mask)
        if self._head is not None:
            self._replace(self._head, "forward", stand_ins.head_forward)
            self._replace(self._head, "generate", stand_ins.generate)
        # The attention modules get a config of their own: the model's may be shared with a model that is not pruned.
        config = self._text_model.config
        pruned_config = copy.copy(config)
        pruned_config._attn_implementation = ATTENTION_NAME
        for module in self._text_model.layers.modules():
            if module.__dict__.get("config") is config:
                self._set(module, "config", pruned_config)

    def remove(self) -> None:
        for module, name, value in reversed(self._saved):
            if value is _Missing:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
        self._saved.clear()

    def stock(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """The method of `module` as it was before, bound."""
        for saved_module, saved_name, value in self._saved:
            if saved_module is module and saved_name == name and value is not _Missing:
                return value
        return MethodType(getattr(type(module), name), module)

    def _replace(self, module: nn.Module, name: str, stand_in: Callable[..., Any]) -> None:
        # inspect.signature() of the stand-in has to show the stock arguments: generate() checks and filters by them.
        self._set(module, name, MethodType(stand_ins.dressed(stand_in, getattr(type(module), name)), module))

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._saved.append((module, name, module.__dict__.get(name, _Missing)))
        module.__dict__[name] = value


def prune(model: nn.Module, method: PruningMethod, record: bool = False) -> Run:
    """Prune a model within a ``with`` block; afterwards the model is exactly as before.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face LLaVA or LLaVA-NeXT model, or a bare Llama, Qwen2 or Mistral model (then pass
        ``visual_token_mask`` to its ``forward`` or ``generate``: ``(batch, length)`` bool, or int with the number of
        the image).
    method : PruningMethod
        What to prune, for example ``PyramidDrop(layers=(8, 16, 24), keep_ratios=(0.5, 0.25, 0.125))``.
    record : bool
        Keep scores and kept positions of every stage in ``run.records``.

    Returns
    -------
    Run
        The context manager; it may be entered again after it was left.

    Raises
    ------
    TypeError, ValueError
        If the model is not supported, is being pruned already, or the method does not fit its depth.
    """
    return Run(model, method, record)


def attach(model: nn.Module, method: PruningMethod, record: bool = False) -> Run:
    """Prune a model until `detach`. Parameters and errors as for `prune`."""
    run = Run(model, method, record)
    run.install()
    return run


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`; the model is exactly as before.

    Raises
    ------
    ValueError
        If nothing is attached to the model.
    """
    run = getattr(find_text_model(model), RUN_ATTRIBUTE, None)
    if run is None:
        raise ValueError(
            f"model: got a {type(model).__name__} to which nothing is attached, expected one given to pruneops.attach"
        )
    run.remove()
    return model


def find_text_model(model: nn.Module) -> nn.Module:
    """The supported text model inside `model` (through LLaVA, causal-LM heads, PEFT and DDP wrappers).

    Raises
    ------
    ValueError
        If there is none.
    """
    *_, text_model = _towards_text_model(model)
    return text_model


def _towards_text_model(model: nn.Module) -> Iterator[nn.Module]:
    """The modules from `model` inwards to its text model."""
    seen: set[int] = set()
    candidate: Any = model
    while isinstance(candidate, nn.Module):
        yield candidate
        if isinstance(candidate, SUPPORTED_TEXT_MODELS):
            return
        seen.add(id(candidate))
        # Submodules only: wrappers such as those of torch.compile and PEFT forward attributes of what they wrap, and
        # a look-up through them would step over the model with the head.
        inner = (candidate._modules.get(name) for name in _INWARDS)
        candidate = next((m for m in inner if m is not None and id(m) not in seen), None)
    names = ", ".join(cls.__name__ for cls in SUPPORTED_TEXT_MODELS)
    raise ValueError(f"model: got a {type(model).__name__}, expected one whose text model is one of {names}")
