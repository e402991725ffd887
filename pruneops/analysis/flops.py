"""FLOPs of a decoder-only language model whose layers may each see a different number of tokens.

A multiply-add counts as **2** FLOPs (papers on visual-token pruning often count 1: halve these numbers to
compare). Counted: the projections and the gated MLP of every decoder layer, attention scores and their
product with the values (causal: only the pairs that are allowed), ``lm_head``, and the ranking before a
stage. Not counted: norms, rotary embedding, softmax, embedding look-up, the vision tower; together they are
below 1 % at LLaVA sizes, the tower excepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextShape:
    """The numbers of a text configuration that decide its cost."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: object) -> TextShape:
        """Reads a Hugging Face text config, or the text part of a multimodal one.

        Raises ``ValueError`` naming the entry that is missing. ``head_dim`` and ``num_key_value_heads`` may
        be absent or None and then mean ``hidden_size / num_attention_heads`` and ``num_attention_heads``.
        """
        if isinstance(config, cls):
            return config
        text = getattr(config, "text_config", None) or config
        values: dict[str, int] = {}
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        ):
            value = getattr(text, name, None)
            if not isinstance(value, int):
                raise ValueError(
                    f"text_config.{name} must be an integer, got {value!r} in {type(text).__name__}; "
                    "the cost model knows Llama-like decoders"
                )
            values[name] = value
        heads = values["num_attention_heads"]
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or values["hidden_size"] // heads
        return cls(num_key_value_heads=kv_heads, head_dim=head_dim, **values)

    @property
    def layer_weights(self) -> int:
        """Matrix weights of one layer: q, k, v, o and the three matrices of the gated MLP."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size


def causal_pairs(query_length: int, key_length: int) -> int:
    """Number of (query, key) pairs a bottom-right aligned causal mask allows."""
    if query_length <= 0 or key_length <= 0:
        return 0
    last = key_length
    first = max(0, key_length - query_length)
    # Query i sees first + i + 1 keys when there are at least as many keys as queries.
    rows = last - first
    return first * rows + rows * (rows + 1) // 2


def attention_flops(shape: TextShape, pairs: int) -> int:
    """FLOPs, in one layer, of the scores and their product with the values for ``pairs`` of query and key."""
    return 4 * shape.num_attention_heads * shape.head_dim * pairs


def layer_flops(config: object, tokens: int, key_length: int | None = None) -> int:
    """FLOPs of one decoder layer for one row.

    Parameters
    ----------
    config
        A Hugging Face text config or a :class:`TextShape`.
    tokens
        Tokens the layer is run on.
    key_length
        Keys the last token sees, the new ones included (default ``tokens``: a prefill). With a cache of n
        tokens it is ``n + tokens``.
    """
    shape = TextShape.from_config(config)
    keys = tokens if key_length is None else key_length
    return 2 * shape.layer_weights * tokens + attention_flops(shape, causal_pairs(tokens, keys))


def lm_head_flops(config: object, tokens: int) -> int:
    """FLOPs of the output projection for ``tokens`` tokens (generation needs it for one token a row)."""
    shape = TextShape.from_config(config)
    return 2 * shape.hidden_size * shape.vocab_size * tokens


def ranking_flops(config: object, tokens: int, query_rows: int = 1) -> int:
    """FLOPs of ranking one row before a stage: keys of all ``tokens`` tokens, queries of ``query_rows``,
    their scores.

    This is the cheap form (no value projection, no full query projection) that pruneops runs for PyramidDrop.
    """
    shape = TextShape.from_config(config)
    keys = 2 * shape.hidden_size * shape.num_key_value_heads * shape.head_dim * tokens
    queries = 2 * shape.hidden_size * shape.num_attention_heads * shape.head_dim * query_rows
    scores = 2 * shape.num_attention_heads * shape.head_dim * query_rows * tokens
    return keys + queries + scores


def router_flops(config: object, tokens: int) -> int:
    """FLOPs of a router that maps each of ``tokens`` tokens to one logit (p-MoD's weight predictor)."""
    return 2 * TextShape.from_config(config).hidden_size * tokens


def prefill_flops(
    config: object,
    layer_lengths: Sequence[Sequence[int]],
    *,
    lm_head: bool = True,
    ranked_layers: Sequence[int] = (),
) -> int:
    """FLOPs of a prefill.

    Parameters
    ----------
    layer_lengths
        ``layer_lengths[i][b]``: tokens of row b at layer i.
    lm_head
        Also count the output projection of the last token of every row.
    ranked_layers
        0-based layers that were preceded by a ranking. A row counts where it got shorter there.
    """
    shape = TextShape.from_config(config)
    total = sum(layer_flops(shape, tokens) for lengths in layer_lengths for tokens in lengths)
    if lm_head and layer_lengths:
        total += lm_head_flops(shape, len(layer_lengths[-1]))
    return total + sum(ranking_flops_by_layer(shape, layer_lengths, ranked_layers))


def ranking_flops_by_layer(
    config: object, layer_lengths: Sequence[Sequence[int]], ranked_layers: Sequence[int]
) -> list[int]:
    """FLOPs of the ranking that precedes each layer (0 for layers without one)."""
    shape = TextShape.from_config(config)
    result = [0] * len(layer_lengths)
    for layer in ranked_layers:
        if 0 < layer < len(layer_lengths):
            before, after = layer_lengths[layer - 1], layer_lengths[layer]
            result[layer] = sum(ranking_flops(shape, b) for b, a in zip(before, after, strict=True) if a < b)
    return result


def decode_flops(config: object, key_lengths: Sequence[Sequence[int]]) -> int:
    """FLOPs of one decoding step: one new token a row, ``lm_head`` included.

    ``key_lengths[i][b]``: tokens row b holds in the cache of layer i, the new one included.
    """
    shape = TextShape.from_config(config)
    total = sum(layer_flops(shape, 1, keys) for lengths in key_lengths for keys in lengths)
    return total + (lm_head_flops(shape, len(key_lengths[-1])) if key_lengths else 0)


def pyramid_lengths(
    num_hidden_layers: int,
    num_text_tokens: int,
    num_visual_tokens: int,
    layers: Sequence[int],
    keep_ratios: Sequence[float],
) -> list[int]:
    """Tokens of one row at every layer under PyramidDrop: ``int(n * ratio)`` visual tokens after a drop."""
    if len(layers) != len(keep_ratios):
        raise ValueError(f"keep_ratios must have one entry per layer, got {len(keep_ratios)} for {len(layers)} layers")
    stages = dict(zip(layers, keep_ratios, strict=True))
    lengths, visual = [], num_visual_tokens
    for layer in range(num_hidden_layers):
        if layer in stages:
            visual = int(num_visual_tokens * stages[layer])
        lengths.append(num_text_tokens + visual)
    return lengths
