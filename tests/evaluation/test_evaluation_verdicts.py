from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from trainer.config import UserError
from trainer.evaluation.compare import compare, table
from trainer.evaluation.results import base_result, latest_results, read_result, result_path, write_result
from trainer.evaluation.verdicts import paired_positions, verdict
from trainer.measures import METRICS, score

IDS = [f"rows.jsonl:{line}" for line in range(1, 21)]


def result(metrics: dict[str, float], per_example: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    whole = {"suite": "s", "step": 5, "model": "run", "source": "held", "kind": "loss", "n": len(IDS), "seconds": 1.0}
    directions = {name: METRICS[name].direction for name in metrics}
    whole |= {"metrics": metrics, "directions": directions, "per_example": per_example, "ids": IDS, "examples": []}
    return whole | more


def loss_result(losses: list[float], weights: list[float] | None = None, **more: Any) -> dict[str, Any]:
    weights = weights or [1.0] * len(losses)
    loss = sum(value * weight for value, weight in zip(losses, weights, strict=True)) / sum(weights)
    per_example = {"loss": losses, "weight": weights}
    return result({"loss": loss, "perplexity": math.exp(loss)}, per_example, **more)


def text_result(predictions: list[str], references: list[str], names: list[str], **more: Any) -> dict[str, Any]:
    scores = {name: score(name, predictions, references) for name in names}
    per_example = {name: found.per_example for name, found in scores.items() if found.per_example is not None}
    metrics = {name: found.value for name, found in scores.items()}
    texts = {"predictions": predictions, "references": references, "kind": "generate"}
    return result(metrics, per_example, **texts | more)


def test_loss_is_compared_through_resampled_sums_and_lower_is_better() -> None:
    weights = [1.0, 3.0] * 10
    base = loss_result([2.0, 4.0] * 10, weights)
    run = loss_result([1.0, 3.0] * 10, weights)
    loss, perplexity = verdict(base, run, resamples=500)
    assert (loss.metric, loss.n) == ("loss", 20)
    # (2*1 + 4*3) / 4 = 3.5 and (1*1 + 3*3) / 4 = 2.5: every target is better by exactly 1, so is every resample
    assert (loss.baseline, loss.candidate) == pytest.approx((3.5, 2.5))
    assert (loss.difference, loss.low, loss.high) == pytest.approx((-1.0, -1.0, -1.0))
    assert loss.better is True and loss.p_value < 0.01
    assert (perplexity.baseline, perplexity.candidate) == pytest.approx((math.exp(3.5), math.exp(2.5)))
    assert perplexity.better is True
    worse = verdict(run, base, resamples=500)[0]
    assert worse.better is False and worse.difference == pytest.approx(1.0)


def test_example_metrics_are_paired_by_id_whatever_the_order() -> None:
    references = [f"answer {index}" for index in range(20)]
    predictions = ["wrong"] * 5 + references[5:]
    base = text_result(["wrong"] * 20, references, ["exact_match"])
    run = text_result(predictions[::-1], references[::-1], ["exact_match"], ids=IDS[::-1])
    (found,) = verdict(base, run, resamples=500)
    assert (found.baseline, found.candidate, found.better) == (0.0, 0.75, True)
    # against itself in another order every difference is zero
    same = text_result(predictions, references, ["exact_match"])
    (found,) = verdict(same, run, resamples=500)
    assert (found.low, found.difference, found.high, found.better) == (0.0, 0.0, 0.0, None)


def test_corpus_metrics_are_resampled_from_texts() -> None:
    references = ["red", "green"] * 10
    base = text_result(["red"] * 20, references, ["macro_f1", "chrf", "bleu"])
    run = text_result(references, references, ["macro_f1", "chrf", "bleu"])
    found = {v.metric: v for v in verdict(base, run, resamples=300)}
    # all red: F1 of red 2*10/30, of green 0
    assert found["macro_f1"].baseline == pytest.approx(1 / 3)
    assert found["macro_f1"].candidate == pytest.approx(1.0)
    assert found["macro_f1"].better is True and found["chrf"].better is True
    assert found["chrf"].candidate == pytest.approx(100.0)
    assert "corpus measure" in found["bleu"].method


def test_the_seed_decides_the_interval() -> None:
    base, run = loss_result([float(i % 7) for i in range(20)]), loss_result([float(i % 5) for i in range(20)])
    first, again, other = (verdict(base, run, resamples=200, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_what_is_not_finite_gets_no_test(bad: float) -> None:
    run = loss_result([1.0] * 20)
    run["per_example"]["loss"][3] = bad
    run["metrics"] = {"loss": bad, "perplexity": math.inf}
    for found in verdict(loss_result([1.0] * 20), run, resamples=200):
        assert found.better is None and math.isnan(found.p_value) and "not finite" in found.summary


def test_examples_that_differ_are_named() -> None:
    run = loss_result([1.0] * 20)
    with pytest.raises(UserError, match=r"suite s: example 'new:1': not in the baseline's"):
        verdict(loss_result([1.0] * 20), run | {"ids": [*IDS[:10], "new:1", *IDS[11:]]})
    with pytest.raises(UserError, match=r"example 'rows.jsonl:20': only in the baseline's"):
        verdict(loss_result([1.0] * 20), run | {"ids": IDS[:19]})
    with pytest.raises(UserError, match=r"example 'a': twice in the run"):
        paired_positions(["a", "b"], ["a", "a"], "s")
    assert paired_positions(["a", "a"], ["a", "a"], "s") == [0, 1]


def test_a_changed_reference_is_named() -> None:
    references = [str(index) for index in range(20)]
    changed = [*references[:7], "other", *references[8:]]
    with pytest.raises(UserError, match=r"example 'rows.jsonl:8': its reference changed"):
        verdict(text_result(references, references, ["bleu"]), text_result(references, changed, ["bleu"]))


def test_result_files_round_trip_what_json_cannot_hold(tmp_path: Path) -> None:
    shown = [{"id": "1", "prompt": "nan", "reference": "inf", "prediction": "nan", "scores": {"bleu": math.inf}}]
    texts = {"examples": shown, "predictions": ["nan", "\udc80"], "references": ["-inf", "x"]}
    written = loss_result([math.inf, -math.inf, 0.5], [1.0, 1.0, 1.0], **texts)
    path = result_path(tmp_path, "s", 50, "run")
    assert path == tmp_path / "evaluation" / "s-step-00000050.json"
    write_result(path, written)
    found = read_result(path)
    assert found["per_example"]["loss"] == [math.inf, -math.inf, 0.5] and math.isnan(found["metrics"]["loss"])
    assert found["predictions"] == ["nan", "?"] and found["references"] == ["-inf", "x"]
    assert found["examples"] == shown
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_spoiled_file_is_named(tmp_path: Path) -> None:
    path = result_path(tmp_path, "s", None, "base")
    assert base_result(tmp_path, "s") is None
    path.parent.mkdir()
    for text in ("{", "[]", '{"suite": "s"}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"s-base.json: not a result"):
            base_result(tmp_path, "s")
    with pytest.raises(ValueError, match="belongs to a step"):
        result_path(tmp_path, "s", None, "run")


def write_run(folder: Path, suite: str, step: int, losses: list[float]) -> Path:
    whole = loss_result(losses, suite=suite, step=step)
    write_result(result_path(folder, suite, step, "run"), whole)
    return folder


def test_compare_takes_the_last_evaluation_of_each_common_suite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write_run(a, "s", 100, [2.0] * 20)
    write_run(a, "s", 20, [9.0] * 20)
    write_run(a, "only-a", 100, [1.0] * 20)
    write_result(result_path(a, "s", None, "base"), loss_result([7.0] * 20, model="base", step=None))
    write_run(b, "s", 60, [1.5] * 20)
    assert {suite: found["step"] for suite, found in latest_results(a).items()} == {"s": 100, "only-a": 100}
    rows = compare(a, b, resamples=200)
    assert [(row["suite"], row["metric"]) for row in rows] == [("s", "loss"), ("s", "perplexity")]
    loss = rows[0]
    assert (loss["step_a"], loss["step_b"], loss["direction"]) == (100, 60, "lower")
    assert (loss["baseline"], loss["candidate"], loss["better"]) == (2.0, 1.5, True)
    assert "only-a" in caplog.text
    text = table(rows, "a", "b")
    assert "loss ↓" in text and "b better" in text and "-0.5" in text


def test_compare_says_what_is_missing(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", "s", 1, [1.0] * 20), tmp_path / "b"
    with pytest.raises(UserError, match="no evaluation of a run"):
        compare(a, b)
    write_run(b, "t", 1, [1.0] * 20)
    with pytest.raises(UserError, match=r"none of the suites s of"):
        compare(a, b)
