"""Tiny models with Dynamic-LLaVA attached, and what they should compute, spelled out with masks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import tiny
import torch
from torch import Tensor, nn

import pruneops
from pruneops.methods import DynamicLlava
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.methods.dynamic_llava_predictors import TextPredictor
from pruneops.pruning import Run, find_text_model

SIZES = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "num_layers": 2}
METHOD = DynamicLlava(vision_keep_rate=0.3, **SIZES)
WITH_INSTRUCT = DynamicLlava(vision_keep_rate=0.3, use_instruct_predictor=True, **SIZES)
ROWS = [
    tiny.row(3, 1, 5, seed=1),
    tiny.row(2, 1, 9, seed=2),
    tiny.row(6, 0, 4, seed=3),
    tiny.row(1, 2, 3, seed=4),
]
#: In a bare language model the tokens of an image need embeddings of their own: these stand for image tokens.
PIXELS = range(100, 118)
#: What stays of 16 and of 32 image tokens.
KEPT_OF_16, KEPT_OF_32 = 4, 9


def language_row(ids: list[int], seed: int = 0) -> list[int]:
    """The row with other tokens in the place of its image placeholders."""
    generator = torch.Generator().manual_seed(seed)
    images = ids.count(tiny.IMAGE) // tiny.IMAGE_TOKENS
    orders = [torch.randperm(len(PIXELS), generator=generator)[: tiny.IMAGE_TOKENS] for _ in range(images)]
    pixels = iter(torch.cat(orders).tolist() if orders else [])
    return [PIXELS[next(pixels)] if token == tiny.IMAGE else token for token in ids]


def language_batch(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """A padded batch of such rows for a bare language model."""
    batch = tiny.pad([language_row(ids, seed=b) for b, ids in enumerate(rows)], side)
    return {**batch, "visual_token_mask": batch["input_ids"] >= PIXELS[0]}


def trained(model: nn.Module) -> nn.Module:
    """Predictors that like about half of all tokens."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for predictor in predictors_of(find_text_model(model)).values():
            for parameter in predictor.parameters():
                if parameter.dim() > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(2 * noise / math.sqrt(parameter.shape[1]))
            if isinstance(predictor, TextPredictor):
                last = predictor.output_mlp[-1]
                x = torch.randn(512, tiny.TEXT["hidden_size"], generator=generator).to(last.weight)
                last.bias[0] -= predictor(x).diff(dim=1).neg().median()
            else:  # far from where the float32 probability is 1
                predictor.output_mlp[-1].weight.mul_(0.1)
    return model


def attached(model: nn.Module, method: DynamicLlava = METHOD, record: bool = False) -> tuple[nn.Module, Run]:
    run = pruneops.attach(model, method, record)
    return trained(model), run


def by_hand(model: nn.Module) -> nn.Module:
    """A twin in float64 whose layers are Hugging Face's, with the predictors of `model`."""
    twin = copy.deepcopy(model)
    predictors = predictors_of(find_text_model(twin))
    pruneops.detach(twin)
    twin.set_attn_implementation("eager")
    for name, predictor in predictors.items():
        find_text_model(twin).add_module(name, predictor)
    return twin.double()


def image_logits(predictor: nn.Module, x: Tensor) -> Tensor:
    """The image predictor on the image tokens ``(n, hidden)`` of one row, with torch's own attention."""
    x = predictor.down_mlp(x)
    for block in predictor.transformer:
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, block.attn.nhead, -1).permute(1, 2, 0, 3)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + block.attn.proj(seen.transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
    half = x.shape[1] // 2
    return predictor.output_mlp(torch.cat([x[:, :half], x[:, half:].mean(0).expand(len(x), -1)], 1))


def judge(predictors: dict[str, nn.Module], name: str, x: Tensor, tokens: Sequence[int], keep: Tensor) -> None:
    """Let a predictor, if it is there, say which of some tokens are kept."""
    if name in predictors:
        logits = predictors[name].output_mlp(x[list(tokens)])
        keep[list(tokens)] = logits[:, 0] > logits[:, 1]


def reference(
    twin: nn.Module,
    method: DynamicLlava,
    ids: list[int],
    prompt: int,
    question: range | None = None,
    turn: range = range(0),
    asked: range | None = None,
) -> tuple[Tensor, list[int]]:
    """One row: a prompt of `prompt` tokens and what was generated behind it, but for a further `turn`, read at once.

    An instruct predictor judges the `question`, by default all behind the last image, and what is `asked` in the turn,
    by default all of it.

    Returns ``(tokens, vocabulary)`` logits and the tokens that the layers from the sparse one on keep.
    """
    text_model, n = twin.model, len(ids)
    predictors = predictors_of(text_model)
    visual = torch.tensor(ids) >= PIXELS[0]
    x = text_model.embed_tokens(torch.tensor([ids]))
    keep = torch.ones(n, dtype=torch.bool)
    of_turn = torch.zeros(n, dtype=torch.bool)
    of_turn[turn.start : turn.stop] = True
    position_embeddings = text_model.rotary_emb(x, torch.arange(n)[None])
    for i, layer in enumerate(text_model.layers):
        if i == method.sparse_layer:
            if visual.any():
                scores = image_logits(predictors["image_score_predictor"], x[0, visual]).log_softmax(-1)[:, 0]
                best = scores.argsort(descending=True, stable=True)[: int(int(visual.sum()) * method.vision_keep_rate)]
                keep[visual] = False
                keep[visual.nonzero()[best, 0]] = True
                behind = question or range(int(visual.nonzero()[-1]) + 1, prompt)
                judge(predictors, "instruct_score_predictor", x[0], behind[:-1], keep)
            generated = [t for t in range(prompt, n) if not of_turn[t]]
            judge(predictors, "output_text_score_predictor", x[0], generated, keep)
            judge(predictors, "instruct_score_predictor", x[0], (asked or turn)[:-1], keep)
        beside = torch.eye(n, dtype=torch.bool) | of_turn & of_turn[:, None]
        sees = torch.ones(n, n, dtype=torch.bool).tril() & (keep | beside)
        mask = torch.where(sees, 0.0, -math.inf).to(x.dtype)[None, None]
        x = layer(x, attention_mask=mask, position_embeddings=position_embeddings)
    return twin.lm_head(text_model.norm(x))[0], keep.nonzero()[:, 0].tolist()
