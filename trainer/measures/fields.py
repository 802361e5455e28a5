"""Measures of structured extraction: prediction and reference are JSON texts, compared as values.

A text that is not JSON (a cut object, words around it, a code fence), or repeats a key, is a wrong prediction; in a
reference it is an error of the data. Values are equal as JSON defines them: the order of keys and white space do
not count, 1 and 1.0 are one number, and true is not 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import UserError
from trainer.measures.pairs import check_pairs

Path = tuple[str | int, ...]
Field = tuple[str, ...]
Leaf = tuple[str, Any]


@dataclass(frozen=True)
class FieldScore:
    """Micro-averaged counts of one field, or of all fields, over a corpus."""

    correct: int  # leaves found in both
    predicted: int
    expected: int

    @property
    def precision(self) -> float:
        """Share of the predicted leaves that are right; 0.0 where nothing was predicted."""
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the expected leaves that were found; 0.0 where nothing was expected."""
        return self.correct / self.expected if self.expected else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0.0 where there is no leaf on either side."""
        total = self.predicted + self.expected
        return 2.0 * self.correct / total if total else 0.0


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a repeated key")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Leaf]]:
    """Each scalar or empty container under ``value`` with its path; the type keeps true apart from 1."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(value, list) and value:
        for position, child in enumerate(value):
            yield from _leaves(child, (*path, position))
    elif isinstance(value, (dict, list)):
        yield path, ("empty", type(value).__name__)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, ("number", value)
    else:
        yield path, (type(value).__name__, value)


def _parse(text: str) -> dict[Path, Leaf] | None:
    """Leaves by path, which determine the value; None for what is not JSON."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        return dict(_leaves(value))
    except (ValueError, RecursionError):  # a model may well write ten thousand opening brackets, or as many digits
        return None


def _parse_pairs(
    predictions: Sequence[str], references: Sequence[str]
) -> Iterator[tuple[dict[Path, Leaf] | None, dict[Path, Leaf]]]:
    check_pairs(predictions, references)
    for position, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        expected = _parse(reference)
        if expected is None:
            raise UserError(f"references[{position}]: {reference[:60]!r}: not JSON: mend it or choose a text metric")
        yield _parse(prediction), expected


def _bag(leaves: dict[Path, Leaf] | None) -> Counter[tuple[Field, Leaf]]:
    """Leaves under their field; positions in an array are dropped, so its order does not count."""
    return Counter(
        (tuple(step for step in path if isinstance(step, str)), leaf) for path, leaf in (leaves or {}).items()
    )


def json_match(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1.0 per example whose two texts are JSON of equal value (arrays in order), else 0.0.

    Raises UserError for a reference that is not JSON.
    """
    return [float(predicted == expected) for predicted, expected in _parse_pairs(predictions, references)]


def field_accuracy(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Share of the reference's leaves, per example, that the prediction has under the same field with an equal value.

    A field too many costs nothing here; ``field_f1`` counts it. Raises UserError for a reference that is not JSON.
    """
    shares = []
    for predicted, expected in _parse_pairs(predictions, references):
        bag = _bag(expected)
        shares.append((_bag(predicted) & bag).total() / bag.total())
    return shares


def field_f1(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 per example over the bag of (field, value) leaves; 0.0 for a prediction that is not JSON.

    A field is the path of keys; the elements of an array share one and their order does not count, so in an array of
    objects the fields of two objects may pair across. Raises UserError for a reference that is not JSON.
    """
    values = []
    for predicted, expected in _parse_pairs(predictions, references):
        ours, theirs = _bag(predicted), _bag(expected)
        values.append(2.0 * (ours & theirs).total() / (ours.total() + theirs.total()))
    return values


def field_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, FieldScore]:
    """Micro-averaged scores by dotted field name over the corpus, and of all leaves together under ``""``.

    Raises UserError for a reference that is not JSON. A root that is no object has its leaves under ``"$"``.
    """
    correct: Counter[str] = Counter()
    predicted_count: Counter[str] = Counter()
    expected_count: Counter[str] = Counter()
    for predicted, expected in _parse_pairs(predictions, references):
        ours, theirs = _bag(predicted), _bag(expected)
        for total, bag in ((correct, ours & theirs), (predicted_count, ours), (expected_count, theirs)):
            for (field, _), count in bag.items():
                total[".".join(field) or "$"] += count
    names = sorted(predicted_count.keys() | expected_count.keys())
    table = {"": FieldScore(correct.total(), predicted_count.total(), expected_count.total())}
    return table | {name: FieldScore(correct[name], predicted_count[name], expected_count[name]) for name in names}
