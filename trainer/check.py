"""`tunesmith check`: what a recipe comes to, before anything trains. Without data it needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import Recipe, Source, Stage, UserError, dump_recipe
from trainer.config.check import ENGINE_READERS
from trainer.config.check_sources import is_local
from trainer.config.memory import estimate
from trainer.config.model_facts import ModelFacts, UnknownModel, check_gguf, model_facts
from trainer.config.model_files import check_model_folder
from trainer.data.tokenizer import read_template
from trainer.tracking.redact import known_secrets, published

FEW_TARGETS = 0.01  # share of supervised tokens below which most of the compute is prompt
MUCH_CUT = 0.1  # share of truncated rows above which max_length is the first suspect
RANKS = (1, 2, 4, 8)  # one server


def check_recipe(recipe: Recipe, data: bool) -> dict[str, Any]:
    """Plain data for `render` and for JSON: `recipe`, `yaml`, `stages`, `sources`, `memory`, `warnings`.

    `data`: read and tokenise the sources (cached), which gives examples, tokens, supervised tokens, steps and epochs of
    each stage. Without it they are null unless the recipe says them. `memory` holds `ranks` (one estimate for each
    number of devices, bytes) or `unknown`, the reason. Raises UserError for a path that is not there, an unknown
    metric, bad data.
    """
    check_paths(recipe)
    check_metrics(recipe)
    rows: list[dict[str, Any]] = [{} for _ in recipe.stages]
    counts: dict[str, dict[str, int]] = {}
    if data:
        from trainer.data.plan import summary  # brings the tokenizer: only where data are read
        from trainer.data.prepare import prepare

        prepared = prepare(recipe)
        rows = summary(recipe, prepared)
        counts = {name: dict(source.counts) for name, source in prepared.items()}
    stages = [stage_row(stage, row) for stage, row in zip(recipe.stages, rows, strict=True)]
    memory, facts = memory_rows(recipe)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "yaml": dump_recipe(recipe),
        "stages": stages,
        "sources": counts,
        "memory": memory,
        "warnings": warnings(recipe, stages, counts, facts),
    }


# ---------------------------------------------------------------- what is there


def check_secrets(data: Any, key: str = "") -> None:
    """Raise UserError where a value of the recipe is a secret: the recipe is copied, printed and sent to trackers."""
    if isinstance(data, dict | list):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            check_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, str) and published(data, known_secrets(os.environ)):
        raise UserError(
            f"{key}: holds a secret, and a recipe is copied into the run's records; take it out and leave it to the "
            "environment (HF_TOKEN, WANDB_API_KEY)"
        )


def check_paths(recipe: Recipe) -> None:
    """Raise UserError for a local model, template or source that is not there, and for secrets. Hub ids are left to the
    hub."""
    check_secrets(recipe.model_dump(mode="json"))
    model = recipe.model
    if is_local(model.path):
        path = Path(model.path).expanduser()
        if path.suffix == ".gguf" and not path.is_file():
            raise UserError(f"model.path: {model.path!r}: no such file; give a .gguf file, a folder or a hub id")
        if not path.exists():
            raise UserError(
                f"model.path: {model.path!r}: no such folder; give a folder, a .gguf file or a hub id (owner/name)"
            )
        if path.suffix != ".gguf" and not (path / "config.json").is_file():
            raise UserError(f"model.path: {model.path!r}: has no config.json; give a model's folder")
        if path.suffix == ".gguf":
            check_gguf(path)
        else:
            check_model_folder(path, repr(model.path), trusted=model.trust_remote_code)
    if model.chat_template:
        read_template(model.chat_template)
    for name, source in recipe.sources.items():
        _check_source_path(f"sources.{name}", source)


def _check_source_path(key: str, source: Source) -> None:
    from trainer.data.files import is_local as is_local_source
    from trainer.data.files import source_files  # no torch; knows which files of a folder are data

    if is_local_source(source.path, f"{key}.path"):
        root = Path(source.path).expanduser()
        if not any((root / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            source_files(source.path, f"{key}.path")


def check_metrics(recipe: Recipe) -> None:
    """Raise UserError for a metric that nothing computes, with the nearest one."""
    from trainer.measures import metric_named

    for index, suite in enumerate(recipe.evaluation.suites):
        for name in suite.metrics:
            try:
                metric_named(name)
            except UserError as error:
                raise UserError(f"evaluation.suites.{index}.metrics: {error}") from error


# ---------------------------------------------------------------- stages


def stage_row(stage: Stage, row: Mapping[str, Any]) -> dict[str, Any]:
    """One stage in numbers; `row` is the data's summary, empty where no data were read."""
    steps = row.get("steps", stage.until.steps if stage.until.epochs is None else None)
    tokens, targets = row.get("tokens"), row.get("target_tokens")
    warmup = stage.schedule.warmup
    warmup_steps = int(warmup) if warmup >= 1 else None if steps is None else round(warmup * steps)
    return {
        "stage": stage.name,
        "objective": stage.objective.name,
        "examples": row.get("examples"),
        "tokens": tokens,
        "supervised_tokens": targets,
        "supervised_share": targets / tokens if tokens and targets is not None else None,
        "steps": steps,
        "epochs": row.get("epochs"),
        "lr": peak_lr(stage),
        "warmup_steps": warmup_steps,
    }


