"""Stages with what they take from the top level filled in."""

from __future__ import annotations

from typing import Any

from trainer.config.overrides import merge
from trainer.config.problems import ABSENT, Problem, no_source, report
from trainer.config.written import INHERITED

READERS: dict[str, dict[str, tuple[str, ...]]] = {  # section -> key -> the `name`s that read it; others are always read
    "optimizer": {
        "betas": ("adamw", "adamw8bit", "lion", "muon"),
        "eps": ("adamw", "adamw8bit", "muon"),
        "momentum": ("sgd", "muon"),
    },
    "schedule": {
        "floor": ("linear", "cosine", "cosine-restarts", "polynomial", "inverse-sqrt", "wsd", "plateau"),
        "cycles": ("cosine-restarts",),
        "power": ("polynomial",),
        "decay": ("wsd",),
        "metric": ("plateau",),
        "factor": ("plateau",),
        "patience": ("plateau",),
        "threshold": ("plateau",),
    },
    "objective": {"class_weights": ("classification",)},
}
ALTERNATIVES = {"batch": ("examples", "tokens")}  # a stage that gives the one does without the shared other


def inherit(data: dict[str, Any]) -> dict[str, Any]:
    """The resolved form of a recipe whose single keys are right: every stage has its own keys; shared ones are gone.

    Sections are merged key by key. A stage that names another method than the shared one leaves out the shared keys
    that its method does not read. Raises UserError for a shared key that so reaches no stage, or a missing mixture.
    """
    shared = {key: data[key] for key in INHERITED if key in data}
    stages = data.get("stages") or [{"name": "main"}]
    resolved = {key: value for key, value in data.items() if key not in INHERITED}
    resolved["stages"] = [
        _filled(merge(_heard(shared, stage), stage), index, data) for index, stage in enumerate(stages)
    ]
    _check_reached(shared, stages)
    resolved["output"] = data.get("output") or f"runs/{data['name']}"
    return resolved


def _heard(shared: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """The shared keys without those that a stage's own choice of method or unit puts out of force."""
    heard = {}
    for section, values in shared.items():
        own = stage.get(section, {})
        heard[section] = {key: value for key, value in values.items() if not _displaced(section, key, values, own)}
    return heard


def _displaced(section: str, key: str, values: dict[str, Any], own: dict[str, Any]) -> bool:
    readers = READERS.get(section, {}).get(key)
    if readers and own.get("name", values.get("name")) != values.get("name"):
        return own["name"] not in readers
    alternatives = ALTERNATIVES.get(section, ())
    return key in alternatives and own.get(key) is None and any(own.get(other) is not None for other in alternatives)


def _check_reached(shared: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    heard = [_heard(shared, stage) for stage in stages]
    for section, values in shared.items():
        for key, value in values.items():
            if all(key not in each[section] for each in heard):
                raise report([Problem((section, key), value, "every stage puts it out of force; remove it")])


def _filled(stage: dict[str, Any], index: int, data: dict[str, Any]) -> dict[str, Any]:
    stage.setdefault("name", f"stage-{index}")
    if "mixture" not in stage:
        stage["mixture"] = _only_source(index, data)
    if all(stage.setdefault("batch", {}).get(unit) is None for unit in ("examples", "tokens")):
        stage["batch"] = {**stage["batch"], "examples": 32}
    if all(stage.setdefault("until", {}).get(unit) is None for unit in ("epochs", "steps")):
        stage["until"] = {**stage["until"], "epochs": 1.0}
    return stage


def _only_source(index: int, data: dict[str, Any]) -> dict[str, float]:
    held_out = [suite["source"] for suite in data.get("evaluation", {}).get("suites", [])]
    for place, name in enumerate(held_out):
        if name not in data["sources"]:  # else it would be told as a missing mixture
            raise report([no_source(name, data["sources"], ("evaluation", "suites", place, "source"))])
    training = [name for name in data["sources"] if name not in held_out]
    if len(training) == 1:
        return {training[0]: 1.0}
    key = ("stages", index, "mixture") if data.get("stages") else ("mixture",)
    if training:
        names = ", ".join(training[:8])
        remedy = f"missing, and several sources could train ({names}); write e.g. `mixture: {{{training[0]}: 1.0}}`"
    else:
        remedy = "missing, and every source is held out by a suite; add a source to train on"
    raise report([Problem(key, ABSENT, remedy)])
