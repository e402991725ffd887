"""How many questions a model answers right when it is pruned, and what that costs: what ``pruneops eval`` runs."""

from pruneops.evaluation.answers import accuracy
from pruneops.evaluation.candidate import Candidate, load_candidate
from pruneops.evaluation.exam import Exam
from pruneops.evaluation.results import Results
from pruneops.evaluation.run import Plan, evaluate
from pruneops.evaluation.tally import Tally, wilson_interval
from pruneops.evaluation.ways import WAYS

__all__ = [
    "WAYS",
    "Candidate",
    "Exam",
    "Plan",
    "Results",
    "Tally",
    "accuracy",
    "evaluate",
    "load_candidate",
    "wilson_interval",
]
