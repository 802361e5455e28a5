from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.config.errors import UserError
from trainer.measures import METRICS, compare, metric_named, score


def test_directions_and_levels() -> None:
    assert {name for name, metric in METRICS.items() if metric.direction == "lower"} == {"loss", "perplexity"}
    assert {name for name, metric in METRICS.items() if metric.level == "corpus"} == {
        "bleu",
        "chrf",
        "macro_f1",
        "loss",
        "perplexity",
    }
    assert {"exact_match", "json_match", "field_f1", "token_f1", "rouge1", "rouge2", "rougeL", "accuracy"} <= set(
        METRICS
    )


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.function is not None])
def test_every_metric_scores_a_perfect_and_a_wrong_corpus(name: str) -> None:
    references = ['{"a": "one two three four five"}', '{"b": "six seven eight nine ten"}']
    perfect, wrong = score(name, references, references), score(name, ["zzz", "zzz"], references)
    assert perfect.value == pytest.approx(100.0 if name in ("bleu", "chrf") else 1.0)
    assert wrong.value == 0.0
    assert (perfect.per_example is None) == (METRICS[name].level == "corpus")
    if perfect.per_example is not None:
        assert sum(perfect.per_example) / 2 == perfect.value
    verdict = compare(name, ["zzz", "zzz"], references, references, resamples=100)
    assert verdict.metric == name and verdict.difference == pytest.approx(perfect.value)
    assert verdict.better is None  # two examples prove nothing


def test_an_unknown_name_brings_the_nearest() -> None:
    for wrong, near in (("rouge-l", "rougeL"), ("exactmatch", "exact_match"), ("f1_macro", "macro_f1"), ("??", "")):
        with pytest.raises(UserError, match=f"did you mean '{near}"):
            metric_named(wrong)


def test_what_texts_do_not_tell() -> None:
    for call in (lambda: score("loss", ["a"], ["a"]), lambda: compare("perplexity", ["a"], ["a"], ["a"])):
        with pytest.raises(UserError, match="comes from the model's probabilities"):
            call()
    with pytest.raises(UserError, match="0 examples"):
        score("exact_match", [], [])
    with pytest.raises(UserError, match="candidate predictions: 2 for 1"):
        compare("exact_match", ["a"], ["a", "b"], ["a"])


def test_the_import_brings_nothing_heavy() -> None:
    heavy = "numpy scipy sklearn sacrebleu rouge_score nltk regex torch transformers matplotlib"
    code = f"import sys, trainer.measures; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
