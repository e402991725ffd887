"""The results of an evaluation, stored as they come, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruneops.data.export import write_atomically
from pruneops.evaluation.candidate import Candidate
from pruneops.evaluation.tally import Tally
from pruneops.evaluation.ways import DENSE, OWN, STOCK, WAYS, Cell

FILE = "eval.json"


@dataclass
class Entry:
    """What is known of a cell: its method as a dict, answers and cost, and times by the size of the batch."""

    model: str
    way: str
    keep: float | None
    method: dict[str, Any] | None
    tally: Tally = field(default_factory=Tally)
    times: dict[int, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "tally": self.tally.to_dict(), "times": {str(n): t for n, t in self.times.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entry:
        times = {int(rows): found for rows, found in values["times"].items()}
        return cls(**{**values, "tally": Tally.from_dict(values["tally"]), "times": times})


class Results:
    """Everything in the file of an evaluation.

    Parameters
    ----------
    folder : Path
        Where the file is, or will be.
    settings : mapping
        What all results have to agree on, such as the questions.

    Attributes
    ----------
    models : dict
        By name: fingerprint, depth and the method that each was trained with.
    entries : list of Entry
    notes : list of str
        What could not be run.
    about : dict
        Of the latest run: command, date, versions.

    Raises
    ------
    ValueError
        If there is a file of another evaluation, or of something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(folder) / FILE
        self.settings = dict(settings)
        self.about: dict[str, Any] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.entries: list[Entry] = []
        self.notes: list[str] = []
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            settings, self.models, self.notes = found["settings"], found["models"], found["notes"]
            self.entries = [Entry.from_dict(entry) for entry in found["entries"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"out: {self.path} is not what an evaluation wrote, expected another folder") from None
        other = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if other:
            have = ", ".join(f"{name} {settings.get(name)}" for name in other)
            want = ", ".join(f"{name} {self.settings[name]}" for name in other)
            raise ValueError(f"out: {self.path} is of an evaluation with {have}, expected {want} or another folder")

    def add_model(self, candidate: Candidate) -> None:
        """Take a model in; what is known of another one of its name is forgotten."""
        trained_with = candidate.trained_with
        facts = {
            "fingerprint": candidate.fingerprint,
            "layers": candidate.depth,
            "visual_tokens": candidate.num_visual_tokens,
            "trained_with": None if trained_with is None else trained_with.to_dict(),
        }
        if self.models.get(candidate.name) != facts:
            self.entries = [entry for entry in self.entries if entry.model != candidate.name]
        self.models[candidate.name] = facts

    def entry(self, candidate: Candidate, cell: Cell) -> Entry:
        """What is known of a cell so far; nothing if its method has changed."""
        return self._entry(candidate.name, cell.way, cell.keep, cell.method.to_dict())

    def stock_entry(self, candidate: Candidate) -> Entry:
        """The times of stock transformers with a model."""
        return self._entry(candidate.name, STOCK, None, None)

    def _entry(self, model: str, way: str, keep: float | None, method: dict[str, Any] | None) -> Entry:
        at = next((e for e in self.entries if (e.model, e.way, e.keep) == (model, way, keep)), None)
        if at is not None and at.method != method:
            self.entries.remove(at)
            at = None
        if at is None:
            at = Entry(model, way, keep, method)
            self.entries.append(at)
        return at

    def shown_way(self, model: str, way: str) -> str:
        """What to call a way of running a model: of its own method, with the name."""
        return f"own, {self.models[model]['trained_with']['method']}" if way == OWN else way

    def in_order(self) -> list[Entry]:
        """The entries by model, way and budget."""
        models, ways = list(self.models), [STOCK, *WAYS]

        def place(entry: Entry) -> tuple[int, int, float]:
            # What has no budget, the method as it was published or trained, comes first.
            return models.index(entry.model), ways.index(entry.way), -2.0 if entry.keep is None else -entry.keep

        return sorted(self.entries, key=place)

    @property
    def reference(self) -> Entry | None:
        """The dense model that others are compared with: the first that no method had a part in training."""
        dense = [entry for entry in self.in_order() if entry.way == DENSE and entry.tally.questions]
        untouched = [entry for entry in dense if self.models[entry.model]["trained_with"] is None]
        return next(iter([*untouched, *dense]), None)

    def save(self) -> None:
        """Write the file; a reader sees it complete or as it was."""
        document = {
            "about": self.about,
            "settings": self.settings,
            "models": self.models,
            "notes": self.notes,
            "entries": [entry.to_dict() for entry in self.in_order()],
        }
        write_atomically(self.path, (json.dumps(document, indent=1) + "\n").encode())
