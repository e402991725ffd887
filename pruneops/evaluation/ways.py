"""The ways in which a model is run: every method at a range of budgets, and what they are compared with.

A budget is the share of an image's tokens that a decoder layer sees on average over the layers, as the tables of
PyramidDrop count. Methods that spend it differently then cost about the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pruneops.analysis.budget import average_tokens, solve_keep_ratios
from pruneops.evaluation.candidate import Candidate
from pruneops.methods import KEEP_ALL, AveragePool, DynamicLlava, PMoD, PruningMethod, PyramidDrop, RandomDrop
from pruneops.methods.staged_drop import StagedDrop

#: Patches that are averaged, and so the budgets of what is done before the decoder.
POOLS = ((1, 2), (2, 2), (3, 3))
DENSE, BLANK, STOCK, OWN = "dense", "blank", "stock", "own"
#: What each way is, in the order of the tables. "own" is the method that a model was trained with.
WAYS = {
    DENSE: "nothing is pruned",
    BLANK: "nothing is pruned, and the picture is an even grey: what the questions alone give away",
    OWN: "the method that the model was trained with",
    "pyramiddrop": "PyramidDrop without training, at its own layers (the quarter points)",
    "random": "the schedule of pyramiddrop, tokens chosen at random",
    "one-shot": "one drop after a quarter of the layers, ranked as in PyramidDrop",
    "random-one-shot": "the schedule of one-shot, tokens chosen at random",
    "pool": "neighbouring patches averaged before the decoder: 1 x 2, 2 x 2, 3 x 3",
    "random-input": "as many tokens as pool leaves, chosen at random before the decoder",
}


@dataclass(frozen=True)
class Cell:
    """One model run in one way at one budget.

    Attributes
    ----------
    way : str
        One of `WAYS`.
    keep : float or None
        The budget; None for what has none, and for a method as it was published or trained.
    method : PruningMethod
    """

    way: str
    keep: float | None
    method: PruningMethod

    @property
    def blank(self) -> bool:
        return self.way == BLANK

    @property
    def name(self) -> str:
        return self.way if self.keep is None else f"{self.way} {self.keep:.4g}"


def check_ways(ways: Sequence[str]) -> tuple[str, ...]:
    """The ways in the order of `WAYS`; ValueError if one is none of them."""
    unknown = [way for way in ways if way not in WAYS]
    if unknown or not ways:
        raise ValueError(f"methods: got {', '.join(unknown) or 'none'}, expected some of {', '.join(WAYS)}")
    return tuple(way for way in WAYS if way in ways)


def check_budgets(keep: Sequence[float]) -> tuple[float, ...]:
    """The budgets from large to small, each once; ValueError if one is no share in (0, 1]."""
    for share in keep:
        if not 0 < share <= 1:
            raise ValueError(f"keep: got {share}, expected shares in (0, 1]")
    return tuple(sorted({float(share) for share in keep}, reverse=True))


def cells_of(
    candidate: Candidate, ways: Sequence[str], keep: Sequence[float], seed: int = 0
) -> tuple[list[Cell], list[str]]:
    """How a model is run, and notes on budgets that a method cannot meet.

    Parameters
    ----------
    candidate : Candidate
        Trained with a method, it is run with that one (``own``) and, where that makes sense, dense; otherwise in every
        other way.
    ways, keep
        What `check_ways` and `check_budgets` return.
    seed : int
        Of the random choices.
    """
    suited = [way for way in ways if _suits(way, candidate)]
    cells, notes = [], []
    for way in suited:
        if way in (DENSE, BLANK):
            cells.append(Cell(way, None, KEEP_ALL))
        elif way in ("pool", "random-input"):
            cells += [Cell(way, 1 / (rows * columns), _before(way, rows, columns, seed)) for rows, columns in POOLS]
        else:
            for share in (None, *keep):
                try:
                    cells.append(Cell(way, share, _method(way, candidate, share, seed)))
                except ValueError as error:
                    notes.append(f"{candidate.name}: {way} is not run at a budget of {share}: {error}")
    return cells, notes


def _suits(way: str, candidate: Candidate) -> bool:
    if way in (DENSE, BLANK):
        return candidate.has_dense_form
    return (way == OWN) == (candidate.trained_with is not None)


def _before(way: str, rows: int, columns: int, seed: int) -> PruningMethod:
    return AveragePool(rows, columns) if way == "pool" else RandomDrop((0,), (1 / (rows * columns),), seed)


def _method(way: str, candidate: Candidate, share: float | None, seed: int) -> PruningMethod:
    """The method of a way at a budget, None: that of PyramidDrop as published. ValueError where there is none."""
    if way == OWN:
        return candidate.trained_with if share is None else own_method(candidate, share)
    published = PyramidDrop().for_depth(candidate.depth)
    if way.endswith("one-shot"):
        if share is None:
            count = candidate.num_visual_tokens
            share = average_tokens(candidate.depth, count, published.layers, published.keep_ratios) / count
        stages = PyramidDrop((max(1, candidate.depth // 4),), (1.0,))
        schedule = with_budget(stages, candidate, share)
    else:
        schedule = published if share is None else with_budget(published, candidate, share)
    if way.startswith("random"):
        return RandomDrop(schedule.layers, schedule.keep_ratios, seed)
    return schedule


def own_method(candidate: Candidate, share: float) -> PruningMethod:
    """The method that a model was trained with, at another budget.

    Raises
    ------
    ValueError
        If the method cannot spend it, or has no budget to set.
    """
    method = candidate.trained_with
    if isinstance(method, StagedDrop):
        return with_budget(method.for_depth(candidate.depth), candidate, share)
    if isinstance(method, DynamicLlava):
        if not method.use_vision_predictor:
            raise ValueError("it has no predictor of image tokens")
        return replace(method, vision_keep_rate=_above(share, method.sparse_layer / candidate.depth))
    if isinstance(method, PMoD):
        return _routed(method, candidate.depth, share)
    raise ValueError(f"{method.name} has no budget to set")


def with_budget(method: StagedDrop, candidate: Candidate, share: float) -> StagedDrop:
    """Keep ratios ``r, r ** 2, ...`` at a method's layers, so that the average over all layers is the budget."""
    count = candidate.num_visual_tokens
    ratios = solve_keep_ratios(share * count, candidate.depth, count, method.layers)
    if int(count * ratios[-1]) < 1:
        raise ValueError(f"after layer {method.layers[-1]} no token would be left")
    return replace(method, keep_ratios=ratios)


