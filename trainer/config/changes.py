"""What may differ between a run's recipe and the one given to resume it. No torch: a login node can tell.

Four verdicts, the first pattern that fits a changed key decides:

    free      records, saving, hardware: nothing that an update depends on
    length    learning rate, its schedule, the length, regularisation: allowed, told and recorded
    data      which examples come, in which order, and what is asked of them: only with an explicit flag, recorded
    identity  what the saved tensors are: refused, whatever the flag
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from trainer.config.errors import UserError
from trainer.config.problems import shown
from trainer.config.schema import Recipe

Verdict = Literal["free", "length", "data", "identity"]
FLAG = "--allow-data-change"

RULES: tuple[tuple[str, Verdict], ...] = (
    ("output", "free"),
    ("tracking.*", "free"),
    ("checkpoint.*", "free"),
    ("evaluation.*", "free"),
    ("engine.*", "free"),  # a checkpoint moves between engines
    ("guard.*", "free"),
    ("ema.*", "length"),
    ("model.path", "free"),  # a moved folder; what is in it is compared by its digest
    ("model.revision", "free"),
    ("model.trust_remote_code", "free"),
    ("model.attention", "length"),
    ("model.attention_dropout", "length"),
    ("model.hidden_dropout", "length"),
    ("model.max_length", "data"),
    ("model.chat_template", "data"),
    ("model.*", "identity"),
    ("tuning.dropout", "length"),
    ("tuning.*", "identity"),
    ("stages.*.optimizer.name", "identity"),
    ("stages.*.optimizer.*", "length"),
    ("stages.*.schedule.*", "length"),
    ("stages.*.until.*", "length"),
    ("stages.*.batch.micro_tokens", "length"),  # cuts a step's examples in another way; they stay the same
    ("stages.*.batch.packing", "length"),
    ("sources.*.path", "free"),  # as model.path
    ("sources.*.revision", "free"),
    ("*", "data"),  # sources, mixtures, batch, objective, seed, stages, name
)


@dataclass(frozen=True)
class Change:
    """One resolved key whose value differs."""

    key: str
    old: Any
    new: Any
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.old)} -> {shown(self.new)}"


def verdict_of(key: str) -> Verdict:
    """What a change of this resolved, dotted key means."""
    return next(verdict for pattern, verdict in RULES if fnmatchcase(key, pattern))


def changes(old: Recipe, new: Recipe) -> list[Change]:
    """Every resolved key in which two recipes differ, in the order of the schema; absent values are None.

    A source that no stage draws from, in either recipe, is evaluation's and as free as that.
    """
    trained = {name for recipe in (old, new) for stage in recipe.stages for name in stage.mixture}
    first, second = (dict(flatten(recipe.model_dump(mode="json"))) for recipe in (old, new))
    keys = list(dict.fromkeys([*first, *second]))
    return [
        Change(key, first.get(key), second.get(key), "free" if _held_out(key, trained) else verdict_of(key))
        for key in keys
        if first.get(key) != second.get(key)
    ]


def _held_out(key: str, trained: set[str]) -> bool:
    section, _, rest = key.partition(".")
    return section == "sources" and not any(rest.startswith(f"{name}.") for name in trained)


def flatten(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings and lists; an empty one is its own value."""
    if isinstance(data, dict) and data:
        items: Any = data.items()
    elif isinstance(data, list) and data:
        items = enumerate(data)
    else:
        yield prefix.removesuffix("."), data
        return
    for name, item in items:
        yield from flatten(item, f"{prefix}{name}.")


def check_changes(found: list[Change], output: str, allow_data_change: bool) -> None:
    """Raise UserError where a changed key forbids to go on: with the differences and what helps."""
    if wrong := [change for change in found if change.verdict == "identity"]:
        raise UserError(
            f"output: {output}: holds a run of another recipe ({listed(wrong)}): its tensors would not fit; "
            "choose another `output`, or --fresh"
        )
    if (wrong := [change for change in found if change.verdict == "data"]) and not allow_data_change:
        raise UserError(
            f"output: {output}: holds a run of another recipe ({listed(wrong)}): restore it, choose another `output`, "
            f"or go on with other data by {FLAG}"
        )


def listed(found: list[Change], most: int = 4) -> str:
    """The first changes on one line, and how many more there are."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(str(change) for change in found[:most]) + more
