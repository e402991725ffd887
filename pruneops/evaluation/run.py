"""The whole evaluation: every model in every way over the questions, then against the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneops.environment import machine, revision, versions
from pruneops.evaluation.answers import examine, remembering_last_call
from pruneops.evaluation.candidate import Candidate, load_candidate
from pruneops.evaluation.chart import draw_chart
from pruneops.evaluation.exam import Exam
from pruneops.evaluation.results import Entry, Results
from pruneops.evaluation.tables import write_tables
from pruneops.evaluation.timing import NEW_TOKENS, clock, compare
from pruneops.evaluation.ways import WAYS, Cell, cells_of, check_budgets, check_ways
from pruneops.methods import KEEP_ALL, PruningMethod

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is evaluated, apart from the models.

    Attributes
    ----------
    methods : sequence of str
        Ways to run a model, of `pruneops.evaluation.WAYS`.
    keep : sequence of float
        Budgets: the share of an image's tokens that a layer sees on average over the layers, in (0, 1].
    split, questions, seed
        The pictures, see `Exam`; the seed is that of the random choices too.
    batch_size : int
        Questions that are answered at a time.
    time_batches : sequence of int
        Sizes of the batches that are timed.
    rounds : int
        Of every comparison of times.
    device : str
    """

    methods: Sequence[str] = tuple(WAYS)
    keep: Sequence[float] = (0.75, 0.6, 0.35, 0.3)
    split: str = "test"
    questions: int = 4000
    seed: int = 0
    batch_size: int = 32
    time_batches: Sequence[int] = (1, 8, 32)
    rounds: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", check_ways(self.methods))
        object.__setattr__(self, "keep", check_budgets(self.keep))
        object.__setattr__(self, "time_batches", tuple(dict.fromkeys(self.time_batches)))
        counts = {"batch_size": self.batch_size, "rounds": self.rounds, "time_batches": min(self.time_batches)}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}: got {count}, expected at least 1")
        self.exam()

    def exam(self, patch_size: int = 8) -> Exam:
        return Exam(self.split, self.questions, self.seed, patch_size)

    def settings(self) -> dict[str, Any]:
        """What results have to agree on to be compared."""
        shared = {name: getattr(self, name) for name in ("split", "questions", "seed", "batch_size", "rounds")}
        return {**shared, "new_tokens_timed": NEW_TOKENS, **machine(self.device)}


def evaluate(
    folders: Sequence[str | Path], out: str | Path, plan: Plan | None = None, *, command: str = "", say: Say = print
) -> Results:
    """Evaluate models and write ``eval.json``, ``eval.md`` and ``eval.svg``.

    Results are stored as they come; the same call again goes on where it was interrupted, and one with other models,
    methods or budgets adds to what is there.

    Parameters
    ----------
    folders : sequence of path
        Of the models, dense or trained with a method, see `load_candidate`.
    out : path
        The folder to write; created if needed.
    plan : Plan, optional
    command : str
        What to record as the command that did this.
    say : callable
        Is given lines of progress.

    Raises
    ------
    ValueError
        If a model, a budget or a method is none that can be evaluated, or `out` has results of other questions or of
        another machine. Found out before anything is computed.
    """
    plan = Plan() if plan is None else plan
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got the file {out}, expected a folder")
    candidates = [load_candidate(folder, plan.device) for folder in folders]
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"model: got folders named {', '.join(names) or 'nothing'}, expected names that differ")
    results = Results(out, plan.settings())
    results.about = {"command": command, "revision": revision(), "versions": versions()}
    results.about["date"] = time.strftime("%Y-%m-%d")
    exam = plan.exam()
    results.about["constant_score"] = exam.constant_score
    cells: dict[str, list[Cell]] = {}
    for candidate in candidates:
        results.add_model(candidate)
        cells[candidate.name], notes = cells_of(candidate, plan.methods, plan.keep, plan.seed)
        for note in notes:
            say(f"note: {note}")
        results.notes += [note for note in notes if note not in results.notes]
    if not any(cells.values()):
        raise ValueError(f"methods: got {', '.join(plan.methods)}, expected some that suit {', '.join(names)}")
    for candidate in candidates:
        _ask(candidate, cells[candidate.name], plan, results, say)
    _time(candidates, cells, plan, results, say)
    write_tables(results, exam, out / "eval.md")
    draw_chart(results, out / "eval.svg")
    return results


def _ask(candidate: Candidate, cells: Sequence[Cell], plan: Plan, results: Results, say: Say) -> None:
    """Every cell answers a batch before the next batch is rendered."""
    exam = plan.exam(candidate.patch_size)
    entries = [(cell, results.entry(candidate, cell)) for cell in cells]
    starts = range(0, exam.size, plan.batch_size)
    left = [start for start in starts if any(entry.tally.questions <= start for _, entry in entries)]
    eta = _Eta(len(left))
    for start in left:
        numbers = range(start, min(start + plan.batch_size, exam.size))
        # Those that are behind, after an interruption or with new cells, catch up; none is ever ahead of its turn.
        behind = [(cell, entry) for cell, entry in entries if entry.tally.questions == start]
        for blank in sorted({cell.blank for cell, _ in behind}):
            inputs = exam.batch(candidate.processor, numbers, blank)
            with remembering_last_call(candidate.model.model.vision_tower):
                for cell, entry in behind:
                    if cell.blank == blank:
                        entry.tally.add(*examine(candidate, cell.method, exam, numbers, inputs))
        results.save()
        say(f"{candidate.name}: {numbers.stop} of {exam.size} questions, {len(behind)} ways, {eta.after_one_more()}")


def _time(
    candidates: Sequence[Candidate], cells: dict[str, list[Cell]], plan: Plan, results: Results, say: Say
) -> None:
    timed: list[tuple[Candidate, PruningMethod | None, Entry]] = []
    for candidate in candidates:
        timed.append((candidate, None, results.stock_entry(candidate)))
        timed += [
            (candidate, cell.method, results.entry(candidate, cell))
            for cell in cells[candidate.name]
            if not cell.blank  # the pictures make no difference to the time
        ]
    left = [(rows, *one) for rows in plan.time_batches for one in timed if rows not in one[-1].times]
    eta = _Eta(sum(rows for rows, *_ in left))
    for rows, candidate, method, entry in left:
        exam = Exam(plan.split, rows, plan.seed, candidate.patch_size)
        inputs = exam.batch(candidate.processor, range(rows))
        dense = clock(candidate, inputs, KEEP_ALL)
        entry.times[rows] = compare(clock(candidate, inputs, method), dense, plan.rounds).to_dict()
        results.save()
        ratio = entry.times[rows]["first_token_ratio"]
        say(f"{candidate.name}: {entry.way}, batch {rows}: {ratio:.2f} of dense, {eta.after_one_more(rows)}")


class _Eta:
    """How long the rest will take, if it goes on like this."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()

    def after_one_more(self, size: int = 1) -> str:
        self._done += size
        seconds = int((time.monotonic() - self._start) / self._done * (self._total - self._done))
        return f"about {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