def _above(share: float, below: float) -> float:
    """The share to keep above a layer, if those up to it, `below` of all, keep everything."""
    if share < below:
        raise ValueError(f"the layers below alone come to {below:g}")
    return (share - below) / (1 - below)


def _routed(method: PMoD, depth: int, share: float) -> PMoD:
    """p-MoD with its routers where they are, each letting so many more or fewer tokens through."""

    def shifted(by: float) -> PMoD:
        name, _, bounds = method.layers.partition("_decay_")
        layers = method.layers
        if bounds:
            # A layer is routed where its ratio is below the upper bound: both move together.
            highest, lowest = map(float, bounds.split("_"))
            layers = f"{name}_decay_{min(highest + by, 1.0):.9f}_{min(lowest, highest + by):.9f}"
        return replace(method, layers=layers, router_factor=method.router_factor + by)

    def average(by: float) -> float:
        ratios = shifted(by).keep_ratios(depth)
        return (depth - len(ratios) + sum(ratios.values())) / depth

    routed = list(method.keep_ratios(depth))
    low, high = -method.router_factor + 1e-6, 1.0 - method.router_factor
    if "_decay_" in method.layers:
        highest = float(method.layers.rsplit("_", 2)[1])
        low, high = max(low, 1e-6 - highest), min(high, 1.0 - highest)
    if not average(low) <= share <= average(high):
        raise ValueError(f"its routers can spend {average(low):.3g} to {average(high):.3g}")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) <= share else (low, middle)
    found = shifted(low)
    if list(found.keep_ratios(depth)) != routed:
        raise ValueError("its routers would have to be in other layers")
    return found


def describe(cells: Sequence[Cell]) -> Iterator[str]:
    """One line for every way that is run."""
    present = {cell.way for cell in cells}
    return (f"{way}: {text}" for way, text in WAYS.items() if way in present)