def peak_lr(stage: Stage) -> float:
    """The peak learning rate under the stage's scaling rule: that of trainer.optim.scaled_lr, which needs torch."""
    scale = stage.optimizer.scale_lr
    ratio = (stage.batch.examples or stage.batch.tokens or 1) / scale.reference_batch
    return stage.optimizer.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scale.rule]


# ---------------------------------------------------------------- memory


def memory_rows(recipe: Recipe) -> tuple[dict[str, Any], ModelFacts | None]:
    """(the estimates or the reason why there are none, the model's facts or None)."""
    device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    try:
        facts = model_facts(recipe.model)
    except UnknownModel as reason:
        return {"unknown": f"model.path: {recipe.model.path}: {reason}"}, None
    ranks = {"single": RANKS[:1], "fsdp2": RANKS[1:]}.get(recipe.engine.kind, RANKS)
    if recipe.model.quantization == "int8":
        ranks = RANKS[:1]
    return {"device": device, "ranks": [estimate(recipe, facts, count, device).as_dict() for count in ranks]}, facts


# ---------------------------------------------------------------- warnings


def warnings(
    recipe: Recipe, stages: list[dict[str, Any]], counts: Mapping[str, Mapping[str, int]], facts: ModelFacts | None
) -> list[str]:
    """One line for each thing that is allowed and likely unmeant."""
    found = []
    used = {name for stage in recipe.stages for name in stage.mixture} | {s.source for s in recipe.evaluation.suites}
    found += [f"sources.{name}: used by no stage and no suite" for name in recipe.sources if name not in used]
    found += _shared_files(recipe)
    for index, row in enumerate(stages):
        found += _stage_warnings(f"stages.{index}", row)
    for name, count in counts.items():
        if count["truncated"] > MUCH_CUT * max(count["rows"], 1):
            found.append(
                f"sources.{name}: {count['truncated']} of {count['rows']} rows truncated; model.max_length is short"
            )
        lost = {key: count[key] for key in ("skipped_bad", "dropped_long", "no_target") if count[key]}
        if sum(lost.values()) > MUCH_CUT * max(count["rows"], 1):
            told = ", ".join(f"{value} {key}" for key, value in lost.items())
            found.append(f"sources.{name}: {told} of {count['rows']} rows left out")
    if recipe.engine.kind == "auto":
        found += [
            f"engine.{field}: is read under several processes only (fsdp2)"
            for field, readers in ENGINE_READERS.items()
            if "fsdp2" in readers
            and getattr(recipe.engine, field) != type(recipe.engine).model_fields[field].get_default()
        ]
    if recipe.engine.kind == "auto" and any(stage.optimizer.name == "muon" for stage in recipe.stages):
        found.append("optimizer.name: muon needs one process; several take fsdp2, which refuses it")
    if facts is not None and recipe.tuning.method == "last-layers" and (recipe.tuning.layers or 0) > facts.layers:
        raise UserError(f"tuning.layers: {recipe.tuning.layers}: the model has {facts.layers} blocks; lower it")
    return found


