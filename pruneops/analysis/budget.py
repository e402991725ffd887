"""From a budget to hyper-parameters: which keep ratios or layers give a wanted average of visual tokens, and
from how many visual tokens on pruning pays at all.

The average is taken over layers, as the tables of PyramidDrop (arXiv 2410.17247) do for their "192 / 128 / 64
/ 32 tokens" rows: keep ``lambda, lambda^2, ...`` and choose ``lambda`` (or move the layers) so that the
average matches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from pruneops.analysis.flops import TextShape, prefill_flops, pyramid_lengths


def average_tokens(
    num_hidden_layers: int, num_visual_tokens: int, layers: Sequence[int], keep_ratios: Sequence[float]
) -> float:
    """Average over the layers of the visual tokens a layer sees, each stage truncated as in PyramidDrop."""
    _check_layers(layers, num_hidden_layers)
    lengths = pyramid_lengths(num_hidden_layers, 0, num_visual_tokens, layers, keep_ratios)
    return sum(lengths) / num_hidden_layers


def solve_keep_ratios(
    target_average: float, num_hidden_layers: int, num_visual_tokens: int, layers: Sequence[int]
) -> tuple[float, ...]:
    """The geometric keep ratios ``(lambda, lambda^2, ...)`` whose average is nearest to ``target_average``.

    Counts are whole tokens, so the average is a step function of lambda; the nearest step is taken, the
    cheaper one in a tie. O(60 x layers).

    Raises
    ------
    ValueError
        If no lambda in (0, 1] reaches the target: the layers before the first stage alone exceed it, or it is
        above ``num_visual_tokens``.
    """
    _check_layers(layers, num_hidden_layers)
    if not layers:
        raise ValueError("layers must name at least one stage, got an empty sequence")

    def ratios(rate: float) -> tuple[float, ...]:
        return tuple(rate ** (stage + 1) for stage in range(len(layers)))

    def average(rate: float) -> float:
        return average_tokens(num_hidden_layers, num_visual_tokens, layers, ratios(rate))

    floor = num_visual_tokens * layers[0] / num_hidden_layers
    if not floor <= target_average <= num_visual_tokens:
        raise ValueError(
            f"target_average must lie between {floor:g} (everything dropped at layer {layers[0]}) and "
            f"{num_visual_tokens} (nothing dropped), got {target_average:g}"
        )
    if average(1.0) <= target_average:
        return ratios(1.0)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if average(middle) <= target_average:
            low = middle
        else:
            high = middle
    if low == 0.0:
        return ratios(high)
    nearer_low = target_average - average(low) <= average(high) - target_average
    return ratios(low if nearer_low else high)


def solve_layers(
    target_average: float,
    num_hidden_layers: int,
    num_visual_tokens: int,
    keep_ratios: Sequence[float],
    *,
    tolerance: float = 0.01,
) -> tuple[int, ...]:
    """The layers to drop before, for given ratios, so that the average is nearest to ``target_average``.

    Among the choices within ``tolerance`` (relative) of the target the one with the most even stages wins
    (smallest sum of squared stage lengths, then the latest first drop). If no choice is within the tolerance,
    the nearest one is returned. Tries every combination: O(num_hidden_layers choose len(keep_ratios)), meant
    for up to four stages.
    """
    if not 1 <= len(keep_ratios) <= 4:
        raise ValueError(f"keep_ratios must have 1 to 4 entries, got {len(keep_ratios)}")
    if num_hidden_layers <= len(keep_ratios):
        raise ValueError(f"num_hidden_layers must be above {len(keep_ratios)} stages, got {num_hidden_layers}")
    counts = [num_visual_tokens] + [int(num_visual_tokens * ratio) for ratio in keep_ratios]

    def rank(layers: tuple[int, ...]) -> tuple[float, int, int]:
        bounds = (0, *layers, num_hidden_layers)
        stages = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        average = sum(n * stage for n, stage in zip(counts, stages, strict=True)) / num_hidden_layers
        away = abs(average - target_average)
        within = away <= tolerance * target_average
        return (0.0 if within else away, sum(stage * stage for stage in stages), -layers[0])

    return min(combinations(range(1, num_hidden_layers), len(keep_ratios)), key=rank)


def break_even_tokens(
    config: object,
    layers: Sequence[int],
    keep_ratios: Sequence[float],
    *,
    overhead_seconds: float,
    flops_per_second: float,
    num_text_tokens: int = 64,
    max_visual_tokens: int = 1 << 16,
) -> int | None:
    """The smallest number of visual tokens at which pruning saves time in the prefill of one row.

    Parameters
    ----------
    config
        A Hugging Face text config or a :class:`~pruneops.analysis.flops.TextShape`.
    layers, keep_ratios
        The stages, as in ``PyramidDrop``.
    overhead_seconds
        Measured fixed time of all stages together (launches, selection, compaction). The ranking's FLOPs are
        counted on their own.
    flops_per_second
        Rate the machine reaches on the decoder layers (measured FLOPs / measured seconds).
    num_text_tokens
        Text tokens beside the image.

    Returns
    -------
    The count, or None if ``max_visual_tokens`` tokens still do not pay.
    """
    if overhead_seconds < 0:
        raise ValueError(f"overhead_seconds must be at least 0, got {overhead_seconds}")
    if flops_per_second <= 0:
        raise ValueError(f"flops_per_second must be above 0, got {flops_per_second}")
    shape = TextShape.from_config(config)
    _check_layers(layers, shape.num_hidden_layers)

    def pays(visual: int) -> bool:
        lengths = pyramid_lengths(shape.num_hidden_layers, num_text_tokens, visual, layers, keep_ratios)
        pruned = prefill_flops(shape, [[n] for n in lengths], lm_head=False, ranked_layers=layers)
        dense = prefill_flops(shape, [[num_text_tokens + visual]] * shape.num_hidden_layers, lm_head=False)
        return (dense - pruned) / flops_per_second > overhead_seconds

    return _first(pays, max_visual_tokens)


def _first(condition: Callable[[int], bool], limit: int) -> int | None:
    """Smallest n in [1, limit] with condition(n), for a condition that stays true once it is."""
    if not condition(limit):
        return None
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if condition(middle):
            high = middle
        else:
            low = middle
    return high


def _check_layers(layers: Sequence[int], num_hidden_layers: int) -> None:
    if num_hidden_layers < 1:
        raise ValueError(f"num_hidden_layers must be at least 1, got {num_hidden_layers}")
    inside = all(0 < layer < num_hidden_layers for layer in layers)
    if not inside or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"layers must increase and lie in 1..{num_hidden_layers - 1}, got {tuple(layers)}")
