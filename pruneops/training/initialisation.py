"""Weights that attention begins with when a small language model is trained from nothing."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def match_and_copy(language_model: Any) -> None:
    """Begin with attention that looks for what is like the token itself, and hands on what it finds.

    Keys are made with the weights of the queries, and the output projection is the transpose of that of the values: a
    head scores tokens by their likeness within the subspace that it reads, and adds what it read there. To answer from
    features that are named in the model's own words, a token "circle" has to find the patches with a circle; from
    independent random weights, that alone takes hundreds of steps. (Trockman and Kolter, "Mimetic Initialization of
    Self-Attention Layers", arXiv 2305.09828: trained attention is close to this, and beginning there helps where data
    is scarce.)

    Parameters
    ----------
    language_model : transformers.LlamaModel
        Or another with ``layers`` whose ``self_attn`` has ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``; of query
        heads that share a key head, the first gives it its weights.
    """
    for layer in language_model.layers:
        attention = layer.self_attn
        width, group = attention.head_dim, attention.num_key_value_groups
        queries = attention.q_proj.weight.unflatten(0, (-1, group, width))
        attention.k_proj.weight.copy_(queries[:, 0].flatten(0, 1))
        values = attention.v_proj.weight.unflatten(0, (-1, 1, width)).expand(-1, group, -1, -1)
        attention.o_proj.weight.copy_(values.flatten(0, 2).T)
