"""Which checkpoints go: the pure rule, by hand and by properties; where the scores come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_cases import single, train
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint import newest
from trainer.checkpoint.retention import best, doomed, scores_of
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.store import Store
from trainer.config.errors import UserError
from trainer.config.schema import Checkpoint
from trainer.world import World

SETTINGS = st.builds(
    Checkpoint,
    keep=st.integers(1, 4),
    keep_best=st.integers(0, 3),
    metric=st.sampled_from(["loss", "suite/exact_match"]),
    keep_every=st.none() | st.integers(1, 50),
)
SCORES = st.dictionaries(st.integers(0, 200), st.floats(allow_nan=True, allow_infinity=True, width=16))


def test_the_newest_the_best_and_the_multiples_stay() -> None:
    steps = [10, 20, 30, 40, 50, 60, 70]
    scores = {10: 0.9, 20: 0.2, 30: 0.5, 40: 0.3, 60: 0.4}  # 50 and 70 were not measured
    assert doomed(steps, scores, Checkpoint(keep=2)) == [10, 20, 30, 40, 50]
    assert doomed(steps, scores, Checkpoint(keep=2, keep_best=2)) == [10, 30, 50]
    assert doomed(steps, scores, Checkpoint(keep=2, keep_best=2, metric="accuracy")) == [20, 40, 50]  # higher is better
    assert doomed(steps, scores, Checkpoint(keep=1, keep_every=20)) == [10, 30, 50]
    assert doomed([], {}, Checkpoint()) == []


def test_of_equals_the_earlier_is_the_best_and_what_is_not_finite_is_none() -> None:
    scores = {1: 0.5, 2: 0.5, 3: float("nan"), 4: float("-inf"), 5: 0.7}
    assert best([1, 2, 3, 4, 5, 6], scores, "loss") == [1, 2, 5]
    assert best([1, 2, 3, 4, 5, 6], scores, "suite/accuracy") == [5, 1, 2]
    with pytest.raises(UserError, match="nonsense"):
        best([1], scores, "nonsense")


@given(st.sets(st.integers(0, 200), min_size=1), SCORES, SETTINGS)
def test_what_must_stay_stays(steps: set[int], scores: dict[int, float], settings: Checkpoint) -> None:
    gone = doomed(steps, scores, settings)
    left = steps - set(gone)
    assert gone == sorted(gone) and set(gone) <= steps
    assert max(steps) in left
    assert set(sorted(steps)[-settings.keep :]) <= left
    ranking = best(steps, scores, settings.metric)
    assert set(ranking[: settings.keep_best]) <= left
    if settings.keep_every:
        assert all(step % settings.keep_every for step in gone)
    bound = settings.keep + settings.keep_best
    multiples = sum(not step % settings.keep_every for step in steps) if settings.keep_every else 0
    assert len(left) <= bound + multiples
    assert doomed(left, scores, settings) == []


@given(st.lists(st.integers(1, 200), min_size=2, unique=True).map(sorted), SCORES, SETTINGS)
def test_a_best_one_goes_only_after_a_better_one_came(
    steps: list[int], scores: dict[int, float], settings: Checkpoint
) -> None:
    settings = settings.model_copy(update={"keep_best": 1})
    disk: set[int] = set()
    leader: int | None = None
    sign = -1 if settings.metric.endswith("match") else 1
    for step in steps:
        disk.add(step)
        disk -= set(doomed(disk, scores, settings))
        first = next(iter(best(disk, scores, settings.metric)), None)
        if leader is not None and first != leader:
            assert first is not None and sign * scores[first] < sign * scores[leader]
        leader = first


def test_scores_are_those_of_the_journal() -> None:
    rows = [
        {"kind": "eval", "step": 5, "suite": "a", "metrics": {"loss": 2.0, "accuracy": 0.1}},
        {"kind": "eval", "step": 5, "suite": "b", "metrics": {"loss": 3.0}},
        {"kind": "step", "step": 6, "loss": 1.0},
        {"kind": "eval", "step": 10, "suite": "b", "metrics": {"loss": 1.5}},
    ]
    assert scores_of(rows, "loss") == {5: 2.0, 10: 1.5}
    assert scores_of(rows, "b/loss") == {5: 3.0, 10: 1.5}
    assert scores_of(rows, "a/accuracy") == {5: 0.1}


def test_a_saver_keeps_the_best_and_lets_it_go_when_a_better_one_is_measured(tmp_path: Path) -> None:
    settings = Checkpoint(keep=1, keep_best=1, asynchronous=False)
    saver, engine = Saver(Store(tmp_path, settings=settings), World(), lambda *event: None), single()
    for step, score in ((1, 0.5), (2, 0.3), (3, 0.4)):
        train(engine, 1, step)
        saver.score(step, score)
        saver.save(step, engine, {})
    assert [path.name[-1] for path in newest(tmp_path)] == ["3", "2"]
    saver.save_last(4, engine, {})
    assert [path.name[-1] for path in newest(tmp_path)] == ["4", "2"]
    saver.score(4, 0.2)  # the final evaluation comes after the final checkpoint
    assert [path.name[-1] for path in newest(tmp_path)] == ["4"]
