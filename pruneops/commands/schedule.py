"""``pruneops schedule``: what a method's schedule keeps, computes and stores at every layer of a model."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from pruneops.commands.arguments import not_negative, positive

if TYPE_CHECKING:
    from pruneops.analysis import TextShape
    from pruneops.methods import PMoD

TEXT = """\
Prints, for every decoder layer, the share and number of an image's tokens that the
layer processes, its FLOPs (2 per multiply-add, one prompt) and the bytes of keys and
values that it stores, then the means and the shares of the model without the method.
No model is loaded. The sizes are those of a 7B Llama unless they are given.
"""
EXAMPLES = """\
examples:
  pruneops schedule pmod --layers 32
  pruneops schedule pmod --layers 32 --image-tokens 2880 --text-tokens 64
  pruneops schedule pmod --layers 40 --hidden 5120 --intermediate 13824 --heads 40 --kv-heads 40
  pruneops schedule pmod --layers 32 --schedule interleave --router-factor 0.34
"""


def add_parser(commands: Any) -> None:
    """Describe the command to the parser of all commands."""
    parser = commands.add_parser(
        "schedule",
        help="show what a method keeps at every layer, and what that costs",
        description=TEXT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", choices=["pmod"], help="the method")
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=positive, required=True, metavar="N", help="decoder layers of the model")
    for name, default, what in (
        ("--hidden", 4096, "hidden size"),
        ("--intermediate", 11008, "intermediate size of the MLP"),
        ("--heads", 32, "attention heads"),
    ):
        model.add_argument(name, type=positive, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    model.add_argument("--kv-heads", type=positive, metavar="N", help="key and value heads (default: as --heads)")
    model.add_argument("--head-dim", type=positive, metavar="N", help="size of a head (default: hidden size / heads)")
    model.add_argument("--dtype", default="bfloat16", help="dtype of keys and values (default: %(default)s)")

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--image-tokens",
        type=positive,
        default=576,
        metavar="N",
        help="tokens of all images together (default: %(default)s, one image of LLaVA 1.5)",
    )
    prompt.add_argument(
        "--text-tokens",
        type=not_negative,
        default=0,
        metavar="N",
        help="text tokens, which every layer processes (default: %(default)s, image tokens only, as papers count)",
    )

    pmod = parser.add_argument_group("p-MoD")
    pmod.add_argument(
        "--schedule",
        metavar="NAME",
        help="{shiftedcos|shiftedlinear}_decay_MAX_MIN, deep_all, deep_all_include_last or interleave "
        "(default: the published one)",
    )
    pmod.add_argument("--router-factor", type=float, metavar="R", help="its constant (default: the published one)")
    pmod.add_argument(
        "--parity",
        action="store_true",
        help="the official code's constant 31 for the depth of every model; without it, the number of layers - 1",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(action=run)


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from pruneops.analysis import TextShape, dtype_bytes
    from pruneops.methods import PMoD

    dtype_bytes(options.dtype)  # refuses what is not one
    if options.head_dim is None and options.hidden % options.heads:
        raise ValueError(f"--hidden: got {options.hidden}, expected a multiple of --heads ({options.heads})")
    fields = {"layers": options.schedule, "router_factor": options.router_factor}
    method = PMoD(parity=options.parity, **{key: value for key, value in fields.items() if value is not None})
    method = method.for_depth(options.layers)
    shape = TextShape(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads or options.heads,
        head_dim=options.head_dim or options.hidden // options.heads,
        vocab_size=1,
    )
    document = pmod_schedule(method, shape, options.image_tokens, options.text_tokens, options.dtype)
    print(json.dumps(document, indent=1) if options.json else _table(document))
    return 0


def pmod_schedule(method: PMoD, shape: TextShape, image_tokens: int, text_tokens: int, dtype: str) -> dict[str, Any]:
    """The schedule of p-MoD for one prompt.

    Returns
    -------
    dict
        ``method``, ``image_tokens``, ``text_tokens``, ``dtype``; ``layers``: for each its ``layer``, whether it is a
        MoD layer (``mod``), ``keep_ratio`` (1 for others), ``image_tokens`` and ``tokens`` that it processes, ``flops``
        (the router's included) and ``kv_bytes``; ``mean_keep_ratio`` and ``mean_image_tokens`` over the layers;
        ``flops``, ``kv_bytes``, ``dense_flops`` and ``dense_kv_bytes`` of all layers.
    """
    from pruneops.analysis import kv_bytes_per_token, layer_flops, router_flops

    ratios = method.keep_ratios(shape.num_hidden_layers)
    per_token = kv_bytes_per_token(shape, dtype)
    layers = []
    for layer in range(shape.num_hidden_layers):
        mod = layer in ratios
        kept = method.keep_count(image_tokens, ratios[layer]) if mod else image_tokens
        tokens = text_tokens + kept
        layers.append(
            {
                "layer": layer,
                "mod": mod,
                "keep_ratio": ratios.get(layer, 1.0),
                "image_tokens": kept,
                "tokens": tokens,
                "flops": layer_flops(shape, tokens) + (router_flops(shape, image_tokens) if mod else 0),
                "kv_bytes": per_token * tokens,
            }
        )
    count, all_tokens = shape.num_hidden_layers, image_tokens + text_tokens
    return {
        "method": method.to_dict(),
        "image_tokens": image_tokens,
        "text_tokens": text_tokens,
        "dtype": dtype,
        "layers": layers,
        "mean_keep_ratio": sum(layer["keep_ratio"] for layer in layers) / count,
        "mean_image_tokens": sum(layer["image_tokens"] for layer in layers) / count,
        "flops": sum(layer["flops"] for layer in layers),
        "kv_bytes": sum(layer["kv_bytes"] for layer in layers),
        "dense_flops": count * layer_flops(shape, all_tokens),
        "dense_kv_bytes": count * per_token * all_tokens,
    }


def _table(document: dict[str, Any]) -> str:
    from pruneops.report import format_table

    giga, mega = 1e9, 1e6
    rows = [["layer", "", "keep ratio", "image tokens", "tokens", "GFLOP", "KV MB"]]
    for layer in document["layers"]:
        rows.append(
            [
                str(layer["layer"]),
                "MoD" if layer["mod"] else "dense",
                f"{layer['keep_ratio']:.6f}",
                str(layer["image_tokens"]),
                str(layer["tokens"]),
                f"{layer['flops'] / giga:.2f}",
                f"{layer['kv_bytes'] / mega:.3f}",
            ]
        )
    count = len(document["layers"])
    ratio, tokens = document["mean_keep_ratio"], document["mean_image_tokens"]
    flops, kv = document["flops"], document["kv_bytes"]
    dense_flops, dense_kv = document["dense_flops"], document["dense_kv_bytes"]
    mean_tokens = f"{tokens + document['text_tokens']:.1f}"
    rows += [
        ["mean", "", f"{ratio:.6f}", f"{tokens:.1f}", mean_tokens, *_costs(flops / count, kv / count)],
        ["total", "", "", "", "", *_costs(flops, kv)],
        ["dense", "", "", "", "", *_costs(dense_flops, dense_kv)],
        [
            "of dense",
            "",
            f"{100 * ratio:.2f} %",
            f"{100 * tokens / document['image_tokens']:.2f} %",
            f"{100 * kv / dense_kv:.2f} %",
            f"{100 * flops / dense_flops:.2f} %",
            f"{100 * kv / dense_kv:.2f} %",
        ],
    ]
    return format_table(rows, rules_before=(1, len(rows) - 4))


def _costs(flops: float, kv: float) -> tuple[str, str]:
    return f"{flops / 1e9:.2f}", f"{kv / 1e6:.3f}"
