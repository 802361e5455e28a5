from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.measures import labels

DATA = Path(__file__).parents[3] / "shared" / "data"
LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def test_accuracy_ignores_blanks_around_a_label() -> None:
    assert labels.accuracy(["spam\n", "Spam", 1], ["spam", "spam", 1]) == [1.0, 0.0, 1.0]


def test_report_by_hand() -> None:
    references = ["a", "a", "a", "b", "b", "c"]
    predictions = ["a", "a", "b", "b", "none of them", "b"]
    report = labels.label_report(predictions, references)
    assert report.labels == ("a", "b", "c")
    assert report.confusion == ((2, 1, 0, 0), (0, 1, 0, 1), (0, 1, 0, 0))
    assert report.per_class["a"] == labels.ClassScore(1.0, pytest.approx(2 / 3), pytest.approx(0.8), 3)
    assert report.per_class["b"] == labels.ClassScore(pytest.approx(1 / 3), 0.5, pytest.approx(0.4), 2)
    assert report.per_class["c"].f1 == 0.0
    assert report.accuracy == pytest.approx(0.5)
    assert report.macro_f1 == pytest.approx(0.4)
    assert labels.macro_f1(predictions, references) == pytest.approx(0.4)


def test_macro_f1_does_not_depend_on_how_varied_the_errors_are() -> None:
    references = ["a", "a", "b", "b"]
    assert labels.macro_f1(["a", "x", "b", "y"], references) == labels.macro_f1(["a", "x", "b", "x"], references)


def test_declared_labels() -> None:
    report = labels.label_report(["b"], ["a"], labels=["b", "a", "z"])
    assert report.labels == ("b", "a", "z")
    assert report.confusion == ((0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0))
    assert report.macro_f1 == 0.0
    with pytest.raises(UserError, match="label 'q': not among the declared 1 labels"):
        labels.macro_f1(["a"], ["q"], labels=["a"])
    with pytest.raises(UserError, match="0 examples"):
        labels.macro_f1([], [])


@settings(max_examples=50, deadline=None)
@given(LABELS)
def test_macro_f1_equals_sklearn_over_the_classes_of_the_references(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import f1_score

    predictions, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expected = f1_score(references, predictions, labels=sorted(set(references)), average="macro", zero_division=0)
    assert labels.macro_f1(predictions, references) == pytest.approx(expected)
    assert labels.label_report(predictions, references).macro_f1 == pytest.approx(expected)
    indices = np.array([0, len(pairs) - 1, 0])
    resample = [predictions[i] for i in indices], [references[i] for i in indices]
    assert labels.macro_f1_by_index(predictions, references)(indices) == pytest.approx(labels.macro_f1(*resample))


def test_cohen_kappa_by_hand() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, chance 0.5.
    first = ["y"] * 25 + ["n"] * 25 + [None, "y"]
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15 + ["y", None]
    assert labels.cohen_kappa(first, second) == pytest.approx(0.4)
    assert labels.cohen_kappa(["y", "y"], ["y", "y"]) == 1.0
    assert labels.cohen_kappa(["y", "n"], ["n", "y"]) == pytest.approx(-1.0)
    with pytest.raises(UserError, match="0 items labelled by both"):
        labels.cohen_kappa([None], ["y"])


@settings(max_examples=50, deadline=None)
@given(LABELS.filter(lambda pairs: len({label for pair in pairs for label in pair}) > 1))
def test_cohen_kappa_equals_sklearn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import cohen_kappa_score

    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert labels.cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))


def test_fleiss_kappa_of_the_textbook_table() -> None:
    # Ten items, fourteen raters, five categories: kappa 0.210.
    table = [
        (0, 0, 0, 0, 14),
        (0, 2, 6, 4, 2),
        (0, 0, 3, 5, 6),
        (0, 3, 9, 2, 0),
        (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0),
        (3, 2, 6, 3, 0),
        (2, 5, 3, 2, 2),
        (6, 5, 2, 1, 0),
        (0, 2, 2, 3, 7),
    ]
    items = [[label for label, count in enumerate(row) for _ in range(count)] for row in table]
    assert labels.fleiss_kappa(items) == pytest.approx(0.210, abs=5e-4)
    assert labels.fleiss_kappa([["a", "a"], ["a", "a"]]) == 1.0
    for bad in ([["a", "b"], ["a"]], [["a"]], [], [["a", None]]):
        with pytest.raises(UserError, match="use krippendorff_alpha"):
            labels.fleiss_kappa(bad)


def test_krippendorff_alpha_of_his_own_example() -> None:
    # Krippendorff 2011, section C: four observers, twelve units, missing labels; nominal alpha 0.743.
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    items = list(zip(*rows, strict=True))
    assert labels.krippendorff_alpha(items) == pytest.approx(0.743, abs=5e-4)
    # The order of the annotators, and items with one label, do not count.
    assert labels.krippendorff_alpha([item[::-1] for item in items] + [(7, None)]) == pytest.approx(
        labels.krippendorff_alpha(items)
    )
    assert labels.krippendorff_alpha([("a", "a"), ("a", "a")]) == 1.0
    with pytest.raises(UserError, match="0 items with two labels"):
        labels.krippendorff_alpha([("a", None)])


@pytest.mark.parametrize(("name", "expected"), [("crowd_dog", 0.519), ("crowd_duck", 0.126), ("crowd_product", 0.264)])
def test_krippendorff_alpha_of_real_crowds(name: str, expected: float) -> None:
    path = DATA / name / "data.jsonl"
    if not path.exists():
        pytest.skip(f"{name} is not on this machine")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = [[given["label"] for given in row["labels"]] for row in rows]
    assert labels.krippendorff_alpha(items) == pytest.approx(expected, abs=5e-4)
