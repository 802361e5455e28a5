"""What a model is worth on held-out examples: suites, verdicts against the base, comparison of runs, early stopping."""

from trainer.evaluation.compare import compare, table
from trainer.evaluation.results import latest_results, read_result
from trainer.evaluation.verdicts import verdict
from trainer.evaluation.watch import Watcher, direction_of, find_metric

# The Evaluator lies in `suites`: it brings torch and transformers, which comparing two finished runs does without.
__all__ = [
    "Watcher",
    "compare",
    "direction_of",
    "find_metric",
    "latest_results",
    "read_result",
    "table",
    "verdict",
]