def _stage_warnings(key: str, row: Mapping[str, Any]) -> list[str]:
    found = []
    share, steps, warm = row["supervised_share"], row["steps"], row["warmup_steps"]
    if share is not None and share < FEW_TARGETS and row["objective"] != "classification":
        found.append(f"{key}: {share:.2%} of the tokens are supervised; most of the compute goes to prompts")
    if steps is not None and warm is not None and warm >= steps:
        found.append(f"{key}.schedule.warmup: {warm} steps of {steps}; the stage ends before the peak learning rate")
    return found


def _shared_files(recipe: Recipe) -> list[str]:
    """Sources of one file, one trained on and one held out: the evaluation would measure memory."""
    held_out = {suite.source for suite in recipe.evaluation.suites}
    trained = {name for stage in recipe.stages for name in stage.mixture}

    def place(name: str) -> tuple[str | None, ...]:
        source = recipe.sources[name]
        return (source.path, source.subset, source.split)

    return [
        f"sources.{held}: the same data as sources.{name}, which is trained on"
        for held in sorted(held_out)
        for name in sorted(trained)
        if held != name and place(held) == place(name)
    ]


# ---------------------------------------------------------------- text


def render(result: Mapping[str, Any]) -> str:
    """The result of `check_recipe` for a reader: recipe, stages, sources, memory, warnings."""
    parts = [result["yaml"].rstrip(), _stages_text(result["stages"])]
    if result["sources"]:
        parts.append(_table("sources", {name: dict(row) for name, row in result["sources"].items()}))
    parts.append(_memory_text(result["memory"]))
    parts += ["\n".join(f"warning: {text}" for text in result["warnings"])] if result["warnings"] else []
    return "\n\n".join(parts)


def _stages_text(stages: list[Mapping[str, Any]]) -> str:
    rows = {}
    for row in stages:
        share = row["supervised_share"]
        passes = [f"{value:.2f}" for value in (row["epochs"] or {}).values()]
        rows[row["stage"]] = {
            "examples": row["examples"],
            "tokens": row["tokens"],
            "supervised": row["supervised_tokens"],
            "share": None if share is None else f"{share:.1%}",
            "steps": row["steps"],
            "epochs": " ".join(passes) or None,
            "peak lr": f"{row['lr']:.3g}",
            "warm-up": row["warmup_steps"],
        }
    return _table("stages", rows)


def _memory_text(memory: Mapping[str, Any]) -> str:
    if "unknown" in memory:
        return f"memory: unknown ({memory['unknown']})"
    rows: dict[str, dict[str, Any]] = {}
    first = memory["ranks"][0]
    for entry in memory["ranks"]:
        name = f"{entry['ranks']} device{'s' if entry['ranks'] > 1 else ''}"
        for part, value in [*entry["parts"].items(), ("peak of a step", entry["total"])]:
            rows.setdefault(part, {})[name] = _size(value)
        if entry["loading"] > entry["total"]:
            rows.setdefault("peak of loading", {})[name] = _size(entry["loading"])
        for part, value in entry["host"].items():
            rows.setdefault(f"host: {part}", {})[name] = _size(value)
    order = [part for part in rows if not part.startswith("peak")] + [part for part in rows if part.startswith("peak")]
    head = f"memory of each device, estimated ({first['parameters']:,} parameters, {first['trainable']:,} trainable)"
    return _table(head, {part: rows[part] for part in order})


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Aligned columns; what is not known is a dash."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [[title, *columns]]
    for name, row in rows.items():
        cells = [row.get(column) for column in columns]
        lines.append([name, *(f"{c:,}" if isinstance(c, int) else "-" if c is None else str(c) for c in cells)])
    title_width = max(len(line[0]) for line in lines[1:])
    widths = [max(len(line[i]) for line in lines) for i in range(1, len(columns) + 1)]
    text = [title + ":"]
    for line in [["", *columns], *lines[1:]]:
        row_text = "  ".join(cell.rjust(width) for cell, width in zip(line[1:], widths, strict=True))
        text.append(f"  {line[0].ljust(title_width)}  {row_text}".rstrip())
    return "\n".join(text)
