"""Measures of text, labels and significance. No torch, and nothing heavy at import: a check needs the table alone.

``METRICS`` says for each name which way is better and whether the value is a mean over examples or belongs to the whole
corpus; evaluation, early stopping and the plateau schedule look directions up here. ``score`` computes one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.errors import UserError
from trainer.measures import fields, labels, text
from trainer.measures.pairs import check_pairs

if TYPE_CHECKING:
    from trainer.measures.significance import Verdict

Direction = Literal["higher", "lower"]
Level = Literal["example", "corpus"]


@dataclass(frozen=True)
class Metric:
    """``function`` gives one value per example (level example) or one of the corpus; None where texts do not tell it.

    ``by_index`` (level corpus) gives the measure as a function of example indices, for resampling.
    """

    function: Callable[..., Any] | None
    direction: Direction
    level: Level
    by_index: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Score:
    """A metric's value over a corpus, with the per-example values whose mean it is where there are such."""

    value: float
    per_example: list[float] | None
    direction: Direction


METRICS: dict[str, Metric] = {
    "exact_match": Metric(text.exact_match, "higher", "example"),
    "json_match": Metric(fields.json_match, "higher", "example"),
    "field_accuracy": Metric(fields.field_accuracy, "higher", "example"),
    "field_f1": Metric(fields.field_f1, "higher", "example"),
    "token_f1": Metric(text.token_f1, "higher", "example"),
    "rouge1": Metric(text.rouge1, "higher", "example"),
    "rouge2": Metric(text.rouge2, "higher", "example"),
    "rougeL": Metric(text.rouge_l, "higher", "example"),
    "bleu": Metric(text.corpus_bleu, "higher", "corpus", text.bleu_by_index),
    "chrf": Metric(text.corpus_chrf, "higher", "corpus", text.chrf_by_index),
    "accuracy": Metric(labels.accuracy, "higher", "example"),
    "macro_f1": Metric(labels.macro_f1, "higher", "corpus", labels.macro_f1_by_index),
    # From the model's log-probabilities, so computed where the model is.
    "loss": Metric(None, "lower", "corpus"),
    "perplexity": Metric(None, "lower", "corpus"),
}


def metric_named(name: str) -> Metric:
    """The metric of that name. Raises UserError that names the nearest known one."""
    if name in METRICS:
        return METRICS[name]
    by_lower = {known.lower(): known for known in METRICS}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)
    raise UserError(f"metric: {name!r}: did you mean {by_lower[near[0]]!r}? Known: {', '.join(METRICS)}")


def _of_texts(name: str) -> tuple[Metric, Callable[..., Any]]:
    metric = metric_named(name)
    if metric.function is None:
        raise UserError(f"metric: {name!r}: comes from the model's probabilities, not from texts: use a loss suite")
    return metric, metric.function


def score(name: str, predictions: Sequence[str], references: Sequence[str]) -> Score:
    """Value of metric ``name`` over the corpus, in its own unit (BLEU and chrF 0 to 100, the others 0 to 1).

    Raises UserError for an unknown name, one that texts do not tell, unequal lengths or no examples.
    """
    metric, function = _of_texts(name)
    check_pairs(predictions, references, empty=False)
    if metric.level == "corpus":
        return Score(function(predictions, references), None, metric.direction)
    values = function(predictions, references)
    return Score(sum(values) / len(values), values, metric.direction)


def compare(
    name: str, baseline: Sequence[str], candidate: Sequence[str], references: Sequence[str], **options: Any
) -> Verdict:
    """Paired bootstrap of two systems' predictions by metric ``name``, on its own level.

    ``options`` are those of ``significance.paired_bootstrap`` (confidence, resamples, interval_method, seed).
    Raises UserError as ``score`` does.
    """
    from trainer.measures import significance  # brings numpy, 0.1 s, which a recipe check does without

    metric, function = _of_texts(name)
    check_pairs(baseline, references, "baseline predictions", empty=False)
    check_pairs(candidate, references, "candidate predictions", empty=False)
    options |= {"metric": name, "lower_is_better": metric.direction == "lower"}
    if metric.by_index is None:
        return significance.paired_bootstrap(function(baseline, references), function(candidate, references), **options)
    return significance.paired_bootstrap_by_index(
        metric.by_index(baseline, references), metric.by_index(candidate, references), len(references), **options
    )


__all__ = ["METRICS", "Metric", "Score", "compare", "metric_named", "score"]
