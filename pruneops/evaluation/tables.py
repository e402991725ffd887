"""The results as tables in markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pruneops.data.export import write_atomically
from pruneops.evaluation.exam import Exam
from pruneops.evaluation.results import Entry, Results
from pruneops.evaluation.tally import difference, wilson_interval
from pruneops.evaluation.ways import OWN, STOCK, WAYS

HOW_TO_READ = """\
*Accuracy* is the share of questions whose greedy answer is exactly the true one, with its Wilson interval (95 %).
*To dense* is the difference to {reference} on the same questions, in points, with its 95 % interval. *Budget* is
the share of an image's tokens that a layer was meant to see on average over the layers; methods without one are as
published or trained. *Tokens* are those a layer runs on, text included, on average. *FLOPs* (two per multiply-add)
are those of the decoder layers and the head for the prompt, *KV* the bytes of keys and values after it; the shares
are of the same model without pruning.
"""
HOW_TIME_WAS_TAKEN = """\
Times are medians of {rounds} rounds in one process, each beside a round of the same model without pruning, and are
those of the whole batch. *First token* is everything from pixels to the first token, *layers* the decoder layers of
that alone, *answer* a whole answer of {new_tokens_timed} tokens. Shares are of the time without pruning in the same
round, with the lowest and the highest in brackets; below 1 is faster. `stock` is transformers without pruneops.
"""


def write_tables(results: Results, exam: Exam, path: Path) -> None:
    """Write the markdown file."""
    lines = [*_head(results, exam), *_accuracy(results), *_templates(results, exam), *_times(results)]
    if results.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in results.notes), ""]
    write_atomically(path, ("\n".join(lines).rstrip() + "\n").encode())


def _head(results: Results, exam: Exam) -> Iterator[str]:
    about, settings = results.about, results.settings
    machine = [f"{name} {settings[name]}" for name in ("threads", "instruction set") if name in settings]
    parts = [about["date"], settings["device"], *machine]
    parts += [f"{name} {version}" for name, version in about["versions"].items() if version != "not installed"]
    if about["revision"]:
        parts.append(f"commit {about['revision']}")
    yield from ("# Accuracy and cost", "", ", ".join(parts) + ".", "")
    if about["command"]:
        yield from ("    " + about["command"], "")
    share = about["constant_score"] / exam.size
    yield (
        f"{exam.size} questions of the split {exam.split} (seed {exam.seed}), one a picture; the most frequent answer "
        f"to every kind of question is right for {100 * share:.1f} %. `eval.json` has everything as numbers."
    )
    yield from ("", "![Accuracy against FLOPs and against measured time](eval.svg)", "")
    present = {entry.way for entry in results.entries}
    yield from (f"- `{way}`: {text}" for way, text in WAYS.items() if way in present)
    yield ""


def _accuracy(results: Results) -> Iterator[str]:
    reference = results.reference
    shown = "the dense model" if reference is None else f"`{reference.model}` dense"
    yield from ("## Accuracy and cost of the prefill", "", HOW_TO_READ.format(reference=shown))
    yield "| model | method | budget | accuracy % | to dense | tokens | MFLOP | FLOPs | KV KiB | KV |"
    yield "|---|---|---:|---|---|---:|---:|---:|---:|---:|"
    for entry in results.in_order():
        tally = entry.tally
        if not tally.questions:
            continue
        low, high = tally.interval
        away = "-"
        if reference is not None and entry is not reference and tally.questions == reference.tally.questions:
            mean, half = difference(tally.right, reference.tally.right)
            away = f"{100 * mean:+.1f} ± {100 * half:.1f}"
        yield _row(
            entry.model,
            *_way(results, entry),
            f"**{100 * tally.accuracy:.1f}** ({100 * low:.1f} to {100 * high:.1f})",
            away,
            f"{tally.mean_tokens:.0f}",
            f"{tally.flops / tally.questions / 1e6:.0f}",
            f"{100 * tally.flop_ratio:.0f} %",
            f"{tally.kv_bytes / tally.questions / 1024:.0f}",
            f"{100 * tally.kv_ratio:.0f} %",
        )
    yield ""


def _templates(results: Results, exam: Exam) -> Iterator[str]:
    counts = Counter(question.template for question in exam.questions)
    names = sorted(counts)
    yield from ("## Accuracy by kind of question", "")
    yield _row("model", "method", "budget", *(f"{name} ({counts[name]})" for name in names))
    yield "|---|---|" + "---:|" * (1 + len(names))
    for entry in results.in_order():
        tally = entry.tally
        if tally.questions == exam.size:
            shares = exam.shares(tally.right)
            yield _row(entry.model, *_way(results, entry), *(f"{100 * shares[name]:.1f}" for name in names))
    widest = max(counts.values()), min(counts.values())
    half = [50 * (high - low) for low, high in (wilson_interval(n // 2, n) for n in widest)]
    yield from ("", f"Per cent; 95 % intervals are at most ± {half[0]:.1f} to ± {half[1]:.1f} wide, by kind.", "")


def _times(results: Results) -> Iterator[str]:
    yield from ("## Time", "", HOW_TIME_WAS_TAKEN.format(**results.settings))
    yield "| batch | model | method | budget | layers ms | first token ms | of dense | answer ms | of dense |"
    yield "|---:|---|---|---:|---:|---:|---|---:|---|"
    for rows in sorted({rows for entry in results.entries for rows in entry.times}):
        for entry in results.in_order():
            if rows in entry.times:
                found = entry.times[rows]
                yield _row(
                    str(rows),
                    entry.model,
                    *_way(results, entry),
                    "-" if found["decoder_ms"] is None else f"{found['decoder_ms']:.1f}",
                    f"{found['first_token_ms']:.1f}",
                    _ratio(found["first_token_ratio"], found["first_token_spread"]),
                    f"{found['answer_ms']:.1f}",
                    _ratio(found["answer_ratio"], found["answer_spread"]),
                )
    yield ""


def _way(results: Results, entry: Entry) -> tuple[str, str]:
    """Method and budget as they are shown."""
    if entry.keep is not None:
        budget = f"{entry.keep:.3g}"
    else:
        budget = "-" if entry.way in (STOCK, "dense", "blank") else "trained" if entry.way == OWN else "published"
    return results.shown_way(entry.model, entry.way), budget


def _ratio(ratio: float, spread: Sequence[float]) -> str:
    return f"**{ratio:.2f}** ({spread[0]:.2f} to {spread[1]:.2f})"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
