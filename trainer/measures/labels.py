"""Measures of labels: accuracy, macro-F1 with its table, and the agreement of annotators.

A label is any hashable value; texts are compared after ``text.normalise`` (outer blanks, runs of white space), so that
a generated label may carry a trailing newline. In agreement, None is a missing label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from trainer.config.errors import UserError
from trainer.measures.pairs import check_pairs
from trainer.measures.text import normalise

if TYPE_CHECKING:
    import numpy as np

Label = TypeVar("Label", bound=Hashable)


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one class against the rest; ``support`` counts its references."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class LabelReport:
    """What a classifier did, class by class."""

    labels: tuple[Hashable, ...]
    per_class: dict[Hashable, ClassScore]
    accuracy: float
    macro_f1: float  # over the classes that occur in the references
    confusion: tuple[tuple[int, ...], ...]  # [reference class, predicted class + 1]; last column: none of the classes


def _as_label(label: Hashable) -> Hashable:
    return normalise(label) if isinstance(label, str) else label


def _classes(references: Sequence[Hashable], labels: Sequence[Hashable] | None) -> tuple[Hashable, ...]:
    """The declared classes, or those of the references in a stable order."""
    found = {_as_label(reference) for reference in references}
    if labels is None:
        return tuple(sorted(found, key=lambda label: (type(label).__name__, str(label))))
    declared = tuple(dict.fromkeys(_as_label(label) for label in labels))
    if unknown := found.difference(declared):
        raise UserError(f"references: label {next(iter(unknown))!r}: not among the declared {len(declared)} labels")
    return declared


def _codes(
    predictions: Sequence[Hashable], references: Sequence[Hashable], labels: Sequence[Hashable] | None
) -> tuple[tuple[Hashable, ...], np.ndarray, np.ndarray]:
    """Classes, predicted and true class numbers [examples]; a prediction outside the classes has number len(classes).

    Such a prediction is an error of its true class and no class of its own: free text that a model writes in place of
    a label would otherwise add classes of F1 zero, and the macro average would measure how varied its errors are.
    """
    import numpy as np  # 0.1 s; this package imports without it

    check_pairs(predictions, references, empty=False)
    classes = _classes(references, labels)
    number = {label: position for position, label in enumerate(classes)}
    predicted = np.array([number.get(_as_label(label), len(classes)) for label in predictions])  # [examples]
    expected = np.array([number[_as_label(label)] for label in references])  # [examples]
    return classes, predicted, expected


def accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> list[float]:
    """1.0 per example whose label is right, else 0.0; the mean is the accuracy."""
    check_pairs(predictions, references)
    return [
        float(_as_label(prediction) == _as_label(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def macro_f1_by_index(
    predictions: Sequence[Hashable], references: Sequence[Hashable], labels: Sequence[Hashable] | None = None
) -> Callable[[np.ndarray], float]:
    """Macro-F1 of any resample, as a function of example indices [resampled examples]; for ``significance``.

    Averages over the classes that occur in the references of that resample.
    """
    import numpy as np  # 0.1 s; this package imports without it

    classes, predicted, expected = _codes(predictions, references, labels)
    size = len(classes) + 1
    hits = np.where(predicted == expected, expected, size - 1)  # [examples]; a miss falls in the last bin

    def value(indices: np.ndarray) -> float:
        right, said, true = (
            np.bincount(codes[indices], minlength=size)[:-1] for codes in (hits, predicted, expected)
        )  # [classes] each
        present = true > 0
        return float((2.0 * right[present] / (said + true)[present]).mean())

    return value


def macro_f1(
    predictions: Sequence[Hashable], references: Sequence[Hashable], labels: Sequence[Hashable] | None = None
) -> float:
    """Unweighted mean of the F1 of the classes that occur in the references, 0 to 1.

    The mean of the classes' F1, not the F1 of the mean precision and recall (Opitz and Burst 2019). A prediction that
    is none of the classes counts against its true class. Raises UserError for an empty corpus, or for a reference
    outside the declared ``labels``.
    """
    import numpy as np  # 0.1 s; this package imports without it

    return macro_f1_by_index(predictions, references, labels)(np.arange(len(references)))


def label_report(
    predictions: Sequence[Hashable], references: Sequence[Hashable], labels: Sequence[Hashable] | None = None
) -> LabelReport:
    """Table by class and confusion matrix; ``labels`` declares classes and their order. Raises as ``macro_f1``."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # 1.5 s; the table alone needs it

    classes, predicted, expected = _codes(predictions, references, labels)
    numbers = list(range(len(classes)))
    precision, recall, f1, support = precision_recall_fscore_support(
        expected, predicted, labels=numbers, average=None, zero_division=0.0
    )
    confusion = confusion_matrix(expected, predicted, labels=[*numbers, len(classes)])[:-1]  # [classes, classes + 1]
    return LabelReport(
        labels=classes,
        per_class={
            label: ClassScore(float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
            for i, label in enumerate(classes)
        },
        accuracy=float((predicted == expected).mean()),
        macro_f1=float(f1[support > 0].mean()),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def cohen_kappa(first: Sequence[Label | None], second: Sequence[Label | None]) -> float:
    """Agreement of two annotators beyond chance, -1 to 1 (Cohen 1960); items that either left out are not counted.

    1.0 where both gave every item one and the same label: kappa is 0/0 there, and agreement is complete.
    Raises UserError for unequal lengths or where no item has both labels.
    """
    check_pairs(first, second, "first annotator", "labels of the second")
    pairs = [(left, right) for left, right in zip(first, second, strict=True) if left is not None and right is not None]
    if not pairs:
        raise UserError("cohen_kappa: 0 items labelled by both annotators: agreement needs at least one")
    total = len(pairs)
    observed = sum(left == right for left, right in pairs) / total
    left_counts, right_counts = (Counter(side) for side in zip(*pairs, strict=True))
    chance = sum(count * right_counts[label] for label, count in left_counts.items()) / total**2
    return 1.0 if chance == 1.0 else (observed - chance) / (1.0 - chance)


def fleiss_kappa(items: Sequence[Sequence[Label]]) -> float:
    """Agreement of a fixed number of ratings per item beyond chance (Fleiss 1971); ``items`` holds each item's labels.

    1.0 where one label was given throughout (0/0, as in ``cohen_kappa``). Raises UserError where items have different
    numbers of labels, a missing one, or fewer than two: ``krippendorff_alpha`` takes those.
    """
    sizes = {len(ratings) for ratings in items}
    if len(sizes) != 1 or min(sizes) < 2 or any(label is None for ratings in items for label in ratings):
        raise UserError(
            f"fleiss_kappa: {sorted(sizes)} labels an item: it needs one number of at least 2 and none missing; "
            "use krippendorff_alpha"
        )
    raters = sizes.pop()
    counts = [Counter(ratings) for ratings in items]
    agreeing = sum(sum(count * (count - 1) for count in item.values()) for item in counts)  # ordered pairs
    observed = agreeing / (len(items) * raters * (raters - 1))
    shares = sum(counts, Counter())
    chance = sum((count / shares.total()) ** 2 for count in shares.values())
    return 1.0 if len(shares) == 1 else (observed - chance) / (1.0 - chance)


def krippendorff_alpha(items: Sequence[Sequence[Label | None]]) -> float:
    """Nominal alpha, at most 1 (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C).

    ``items`` holds each item's labels from any number of annotators; None is a missing one, and an item with fewer
    than two labels has no pair and is not counted. 1.0 where one label was given throughout (0/0: nothing varies).
    Raises UserError where no item has two labels.
    """
    counts = [Counter(label for label in ratings if label is not None) for ratings in items]
    counts = [item for item in counts if item.total() >= 2]
    if not counts:
        raise UserError("krippendorff_alpha: 0 items with two labels: agreement needs at least one")
    totals = sum(counts, Counter())
    values = totals.total()
    # Off the diagonal of the coincidence matrix: each item's ordered pairs of unlike labels over (its labels - 1).
    observed = sum(
        (item.total() ** 2 - sum(count**2 for count in item.values())) / (item.total() - 1) for item in counts
    )
    expected = (values**2 - sum(count**2 for count in totals.values())) / (values - 1)
    return 1.0 if expected == 0 else 1.0 - observed / expected
