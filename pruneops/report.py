"""What a pruned prefill computed, stored and took, layer by layer, and the same beside a dense run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pruneops.analysis.flops import TextShape, layer_flops, lm_head_flops, ranking_flops_by_layer
from pruneops.analysis.kv import dtype_bytes, kv_bytes_per_token


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that see the same tokens: ``first`` to ``last``, 0-based, both included."""

    first: int
    last: int
    tokens: int
    flops: int
    kv_bytes: int
    seconds: float | None

    @property
    def name(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Report:
    """Tokens, FLOPs, KV bytes and measured time of one prefill.

    Printing it gives a table with one line per group of layers. FLOPs count 2 per multiply-add and cover the
    decoder layers, ``lm_head`` for one token a row, and the ranking before a stage (see
    :mod:`pruneops.analysis.flops`); the merging of tokens before layer 0 shows in that layer's time only. KV bytes are
    those of the tokens, without the spare room of a cache that grows by blocks.

    Attributes
    ----------
    shape
        The numbers of the text configuration.
    layer_lengths
        ``layer_lengths[i][b]``: tokens of row b at layer i.
    layer_seconds
        Measured seconds of each layer; empty where nothing was measured.
    ranked_layers
        Layers that a ranking preceded.
    dense_lengths
        Tokens of each row before any pruning.
    kv_lengths
        ``kv_lengths[i][b]``: tokens of row b whose keys and values layer i holds after the prefill.
    dtype
        Name of the cache's dtype.
    """

    shape: TextShape
    layer_lengths: tuple[tuple[int, ...], ...]
    layer_seconds: tuple[float, ...]
    ranked_layers: tuple[int, ...]
    dense_lengths: tuple[int, ...]
    kv_lengths: tuple[tuple[int, ...], ...]
    dtype: str

    @classmethod
    def from_run(
        cls,
        *,
        layer_lengths: Sequence[Sequence[int]],
        layer_seconds: Sequence[float] = (),
        text_config: object,
        dtype: object,
        ranked_layers: Sequence[int] = (),
        dense_lengths: Sequence[int] | None = None,
        kv_lengths: Sequence[Sequence[int]] | None = None,
    ) -> Report:
        """Builds the report from what a run recorded.

        Parameters
        ----------
        layer_lengths
            Per layer, the tokens of each row in the prefill.
        layer_seconds
            Per layer, seconds of the prefill; empty if not measured.
        text_config
            The Hugging Face text config (or the whole config, or a ``TextShape``).
        dtype
            dtype of keys and values (a ``torch.dtype`` or its name).
        ranked_layers
            0-based layers before which tokens were ranked, so that the ranking's cost is counted.
        dense_lengths
            Tokens of each row before any pruning; by default those of layer 0.
        kv_lengths
            Per layer, the tokens of each row that stay in the cache; by default those it was run on.

        Raises
        ------
        ValueError
            If the lists do not have one entry per layer of the configuration, or rows differ between layers.
        """
        shape = TextShape.from_config(text_config)
        lengths = tuple(tuple(int(n) for n in row_lengths) for row_lengths in layer_lengths)
        if len(lengths) != shape.num_hidden_layers:
            raise ValueError(
                f"layer_lengths must have {shape.num_hidden_layers} entries (layers), got {len(lengths)}; "
                "was the model run inside the context?"
            )
        if layer_seconds and len(layer_seconds) != len(lengths):
            raise ValueError(f"layer_seconds must be empty or have {len(lengths)} entries, got {len(layer_seconds)}")
        rows = len(lengths[0])
        if any(len(row_lengths) != rows for row_lengths in lengths):
            raise ValueError(f"layer_lengths must name {rows} rows at every layer, got {[len(n) for n in lengths]}")
        dense = lengths[0] if dense_lengths is None else tuple(int(n) for n in dense_lengths)
        if len(dense) != rows:
            raise ValueError(f"dense_lengths must have one entry per row ({rows}), got {len(dense)}")
        kept = lengths if kv_lengths is None else tuple(tuple(int(n) for n in row) for row in kv_lengths)
        if [len(row) for row in kept] != [rows] * len(lengths):
            raise ValueError(
                f"kv_lengths must name {rows} rows at each of {len(lengths)} layers, got {[len(row) for row in kept]}"
            )
        dtype_bytes(dtype)
        return cls(
            shape=shape,
            layer_lengths=lengths,
            layer_seconds=tuple(float(s) for s in layer_seconds),
            ranked_layers=tuple(int(layer) for layer in ranked_layers),
            dense_lengths=dense,
            kv_lengths=kept,
            dtype=str(dtype).removeprefix("torch."),
        )

    @property
    def num_rows(self) -> int:
        return len(self.dense_lengths)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each layer, all rows together."""
        return [sum(lengths) for lengths in self.layer_lengths]

    @property
    def layer_flops(self) -> list[int]:
        """FLOPs of each layer, the ranking that precedes it included."""
        ranking = ranking_flops_by_layer(self.shape, self.layer_lengths, self.ranked_layers)
        return [
            sum(layer_flops(self.shape, n) for n in lengths) + extra
            for lengths, extra in zip(self.layer_lengths, ranking, strict=True)
        ]

    @property
    def layer_kv_bytes(self) -> list[int]:
        per_token = kv_bytes_per_token(self.shape, self.dtype)
        return [per_token * sum(lengths) for lengths in self.kv_lengths]

    @property
    def lm_head_flops(self) -> int:
        return lm_head_flops(self.shape, self.num_rows)

    @property
    def flops(self) -> int:
        """FLOPs of the prefill."""
        return sum(self.layer_flops) + self.lm_head_flops

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values after the prefill."""
        return sum(self.layer_kv_bytes)

    @property
    def seconds(self) -> float | None:
        """Measured seconds of all decoder layers, or None."""
        return sum(self.layer_seconds) if self.layer_seconds else None

    @property
    def dense_flops(self) -> int:
        """FLOPs of the same prefill without pruning."""
        one_layer = sum(layer_flops(self.shape, n) for n in self.dense_lengths)
        return self.shape.num_hidden_layers * one_layer + self.lm_head_flops

    @property
    def dense_kv_bytes(self) -> int:
        per_token = kv_bytes_per_token(self.shape, self.dtype)
        return self.shape.num_hidden_layers * per_token * sum(self.dense_lengths)

    @property
    def flop_ratio(self) -> float:
        """FLOPs done over FLOPs of the dense prefill."""
        return self.flops / self.dense_flops if self.dense_flops else 1.0

    @property
    def kv_ratio(self) -> float:
        """KV bytes stored over KV bytes of the dense prefill."""
        return self.kv_bytes / self.dense_kv_bytes if self.dense_kv_bytes else 1.0

    def groups(self) -> list[LayerGroup]:
        """The layers, consecutive ones with equal lengths in every row taken together."""
        starts = [i for i, lengths in enumerate(self.layer_lengths) if i == 0 or lengths != self.layer_lengths[i - 1]]
        return [self.group(a, b) for a, b in zip(starts, [*starts[1:], len(self.layer_lengths)], strict=True)]

    def group(self, first: int, end: int) -> LayerGroup:
        """Layers ``first`` to ``end - 1`` taken together; ``tokens`` are those of the first of them."""
        return LayerGroup(
            first=first,
            last=end - 1,
            tokens=self.tokens[first],
            flops=sum(self.layer_flops[first:end]),
            kv_bytes=sum(self.layer_kv_bytes[first:end]),
            seconds=sum(self.layer_seconds[first:end]) if self.layer_seconds else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        return {
            "rows": self.num_rows,
            "dtype": self.dtype,
            "layer_lengths": [list(lengths) for lengths in self.layer_lengths],
            "kv_lengths": [list(lengths) for lengths in self.kv_lengths],
            "dense_lengths": list(self.dense_lengths),
            "layer_seconds": list(self.layer_seconds),
            "layer_flops": self.layer_flops,
            "layer_kv_bytes": self.layer_kv_bytes,
            "ranked_layers": list(self.ranked_layers),
            "lm_head_flops": self.lm_head_flops,
            "tokens": self.tokens,
            "flops": self.flops,
            "kv_bytes": self.kv_bytes,
            "seconds": self.seconds,
            "dense_flops": self.dense_flops,
            "dense_kv_bytes": self.dense_kv_bytes,
            "flop_ratio": self.flop_ratio,
            "kv_ratio": self.kv_ratio,
        }

    def __str__(self) -> str:
        flop_unit, flop_scale = _unit(self.dense_flops, "FLOP")
        byte_unit, byte_scale = _unit(self.dense_kv_bytes, "B")
        rows = [["layers", "tokens", flop_unit, f"KV {byte_unit}", "ms"]]
        for group in self.groups():
            rows.append(
                [
                    group.name,
                    str(group.tokens),
                    _number(group.flops / flop_scale),
                    _number(group.kv_bytes / byte_scale),
                    _milliseconds(group.seconds),
                ]
            )
        rows.append(["lm_head", str(self.num_rows), _number(self.lm_head_flops / flop_scale), "", ""])
        total = ["total", "", _number(self.flops / flop_scale), _number(self.kv_bytes / byte_scale)]
        dense = [
            "dense",
            "",
            _number(self.dense_flops / flop_scale),
            _number(self.dense_kv_bytes / byte_scale),
        ]
        rows.append([*total, _milliseconds(self.seconds)])
        rows.append([*dense, ""])
        rows.append(["of dense", "", _percent(self.flop_ratio), _percent(self.kv_ratio), ""])
        return format_table(rows, rules_before=(1, len(rows) - 3))


def compare(dense: Report, pruned: Report) -> str:
    """A table of two runs on the same input, the dense one beside the pruned one, per layer group of the
    pruned one.

    Raises
    ------
    ValueError
        If the runs are not of the same model, or have different numbers of rows.
    """
    if dense.shape != pruned.shape or dense.num_rows != pruned.num_rows:
        raise ValueError(
            f"dense and pruned must be runs of the same model on the same rows, got {dense.num_rows} rows of "
            f"{dense.shape} and {pruned.num_rows} rows of {pruned.shape}"
        )
    flop_unit, flop_scale = _unit(dense.flops, "FLOP")
    byte_unit, byte_scale = _unit(dense.kv_bytes, "B")
    rows = [
        ["", "tokens", "", flop_unit, "", f"KV {byte_unit}", "", "ms", ""],
        ["layers", *["dense", "pruned"] * 4],
    ]

    def line(name: str, a: LayerGroup, b: LayerGroup, tokens: bool) -> list[str]:
        return [
            name,
            str(a.tokens) if tokens else "",
            str(b.tokens) if tokens else "",
            _number(a.flops / flop_scale),
            _number(b.flops / flop_scale),
            _number(a.kv_bytes / byte_scale),
            _number(b.kv_bytes / byte_scale),
            _milliseconds(a.seconds),
            _milliseconds(b.seconds),
        ]

    for group in pruned.groups():
        rows.append(line(group.name, dense.group(group.first, group.last + 1), group, tokens=True))
    head = _number(dense.lm_head_flops / flop_scale)
    rows.append(["lm_head", str(dense.num_rows), str(pruned.num_rows), head, head, "", "", "", ""])
    totals = [LayerGroup(0, 0, 0, run.flops, run.kv_bytes, run.seconds) for run in (dense, pruned)]
    rows.append(line("total", *totals, tokens=False))
    time_ratio = pruned.seconds / dense.seconds if pruned.seconds and dense.seconds else None
    rows.append(
        [
            "of dense",
            *["", "", "", _percent(pruned.flops / dense.flops)],
            *["", _percent(pruned.kv_bytes / dense.kv_bytes if dense.kv_bytes else 1.0)],
            *["", "-" if time_ratio is None else _percent(time_ratio)],
        ]
    )
    return format_table(rows, rules_before=(2, len(rows) - 2))


def format_table(rows: Sequence[Sequence[str]], rules_before: Sequence[int] = ()) -> str:
    """Plain text: first column to the left, the others to the right, a rule before the given rows."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        if index in rules_before:
            lines.append("  ".join("-" * width for width in widths))
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _unit(value: float, name: str) -> tuple[str, float]:
    """The SI prefix in which ``value`` has at most four digits before the point, and its factor."""
    for prefix, scale in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if value < 1e4 * scale:
            return prefix + name, scale
    return "P" + name, 1e15


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 1000 else f"{value:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"
