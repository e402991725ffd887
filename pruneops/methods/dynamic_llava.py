"""Dynamic-LLaVA: keep the image tokens, and while generating the text tokens, that learned predictors ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import nn

from pruneops.decoder import DecoderState, Positions
from pruneops.methods.base import PruningMethod
from pruneops.methods.dynamic_llava_inference import prune_text_and_images, record_kept
from pruneops.methods.dynamic_llava_predictors import (
    IMAGE,
    INSTRUCT,
    OUTPUT_TEXT,
    ImagePredictor,
    Predictor,
    TextPredictor,
    predictors_of,
)
from pruneops.methods.dynamic_llava_training import EPSILON, MaskDraw, warn_of_a_cache, warn_of_missing_labels
from pruneops.methods.mod_layer import check_finite

_FLAGS = ("use_vision_predictor", "use_text_predictor", "use_output_text_predictor", "use_instruct_predictor")
_RATES = ("vision_keep_rate", "output_text_keep_rate", "instruct_keep_rate")
_LENGTHS = ("output_text_len_for_training", "instruct_len_for_training")
_SIZES = ("sparse_layer", "d_model", "nhead", "dim_feedforward", "num_layers")
#: Fields that the official config does not have: the Trainer's business there, or a constant of the code.
_NOT_OFFICIAL = ("gumbel_start_tau", "gumbel_end_tau", "question_start")
#: "USER:" for the tokenizer of Vicuna.
_OFFICIAL_QUESTION_START = (11889, 29901)


@dataclass(frozen=True)
class DynamicLlava(PruningMethod):
    """Dynamic-LLaVA (Huang et al., "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic
    Vision-language Context Sparsification", arXiv 2412.00876).

    Predictors look at the hidden states that enter one decoder layer, `sparse_layer`, and decide once for it and all
    layers above. Of a row's n image tokens the ``int(n * vision_keep_rate)`` with the highest probability stay. While
    generating, every new token goes through all layers and sees itself, but its keys and values stay in the caches of
    these layers only if the output-text predictor says so. Tokens keep their original positions. All images of a row
    share one pool. Text of the prompt stays, unless there is an instruct predictor.

    The method is trainable: `pruneops.attach` puts the predictors into the text model under their official names,
    ``image_score_predictor``, ``output_text_score_predictor`` and ``instruct_score_predictor``; `pruneops.detach` takes
    them out.

    Parameters
    ----------
    vision_keep_rate : float
        Share of a row's image tokens that stays, in [0, 1].
    output_text_keep_rate, instruct_keep_rate : float
        Training only: shares that the mask losses draw the decisions on text to.
    output_text_len_for_training, instruct_len_for_training : int
        Training only: shorter answers and questions are kept whole.
    use_vision_predictor, use_text_predictor, use_output_text_predictor, use_instruct_predictor : bool
        Which predictors there are; the latter two only with `use_text_predictor`.
    sparse_layer : int
        The layer, counted from 0, before which the predictors decide; at least 1.
    d_model, nhead, dim_feedforward, num_layers : int
        Sizes of the predictors; the latter three of the image predictor's blocks.
    mask_loss_weight : float
    gumbel_start_tau, gumbel_end_tau : float
        Temperatures of the draws at the first and the last training step (`pruneops.training.GumbelTemperature`).
    question_start : sequence of int, optional
        Only of use with an instruct predictor: the tokens that begin a question in a conversation of several turns, for
        LLaVA 1.5 ``tokenizer("USER:", add_special_tokens=False).input_ids``. None: not known.

    Notes
    -----
    *Segments.* A row is text, images, question and answer. With labels the answer is the last supervised stretch;
    without, the question ends with the prompt. The question begins at the last `question_start` behind the row's last
    image and, with labels, behind the answer before. Where none is found, it begins right behind these. So the turns
    before the last one stay whole, but for a prompt of several turns that is read in one piece without labels and
    without a `question_start`: there all text behind the last image is judged as the question. Tokens are looked for
    in ``input_ids``; a call with ``inputs_embeds`` only has none, and warns.

    *Labels on image tokens* do not count: they are no part of an answer and not in the loss.

    *Logits.* The first column is keep, the second drop, as in the official code (the paper has them the other way).
    Decisions on text compare the two; a draw adds Gumbel noise first.

    *Ranking* of image tokens is by the float32 log-probability of keeping, ties go to the lowest index.

    *Instruct predictor.* At the prompt, tokens of the question that it does not keep are dropped before `sparse_layer`;
    the last token of the question always stays. In a further chunk on the cache all text is seen within the chunk, and
    of its question, with images or without, what it does not keep is not stored, apart from each row's last token; if
    `question_start` is None, the same goes for all text of the chunk. A row without images keeps its prompt.

    *Further turns*: images of the new chunk are ranked within the chunk; earlier turns are never revisited. Text of a
    chunk is stored whole without an instruct predictor. A chunk of one column is a decoding step.

    *Without a cache* (``use_cache=False``) `generate` decides about its earlier tokens as with a cache: those that are
    not kept are dropped before `sparse_layer`, except the newest, and the results are the same. When the model is
    called directly, columns behind those of a shorter ``visual_token_mask`` count as generated. The official code keeps
    in every row as many tokens as in the row that keeps most, ranks them by the keep logit alone, repeats the last
    prompt token in the first step, and remembers where the first prompt of a model object ended.

    *Training* (train mode, no cache): nothing is dropped. Gumbel draws (straight-through) make a policy over the tokens
    that masks keys in the layers from `sparse_layer` on (`pruneops.ops.policy_attention`), and the mask losses are
    added to the loss of the model. Without labels in the call there is a warning: questions and answers are not drawn
    on, and the mask losses are left in ``run.auxiliary_loss``. A cache is of no use in training: with labels
    ``use_cache=True`` is ignored, with a warning; without them it means inference.

    *Evaluation* (labels in evaluation mode): the answers' tokens are masked as their decisions say, so the loss is that
    of generating them. It takes the whole text in one call; labels on a filled cache are refused.

    *Beam search* works with any number of images a row. But LLaVA's stock `generate` repeats the images of a batch one
    by one, not row by row, for the beams: with several images in a row LLaVA itself, pruned or not, then looks at the
    wrong ones.

    *Where the official code fails or is limited* (padding, which it knows in layer 0 only; zeros in the caches of
    shorter rows, which it attends to; the first row's image place for all rows; equally many image tokens in every
    row; one image place a row; beam search; empty answers, whose loss is NaN; attention other than SDPA; loss in
    evaluation mode) this does what the paper means.

    Raises
    ------
    TypeError, ValueError
        For values that break the rules above.
    """

    vision_keep_rate: float = 0.2
    output_text_keep_rate: float = 0.5
    output_text_len_for_training: int = 50
    use_vision_predictor: bool = True
    use_text_predictor: bool = True
    use_output_text_predictor: bool = True
    use_instruct_predictor: bool = False
    instruct_keep_rate: float = 0.7
    instruct_len_for_training: int = 25
    sparse_layer: int = 2
    d_model: int = 512
    nhead: int = 8
    dim_feedforward: int = 2048
    num_layers: int = 2
    mask_loss_weight: float = 100.0
    gumbel_start_tau: float = 1.0
    gumbel_end_tau: float = 0.1
    question_start: Sequence[int] | None = None

    name: ClassVar[str] = "dynamic_llava"
    positions: ClassVar[Positions] = Positions.GIVEN
    asks_labels: ClassVar[bool] = False
    judges_answers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field}: got {getattr(self, field)!r}, expected a bool")
        for field in (*_LENGTHS, *_SIZES):
            value = getattr(self, field)
            if type(value) is not int:
                raise TypeError(f"{field}: got {value!r}, expected a whole number")
            if value < (field in _SIZES and field != "num_layers"):
                raise ValueError(f"{field}: got {value}, expected at least {int(field in _SIZES)}")
        for field in (*_RATES, "mask_loss_weight", "gumbel_start_tau", "gumbel_end_tau"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{field}: got {value!r}, expected a number")
            object.__setattr__(self, field, float(value))
        for field in _RATES:
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}: got {getattr(self, field)}, expected a share in [0, 1]")
        if not 0 <= self.mask_loss_weight < float("inf"):
            raise ValueError(f"mask_loss_weight: got {self.mask_loss_weight}, expected a number of at least 0")
        for field in ("gumbel_start_tau", "gumbel_end_tau"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field}: got {getattr(self, field)}, expected a number above 0")
        if self.d_model % 4 or self.d_model % self.nhead or self.d_model // self.nhead > 256:
            raise ValueError(
                f"d_model, nhead: got {self.d_model} and {self.nhead}, expected a multiple of 4 and of nhead with at "
                "most 256 channels a head"
            )
        if self.question_start is not None:
            object.__setattr__(self, "question_start", _checked_tokens(self.question_start))
        if not self._wanted:
            raise ValueError(f"{', '.join(_FLAGS)}: got no predictor, expected at least one")

    @classmethod
    def from_official(cls, sparse_config: Mapping[str, Any]) -> DynamicLlava:
        """The method of an official config.

        Parameters
        ----------
        sparse_config : mapping
            The official ``sparse_config``, or a whole config that has it; its keys are the fields of the method. Keys
            that are missing have the published values, other keys are ignored. With an instruct predictor,
            `question_start` is what the official code looks for: "USER:" as Vicuna's tokenizer has it.

        Raises
        ------
        TypeError, ValueError
            If the mapping does not describe a Dynamic-LLaVA model.
        """
        if not isinstance(sparse_config, Mapping):
            raise TypeError(f"sparse_config: got {type(sparse_config).__name__}, expected a mapping")
        values = sparse_config.get("sparse_config", sparse_config)
        if not isinstance(values, Mapping) or "sparse_layer" not in values:
            raise ValueError(f"sparse_config: got {values!r}, expected a mapping with sparse_layer")
        official = [field.name for field in fields(cls) if field.name not in _NOT_OFFICIAL]
        method = cls(**{name: values[name] for name in official if values.get(name) is not None})
        return replace(method, question_start=_OFFICIAL_QUESTION_START) if INSTRUCT in method._wanted else method

    def to_official(self) -> dict[str, Any]:
        """The official ``sparse_config`` of the method; it says nothing of temperatures and `question_start`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_OFFICIAL}

    def for_depth(self, num_layers: int) -> DynamicLlava:
        if self.sparse_layer >= num_layers:
            raise ValueError(
                f"sparse_layer: got {self.sparse_layer}, expected at most {num_layers - 1}: the model has {num_layers} "
                "layers"
            )
        return self

    @property
    def sought_tokens(self) -> tuple[int, ...] | None:
        return self.question_start if INSTRUCT in self._wanted else None

    # -- modules -----------------------------------------------------------------------------------------------------

    @property
    def _wanted(self) -> list[str]:
        """Names of the predictors that there are, in the order of their draws."""
        wanted = {
            IMAGE: self.use_vision_predictor,
            OUTPUT_TEXT: self.use_text_predictor and self.use_output_text_predictor,
            INSTRUCT: self.use_text_predictor and self.use_instruct_predictor,
        }
        return [name for name, flag in wanted.items() if flag]

    def _new(self, name: str, hidden_size: int, **factory: Any) -> Predictor:
        if name == IMAGE:
            sizes = self.d_model, self.nhead, self.dim_feedforward, self.num_layers
            return ImagePredictor(hidden_size, *sizes, **factory)
        return TextPredictor(hidden_size, self.d_model, **factory)

    def predictor_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the predictors' parameters, as in the text model, for hidden states of that width."""
        return {
            f"{name}.{key}": tuple(weight.shape)
            for name in self._wanted
            for key, weight in self._new(name, hidden_size, device="meta").named_parameters()
        }

    def prepare(self, text_model: nn.Module) -> None:
        if predictors_of(text_model):
            return  # check_modules says whether they fit
        norm, config = text_model.norm.weight, text_model.config
        for name in self._wanted:
            predictor = self._new(name, norm.shape[0], device=norm.device, dtype=norm.dtype)
            if not norm.is_meta:
                predictor.initialise(config.initializer_range)
            predictor.gumbel_tau = self.gumbel_start_tau
            text_model.add_module(name, predictor.train(text_model.training))

    def restore(self, text_model: nn.Module) -> None:
        for name in predictors_of(text_model):
            delattr(text_model, name)

    def check_modules(self, text_model: nn.Module, missing_keys: Iterable[str] = ()) -> None:
        super().check_modules(text_model)
        there = predictors_of(text_model)
        if not there:
            raise ValueError(
                "model: carries no predictors, which DynamicLlava needs because they are trained; use "
                "pruneops.attach(model, method), which puts them in"
            )
        if list(there) != self._wanted:
            raise ValueError(
                f"use_*_predictor: got {', '.join(self._wanted)}, expected {', '.join(there)}, which the model "
                "carries; call pruneops.detach(model) first to start with new predictors"
            )
        for name, predictor in there.items():
            expected = self._new(name, text_model.norm.weight.shape[0], device="meta")
            if _make_up(expected) != _make_up(predictor):
                raise ValueError(
                    f"d_model, nhead, dim_feedforward, num_layers: got {self.d_model}, {self.nhead}, "
                    f"{self.dim_feedforward} and {self.num_layers}, which does not give the {name} that the model "
                    "carries; call pruneops.detach(model) first to start with new predictors"
                )
        missing = [key for key in missing_keys if any(f"{name}." in key for name in there)]
        if missing:
            raise ValueError(
                f"checkpoint: has no weights for {len(missing)} of the predictors' parameters, the first of them "
                f"{missing[0]}, although its config says {self}; expected one that was saved with DynamicLlava attached"
            )
        check_finite(
            (f"{name}.{key}", weight) for name, module in there.items() for key, weight in module.named_parameters()
        )

    # -- a pass ------------------------------------------------------------------------------------------------------

    def before_layer(self, i: int, layer: nn.Module, state: DecoderState) -> None:
        if i != self.sparse_layer:
            return
        predictors = predictors_of(state.text_model)
        if state.text_model.training and state.cache is None:
            self._draw_masks(predictors, state)
            return
        if state.text_model.training and torch.is_grad_enabled() and not state.decoding:
            warn_of_a_cache()
        with torch.no_grad():
            if state.decoding:
                if OUTPUT_TEXT in predictors:
                    state.keep_in_cache(predictors[OUTPUT_TEXT].keeps(state.batch.values))
                return
            prune_text_and_images(self, predictors, state)

    def _draw_masks(self, predictors: dict[str, Predictor], state: DecoderState) -> None:
        """Training: decisions become a policy over the keys, outside of the layers that checkpointing runs again."""
        draw, scores = MaskDraw(self, state), [state.batch.values.new_empty(0)] * state.batch.batch_size
        if not draw.labelled:
            warn_of_missing_labels()
        if IMAGE in predictors:
            scores = draw.images(predictors[IMAGE])
        if OUTPUT_TEXT in predictors:
            draw.answers(predictors[OUTPUT_TEXT])
        if INSTRUCT in predictors:
            draw.questions(predictors[INSTRUCT])
        state.mask_keys(draw.policy, EPSILON)
        state.trace.auxiliary_loss = self.mask_loss_weight * draw.loss
        if state.trace.record:
            record_kept(state, 0, scores, draw.policy > 0.5)


def _make_up(predictor: nn.Module) -> tuple[dict[str, torch.Size], list[int]]:
    """Shapes of the weights, and heads of the blocks, of a predictor."""
    heads = [block.attn.nhead for block in getattr(predictor, "transformer", ())]
    return {name: weight.shape for name, weight in predictor.named_parameters()}, heads


def _checked_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    whole = isinstance(tokens, Sequence) and not isinstance(tokens, (str, bytes))
    if not whole or not all(type(token) is int for token in tokens):
        raise TypeError(f"question_start: got {tokens!r}, expected a sequence of token ids, or None")
    if not tokens or min(tokens) < 0:
        raise ValueError(f"question_start: got {tokens!r}, expected at least one token id of at least 0, or None")
    return tuple(tokens)
