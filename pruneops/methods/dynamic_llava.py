"""Dynamic-LLaVA: keep the image tokens, and while generating the text tokens, that learned predictors ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruneops.decoder import DecoderState, Positions, Record
from pruneops.methods.base import PruningMethod
from pruneops.methods.dynamic_llava_predictors import KEEP, ImagePredictor, Predictor, TextPredictor
from pruneops.methods.dynamic_llava_segments import Range, Segments, tokens_of, tokens_within
from pruneops.methods.dynamic_llava_training import EPSILON, MaskDraw, warn_of_missing_labels
from pruneops.methods.mod_layer import check_finite
from pruneops.methods.mod_route import Targets
from pruneops.ragged import Span

IMAGE, OUTPUT_TEXT, INSTRUCT = "image_score_predictor", "output_text_score_predictor", "instruct_score_predictor"
_FLAGS = ("use_vision_predictor", "use_text_predictor", "use_output_text_predictor", "use_instruct_predictor")
_RATES = ("vision_keep_rate", "output_text_keep_rate", "instruct_keep_rate")
_LENGTHS = ("output_text_len_for_training", "instruct_len_for_training")
_SIZES = ("sparse_layer", "d_model", "nhead", "dim_feedforward", "num_layers")
#: Fields that are the Trainer's business in the official code.
_NOT_OFFICIAL = ("gumbel_start_tau", "gumbel_end_tau")
#: Of the evaluation with labels, where a softmax over what was kept must not see anything else.
_NO_LEAK = 1e-20


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

    Notes
    -----
    *Segments.* A row is text, images, question (everything behind its last image) and answer. With labels the answer is
    the last supervised stretch and the question begins behind the stretch before it, if there is one; earlier answers
    of a conversation are never sparsified. Without labels the question ends with the prompt.

    *Logits.* The first column is keep, the second drop, as in the official code (the paper has them the other way).
    Decisions on text compare the two; a draw adds Gumbel noise first.

    *Ranking* of image tokens is by the float32 log-probability of keeping, ties go to the lowest index.

    *Instruct predictor.* At the prompt, tokens of the question that it does not keep are dropped before `sparse_layer`;
    the last token of the question always stays. In a further chunk on the cache all text is seen within the chunk, and
    what it does not keep, apart from each row's last token, is not stored. A row without images keeps its prompt.

    *Further turns*: images of the new chunk are ranked within the chunk; earlier turns are never revisited. Text of a
    chunk is stored whole without an instruct predictor. A chunk of one column is a decoding step.

    *Without a cache* (``use_cache=False``) `generate` decides about its earlier tokens as with a cache: those that are
    not kept are dropped before `sparse_layer`, except the newest, and the results are the same. When the model is
    called directly, columns behind those of a shorter ``visual_token_mask`` count as generated. The official code keeps
    in every row as many tokens as in the row that keeps most, ranks them by the keep logit alone, repeats the last
    prompt token in the first step, and remembers where the first prompt of a model object ended.

    *Training* (train mode, no cache): nothing is dropped. Gumbel draws (straight-through) make a policy over the tokens
    that masks keys in the layers from `sparse_layer` on (`pruneops.ops.policy_attention`), and the mask losses are
    added to the loss of the model (without labels in the call they are in ``run.auxiliary_loss``). In evaluation mode
    with labels, the answers' tokens are masked as their decisions say, so the loss is that of generating them.

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

    name: ClassVar[str] = "dynamic_llava"
    positions: ClassVar[Positions] = Positions.GIVEN
    asks_labels: ClassVar[bool] = False

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
        if not self._wanted:
            raise ValueError(f"{', '.join(_FLAGS)}: got no predictor, expected at least one")

    @classmethod
    def from_official(cls, sparse_config: Mapping[str, Any]) -> DynamicLlava:
        """The method of an official config.

        Parameters
        ----------
        sparse_config : mapping
            The official ``sparse_config``, or a whole config that has it; its keys are the fields of the method. Keys
            that are missing have the published values, other keys are ignored.

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
        return cls(**{name: values[name] for name in official if values.get(name) is not None})

    def to_official(self) -> dict[str, Any]:
        """The official ``sparse_config`` of the method."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_OFFICIAL}

    def for_depth(self, num_layers: int) -> DynamicLlava:
        if self.sparse_layer >= num_layers:
            raise ValueError(
                f"sparse_layer: got {self.sparse_layer}, expected at most {num_layers - 1}: the model has {num_layers} "
                "layers"
            )
        return self

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
        with torch.no_grad():
            if state.decoding:
                if OUTPUT_TEXT in predictors:
                    state.keep_in_cache(predictors[OUTPUT_TEXT].keeps(state.batch.values))
                return
            self._prune_prompt(predictors, state)

    def _draw_masks(self, predictors: dict[str, Predictor], state: DecoderState) -> None:
        """Training: decisions become a policy over the keys, outside of the layers that checkpointing runs again."""
        draw, scores = MaskDraw(self, state), [state.batch.values.new_empty(0)] * state.batch.batch_size
        if OUTPUT_TEXT in predictors and not draw.labelled:
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
            _record(state, 0, scores, draw.policy > 0.5)

    def _prune_prompt(self, predictors: dict[str, Predictor], state: DecoderState) -> None:
        whole, further = state.batch, state.cache is not None and state.cache.get_seq_length() > 0
        targets, segments = Targets.of_images(whole, 0), Segments.of(whole)
        if IMAGE in predictors and targets is not None:
            self._prune_images(predictors[IMAGE], targets, state)
        # What may be dropped, by whom; the last token of a range stays whatever the predictor says.
        ranges = {}
        if not further:
            ranges[INSTRUCT] = segments.questions
        if state.cache is None and not segments.labelled:
            ranges[OUTPUT_TEXT] = segments.answers  # what generate() has made so far
        self._drop_text({predictors[name]: ranges[name] for name in ranges if name in predictors}, state)
        if INSTRUCT in predictors and further:
            _store_wanted(predictors[INSTRUCT], targets, state)
        elif OUTPUT_TEXT in predictors and segments.labelled and not further:
            _mask_answers(predictors[OUTPUT_TEXT], segments, state)

    def _drop_text(self, ranges: dict[TextPredictor, list[Range]], state: DecoderState) -> None:
        """Drop tokens that their predictor does not keep. Reads back how many stay, if any may go."""
        batch, keep = state.batch, None
        for predictor, row_ranges in ranges.items():
            indices, _ = tokens_within([(start, max(stop - 1, start)) for start, stop in row_ranges], batch)
            if indices.numel():
                keep = torch.ones_like(batch.row_ids, dtype=torch.float32) if keep is None else keep
                keep.index_copy_(0, indices, predictor.keeps(batch.values.index_select(0, indices)).float())
        if keep is None:
            return
        counts = keep.new_zeros(batch.batch_size).index_add_(0, batch.row_ids, keep).int().tolist()
        shorter, _ = batch.best_of_rows(keep, counts, None, [0] * batch.batch_size)
        state.batch = shorter.with_spans(
            [
                [replace(spans[-1], length=n, visual=min(spans[-1].visual, n))]
                for n, spans in zip(counts, batch.spans, strict=True)
            ]
        )
        if state.trace.record:
            _record(state, 1, [batch.values.new_empty(0, dtype=torch.float32)] * batch.batch_size)

    def _prune_images(self, predictor: ImagePredictor, targets: Targets, state: DecoderState) -> None:
        batch = state.batch
        keep = [int(n * self.vision_keep_rate) for n in targets.counts]
        if keep == targets.counts and not state.trace.record:
            return
        indices = tokens_of(targets.mask, targets.counts, batch)
        logits = predictor(batch.values.index_select(0, indices), targets.counts)
        scores = logits.float().log_softmax(-1)[:, KEEP]
        everywhere = scores.new_zeros(batch.values.shape[0]).index_copy_(0, indices, scores)
        shorter, _ = batch.best_of_rows(everywhere, keep, targets.others, targets.other_counts)
        state.batch = shorter.with_spans(
            [
                # One span a row: that of an image if the row ends with one.
                [Span(1, n, k, count) if spans[-1].image else Span(0, n, 0, 0)]
                for n, k, count, spans in zip(shorter.lengths, keep, targets.counts, batch.spans, strict=True)
            ]
        )
        if state.trace.record:
            _record(state, 0, list(scores.split(targets.counts)))


def predictors_of(text_model: nn.Module) -> dict[str, Predictor]:
    """The predictors of a text model by name, in the order of their draws."""
    return {name: getattr(text_model, name) for name in (IMAGE, OUTPUT_TEXT, INSTRUCT) if hasattr(text_model, name)}


def _store_wanted(predictor: TextPredictor, targets: Targets | None, state: DecoderState) -> None:
    """A further chunk: the instruct predictor decides which of its text is stored, besides the last of every row."""
    batch = state.batch
    keep = predictor.keeps(batch.values)
    if targets is not None:
        keep |= targets.mask.index_select(0, batch.origin)
    keep |= batch.offsets + 1 == batch.cu_seqlens.diff().index_select(0, batch.row_ids)
    state.keep_in_cache(keep)


def _mask_answers(predictor: TextPredictor, segments: Segments, state: DecoderState) -> None:
    """Evaluation with labels: every token of an answer sees what was kept before it, as in decoding."""
    batch = state.batch
    indices, _ = tokens_within(segments.answers, batch)
    if not indices.numel():
        return
    keep = torch.ones_like(batch.row_ids, dtype=torch.bool)
    keep.index_copy_(0, indices, predictor.keeps(batch.values.index_select(0, indices)))
    state.mask_keys(keep.float(), _NO_LEAK)
    if state.cache is not None:
        state.keep_in_cache(keep)


def _make_up(predictor: nn.Module) -> tuple[dict[str, torch.Size], list[int]]:
    """Shapes of the weights, and heads of the blocks, of a predictor."""
    heads = [block.attn.nhead for block in getattr(predictor, "transformer", ())]
    return {name: weight.shape for name, weight in predictor.named_parameters()}, heads


def _record(state: DecoderState, stage: int, scores: list[Tensor], kept: Tensor | None = None) -> None:
    """Per row the scores of its image tokens, and the tokens that are left, or of them those ``kept`` ``(total,)``."""
    batch, start = state.batch, 0
    for b in batch.rows:
        row = slice(start, start + batch.lengths[b])
        origin = batch.origin[row] if kept is None else batch.origin[row][kept[row]]
        positions = origin - batch.entry.cu_seqlens_host[b]
        state.trace.records.append(Record(stage, b, len(state.trace.layer_lengths), scores[b], positions))
        start = row.stop
