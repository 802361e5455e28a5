from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import UserError
from trainer.config.schema import EarlyStopping
from trainer.evaluation.watch import Watcher, direction_of, find_metric

METRICS = {"answers": {"exact_match": 0.5}, "held-out": {"loss": 2.0, "perplexity": 7.4}, "other": {"loss": 3.0}}


def losses(*values: float) -> list[dict[str, dict[str, float]]]:
    return [{"held-out": {"loss": value}} for value in values]


def test_find_metric_takes_the_first_suite_that_has_it_or_the_named_one() -> None:
    assert find_metric(METRICS, "loss") == 2.0
    assert find_metric(METRICS, "other/loss") == 3.0
    assert find_metric(METRICS, "exact_match") == 0.5
    assert find_metric(METRICS, "answers/loss") is None
    assert find_metric(METRICS, "bleu") is None
    assert find_metric({}, "loss") is None


def test_direction_comes_from_the_measures() -> None:
    assert direction_of("loss") == "lower"
    assert direction_of("answers/exact_match") == "higher"
    with pytest.raises(UserError, match="exact_match"):
        direction_of("exact_mach")


def test_stops_after_patience_evaluations_without_gain() -> None:
    watcher = Watcher("loss", "lower", patience=2)
    # best 3, 2; waited 1 (2.5); best 1.9; waited 1, 2
    assert [watcher.observe(m) for m in losses(3.0, 2.0, 2.5, 1.9, 1.9, 2.0)] == [False] * 5 + [True]
    assert watcher.best == 1.9


def test_a_gain_must_exceed_min_delta_and_is_measured_from_the_best() -> None:
    watcher = Watcher("loss", "lower", patience=3, min_delta=0.5)
    # 1.75 and 1.5 gain 0.25 and 0.5 on the best, 2.0: not more than 0.5; 1.25 gains 0.75
    assert [watcher.observe(m) for m in losses(2.0, 1.75, 1.5, 1.25)] == [False] * 4
    assert (watcher.best, watcher.waited) == (1.25, 0)


def test_higher_is_better_for_accuracies() -> None:
    watcher = Watcher("answers/exact_match", "higher", patience=1)
    assert not watcher.observe({"answers": {"exact_match": 0.2}})
    assert not watcher.observe({"answers": {"exact_match": 0.3}})
    assert watcher.observe({"answers": {"exact_match": 0.3}})


def test_an_evaluation_without_the_metric_does_not_count() -> None:
    watcher = Watcher("loss", "lower", patience=1)
    assert not watcher.observe({"answers": {"exact_match": 0.2}})
    assert (watcher.best, watcher.waited) == (None, 0)


def test_nothing_finite_is_no_gain_even_at_first() -> None:
    watcher = Watcher("loss", "lower", patience=2)
    assert [watcher.observe(m) for m in losses(math.nan, -math.inf)] == [False, True]
    assert watcher.best is None


@given(st.lists(st.floats(allow_nan=True, width=16), max_size=20), st.integers(0, 20), st.integers(1, 4))
def test_state_through_json_goes_on_as_if_never_stopped(values: list[float], cut: int, patience: int) -> None:
    whole, first = Watcher("loss", "lower", patience), Watcher("loss", "lower", patience)
    expected = [whole.observe(m) for m in losses(*values)]
    found = [first.observe(m) for m in losses(*values[:cut])]
    second = Watcher("loss", "lower", patience)
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert found + [second.observe(m) for m in losses(*values[cut:])] == expected


def test_state_of_another_metric_is_refused() -> None:
    with pytest.raises(UserError, match=r"early_stopping.metric: 'loss': the checkpoint watched 'bleu'"):
        Watcher("loss", "lower", 1).load(Watcher("bleu", "higher", 1).state())


def test_from_settings() -> None:
    made = Watcher.from_settings(EarlyStopping(metric="answers/bleu", patience=4, min_delta=0.1))
    assert (made.metric, made.direction, made.patience, made.min_delta) == ("answers/bleu", "higher", 4, 0.1)
