"""Checks of one source against what will read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.problems import Problem
from trainer.config.schema import Recipe, Source

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".gguf")
CONVERSATIONS = ("messages", "sharegpt", "alpaca", "prompt-completion")
HUB_KEYS = ("split", "subset", "revision", "streaming")


def is_local(path: str) -> bool:
    """Whether a path is meant on this machine, not as a hub id: by its look, or because it is there."""
    looks = path.startswith(("/", ".", "~")) or path.endswith(("/", *FILE_SUFFIXES)) or path.count("/") > 1
    try:
        return looks or Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a name too long for the system, or `~someone`
        return looks


def source_problems(recipe: Recipe, name: str, source: Source) -> Iterator[Problem]:
    """What would be ignored in a source, or cannot be used as the recipe uses it."""
    yield from _unread(name, source)
    yield from _format(recipe, name, source)
    objectives = {stage.objective.name for stage in recipe.stages if name in stage.mixture}
    if objectives == {"language-modeling"} and source.format in CONVERSATIONS and _given(source, "train_on"):
        remedy = "`objective: language-modeling` trains on every token; remove it or use `supervised`"
        yield Problem(("sources", name, "train_on"), source.train_on, remedy)


def _given(source: Source, field: str) -> bool:
    return getattr(source, field) != Source.model_fields[field].get_default(call_default_factory=True)


def _unread(name: str, source: Source) -> Iterator[Problem]:
    def problem(field: str, remedy: str) -> Iterator[Problem]:
        if _given(source, field):
            yield Problem(("sources", name, field), getattr(source, field), remedy)

    if source.format not in CONVERSATIONS:
        for field in ("train_on", "system"):
            yield from problem(field, f"format {source.format} has no turns; remove it")
    if source.on_bad_row == "error":
        yield from problem("max_bad_rows", "only read by `on_bad_row: skip`; set that or remove it")
    if not is_local(source.path):
        yield from problem("encoding", "only read for local files; remove it")
    elif not _is_dataset_folder(source.path):
        for field in HUB_KEYS:
            yield from problem(field, "only read for hub datasets; remove it, or mend `path`")
    if source.path.endswith(".parquet"):
        yield from problem("encoding", "Parquet has its own; remove it")


def _is_dataset_folder(path: str) -> bool:
    folder = Path(path).expanduser()
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _format(recipe: Recipe, name: str, source: Source) -> Iterator[Problem]:
    key = ("sources", name, "format")
    trained = [stage for stage in recipe.stages if name in stage.mixture]
    used = bool(trained) or any(suite.source == name for suite in recipe.evaluation.suites)
    classifies = recipe.model.kind == "classification"
    if used and classifies and source.format != "text-label":
        yield Problem(key, source.format, "classification reads `text-label`; change the format or `model.kind`")
    if used and not classifies and source.format == "text-label":
        remedy = "only read by `model.kind: classification`; a causal model reads `prompt-completion` or `text`"
        yield Problem(key, source.format, remedy)
    if source.format == "text" and any(stage.objective.name == "supervised" for stage in trained):
        yield Problem(key, "text", "has no answers; use `objective: {name: language-modeling}`")
