"""`prune`, `attach` and `detach`: give a Hugging Face model the ragged decoder, and take it away again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, LlamaModel, MistralModel, PreTrainedModel, Qwen2Model

from pruneops import stand_ins
from pruneops.decoder import ATTENTION_NAME, Record, Trace
from pruneops.media import MediaNotes
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
    given_method : PruningMethod
        The method as it was given: ``layers=None`` stays None and fits another depth later.
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
        config = (self._multimodal or self._text_model).config
        self.given_method = method
        self.method = method.for_model(self._text_model.config.num_hidden_layers, config)
        self.trace = Trace(record=record)
        self._saved: list[tuple[nn.Module, str, Any]] = []
        # Notes of the stand-ins on the call under way: its images and videos, whether generate() runs, the columns of
        # its prompt, and whether its caller gave it positions.
        self.notes = MediaNotes()
        self.generating = False
        self.prompt_length: int | None = None
        self.positions_given = False

    @property
    def records(self) -> list[Record]:
        return self.trace.records

    @property
    def layer_lengths(self) -> list[list[int]]:
        return self.trace.layer_lengths

    @property
    def layer_seconds(self) -> list[float]:
        return self.trace.layer_seconds

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """What the method adds to the loss, of the latest pass in training, unless the model has added it already."""
        return self.trace.auxiliary_loss

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
            ranked_layers=self.method.ranked_layers,
            dense_lengths=self.trace.dense_lengths,
            kv_lengths=self.trace.kv_lengths,
        )

    # -- patching ----------------------------------------------------------------------------------------------------

    def _patched_modules(self) -> list[nn.Module]:
        return [m for m in (self._text_model, self._multimodal, self._head) if m is not None]

    def __enter__(self) -> Run:
        self.install()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def install(self, add_modules: bool = False) -> None:
        for module in self._patched_modules():
            if getattr(module, RUN_ATTRIBUTE, None) is not None:
                raise ValueError(
                    f"model: got a {type(module).__name__} that is already pruned by "
                    f"{getattr(module, RUN_ATTRIBUTE).method}, expected one that is not; leave the other "
                    "`with pruneops.prune(...)` block or call pruneops.detach(model) first"
                )
        layers = list(self._text_model.layers)
        if add_modules:
            PruningMethod.check_modules(self.method, self._text_model)  # before anything is put in
            self.method.prepare(self._text_model)
        try:
            self.method.check_modules(self._text_model)
        except ValueError:
            if list(self._text_model.layers) != layers:
                self.method.restore(self._text_model)
            raise
        for module in self._patched_modules():
            self._set(module, RUN_ATTRIBUTE, self)
        self._replace(self._text_model, "forward", stand_ins.text_forward)
        if self._multimodal is not None:
            self._replace(self._multimodal, "forward", stand_ins.multimodal_forward)
            self._replace(self._multimodal, "get_placeholder_mask", stand_ins.get_placeholder_mask)
            for name in ("get_image_features", "get_video_features"):
                if hasattr(type(self._multimodal), name):
                    self._replace(self._multimodal, name, getattr(stand_ins, name))
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "model: got a model that is being pruned to pickle, expected one that is not; save its state_dict(), use "
            "save_pretrained(), or call pruneops.detach(model) first"
        )

    def check_modules(self, missing_keys: Iterable[str]) -> None:
        """`PruningMethod.check_modules` for the model."""
        self.method.check_modules(self._text_model, missing_keys)

    def take_modules_out(self) -> None:
        """Undo what ``install(add_modules=True)`` does beyond `install`."""
        self.method.restore(self._text_model)

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
        A Hugging Face LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision or Video-LLaVA model, a
        `pruneops.models.PllavaForConditionalGeneration`, or a bare Llama, Qwen2 or Mistral model (then pass
        ``visual_token_mask`` to its ``forward`` or ``generate``: ``(batch, length)`` bool, or int with the number of
        the image or video, and for videos ``num_frames``: the frames of each in order of appearance in the batch).
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
        If the model is not supported, is being pruned already, or the method does not fit its depth; if the method is
        trainable (`PMoD`, `DynamicLlava`) and the model does not carry its modules, which `attach` puts in.
    """
    return Run(model, method, record)


def attach(model: nn.Module, method: PruningMethod, record: bool = False) -> Run:
    """Prune a model until `detach`; a trainable method (`PMoD`, `DynamicLlava`) puts its modules in.

    Otherwise as `prune`.

    Modules that are there already, for example because the model was loaded with them, are used as they are.
    """
    run = Run(model, method, record)
    run.install(add_modules=True)
    return run


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`; the model is exactly as before. Modules of a trainable method are taken out.

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
    run.take_modules_out()
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
