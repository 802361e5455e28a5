"""Cross-field checks: what the schema of a single key cannot see. Pure but for a look whether a path exists; no torch.

A value that nothing would read is refused where it differs from the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import BaseModel

from trainer.config.check_sources import is_local, source_problems
from trainer.config.deepspeed import config_problems, zero_stage
from trainer.config.inherit import READERS
from trainer.config.problems import ABSENT, Key, Problem, no_source
from trainer.config.schema import Recipe, Stage, Suite

TUNING_READERS = {
    "layers": "last-layers", "train_head": "last-layers",
    "rank": "lora", "alpha": "lora", "dropout": "lora", "targets": "lora", "rslora": "lora",
}  # fmt: skip


ENGINE_READERS = {
    "config": "deepspeed", "cpu_offload": "fsdp2, auto", "reshard_after_forward": "fsdp2, auto",
    "shard_size": "fsdp2, auto", "prefetch": "fsdp2, auto", "loading": "fsdp2, deepspeed, auto",
}  # fmt: skip
WHOLE_STATE = {  # what cannot work on shards
    "muon": "orthogonalises whole matrices, which are cut into shards",
    "adamw8bit": "keeps blockwise state that a checkpoint cannot cut into ranges",
}

COMMIT = re.compile(r"[0-9a-f]{40}")


def problems_of(recipe: Recipe) -> list[Problem]:
    """Every combination that cannot work or would be ignored, by its resolved key."""
    return list(_all(recipe))


def _all(recipe: Recipe) -> Iterator[Problem]:
    yield from _output(recipe)
    yield from _model(recipe)
    yield from _tuning(recipe)
    yield from _engine(recipe)
    for name, source in recipe.sources.items():
        yield from source_problems(recipe, name, source)
    names = [stage.name for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        if names.index(stage.name) < index:
            yield Problem(("stages", index, "name"), stage.name, "used twice; give each stage its own name")
        yield from _stage(recipe, stage, ("stages", index))
    for index, suite in enumerate(recipe.evaluation.suites):
        yield from _suite(recipe, suite, ("evaluation", "suites", index))
    yield from _evaluation(recipe)
    yield from _watched(recipe)
    yield from _retention(recipe)
    yield from _guarded(recipe)


def unread(section: BaseModel, key: Key, readers: dict[str, str], chosen: str, selector: str) -> Iterator[Problem]:
    """A problem for each value off its default that `chosen` does not read. `readers`: field -> who reads it."""
    for field, reader in readers.items():
        value = getattr(section, field)
        if chosen not in reader.split(", ") and value != type(section).model_fields[field].get_default():
            yield Problem(
                (*key, field), value, f"only read by `{selector}: {reader}`; remove it or change `{selector}`"
            )


def _output(recipe: Recipe) -> Iterator[Problem]:
    output = recipe.output
    longest = max(len(part.encode("utf-8", "replace")) for part in output.split("/"))
    if "\n" in output or len(output) > 1000 or longest > 255 or not output.strip():
        yield Problem(("output",), output, "not a usable folder name; give a plain path")
    if ".." in output.replace("\\", "/").split("/"):
        yield Problem(("output",), output, "must not climb with `..`; give a plain or absolute path")


def _model(recipe: Recipe) -> Iterator[Problem]:
    model, labels = recipe.model, recipe.model.labels or []
    if model.kind == "classification" and len(labels) < 2:
        yield Problem(("model", "labels"), model.labels, "classification needs two or more; write `labels: [no, yes]`")
    if len(set(labels)) < len(labels):
        yield Problem(("model", "labels"), labels, "a label is there twice; give each class one name")
    if model.kind == "causal-lm" and model.labels:
        yield Problem(("model", "labels"), labels, "only read by `kind: classification`; set the kind or remove them")
    if model.trust_remote_code and not is_local(model.path) and not COMMIT.fullmatch(model.revision or ""):
        remedy = "needs `model.revision: <commit>`, 40 hex digits; a branch or tag may hold other code tomorrow"
        yield Problem(("model", "trust_remote_code"), True, remedy)
    if model.revision and is_local(model.path):
        yield Problem(("model", "revision"), model.revision, "only hub models have revisions; remove it")
    if model.quantization != "none" and recipe.tuning.method != "lora":
        remedy = "quantised weights cannot train; use `method: lora` or `model.quantization: none`"
        yield Problem(("tuning", "method"), recipe.tuning.method, remedy)
    if model.quantization != "none" and model.path.endswith(".gguf"):
        remedy = "a .gguf file is quantised already; export it as a folder first, or use `none`"
        yield Problem(("model", "quantization"), model.quantization, remedy)
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield Problem(
            ("model", "attention"), model.attention, "computes in bfloat16 only; set `dtype: bfloat16` or `auto`"
        )
    chats = any(source.format not in ("text", "text-label") for source in recipe.sources.values())
    if model.chat_template and not chats:
        yield Problem(("model", "chat_template"), model.chat_template, "no source holds conversations; remove it")


def _tuning(recipe: Recipe) -> Iterator[Problem]:
    tuning = recipe.tuning
    yield from unread(tuning, ("tuning",), TUNING_READERS, tuning.method, "method")
    if tuning.method == "last-layers" and tuning.layers is None:
        yield Problem(
            ("tuning", "layers"), ABSENT, "missing; give the number of last blocks that train, e.g. `layers: 4`"
        )
    if not tuning.targets or (isinstance(tuning.targets, list) and "" in tuning.targets):
        yield Problem(
            ("tuning", "targets"), tuning.targets, "names no module; use `all-linear` or e.g. `[q_proj, v_proj]`"
        )


def _engine(recipe: Recipe) -> Iterator[Problem]:
    engine = recipe.engine
    yield from unread(engine, ("engine",), ENGINE_READERS, engine.kind, "kind")
    if engine.kind in ("fsdp2", "deepspeed") and recipe.model.quantization == "int8":
        remedy = "int8 weights cannot be sharded; use `nf4`, or `engine.kind: single`"
        yield Problem(("model", "quantization"), "int8", remedy)
    if engine.kind == "deepspeed":
        found = list(config_problems(engine.config))
        yield from found
        if not found and engine.loading == "sharded" and (stage := zero_stage(engine.config)) < 3:
            remedy = f"ZeRO {stage} keeps the whole model on every rank; use `auto`, or a file of stage 3"
            yield Problem(("engine", "loading"), "sharded", remedy)
    if engine.loading == "sharded":
        yield from _sharded_loading(recipe)


def _sharded_loading(recipe: Recipe) -> Iterator[Problem]:
    """What cannot be read in parts; `loading: auto` reads it whole."""
    model = recipe.model
    reasons = {
        "a .gguf file is dequantised tensor by tensor": model.path.endswith(".gguf"),
        f"`model.quantization: {model.quantization}` quantises each tensor as a whole": model.quantization != "none",
        "with `model.trust_remote_code` the model's code may do anything with its weights": model.trust_remote_code,
    }
    for reason, holds in reasons.items():
        if holds:
            yield Problem(("engine", "loading"), "sharded", f"{reason}; use `auto` or `whole`")


def _stage(recipe: Recipe, stage: Stage, key: Key) -> Iterator[Problem]:
    yield from _mixture(recipe, stage, (*key, "mixture"))
    yield from _batch(recipe, stage, (*key, "batch"))
    yield from _optimizer(recipe, stage, (*key, "optimizer"))
    yield from _objective(recipe, stage, (*key, "objective"))
    schedule = stage.schedule
    readers = {field: ", ".join(names) for field, names in READERS["schedule"].items()}
    yield from unread(schedule, (*key, "schedule"), readers, schedule.name, "name")
    if schedule.warmup >= 1 and not float(schedule.warmup).is_integer():
        yield Problem((*key, "schedule", "warmup"), schedule.warmup, "below 1 a share, from 1 on whole steps")


def _mixture(recipe: Recipe, stage: Stage, key: Key) -> Iterator[Problem]:
    if not stage.mixture:
        yield Problem(key, {}, "empty; name at least one source that no suite holds out")
    for name in stage.mixture:
        if name not in recipe.sources:
            yield no_source(name, recipe.sources, (*key, name))
        elif any(suite.source == name for suite in recipe.evaluation.suites):
            yield Problem((*key, name), stage.mixture[name], "held out by an evaluation suite; train on another source")


def _batch(recipe: Recipe, stage: Stage, key: Key) -> Iterator[Problem]:
    batch, model = stage.batch, recipe.model
    if batch.examples is not None and batch.tokens is not None:
        yield Problem((*key, "tokens"), batch.tokens, "a step is counted in `examples` or `tokens`; set one to null")
    if batch.micro_tokens < model.max_length:
        remedy = f"below model.max_length {model.max_length}: the longest example would not fit; raise it or lower that"
        yield Problem((*key, "micro_tokens"), batch.micro_tokens, remedy)
    if batch.packing == "packed" and model.attention in ("sdpa", "eager"):
        remedy = f"`model.attention: {model.attention}` would mix packed documents; use `auto`, or `attention: varlen`"
        yield Problem((*key, "packing"), "packed", remedy)


def _optimizer(recipe: Recipe, stage: Stage, key: Key) -> Iterator[Problem]:
    optimizer = stage.optimizer
    readers = {field: ", ".join(names) for field, names in READERS["optimizer"].items()}
    yield from unread(optimizer, key, readers, optimizer.name, "name")
    if optimizer.name == "muon" and recipe.tuning.method == "lora":  # LoRA trains matrices alone, all of them Muon's
        yield from unread(optimizer, key, {"betas": "adamw", "eps": "adamw"}, "muon over lora", "name")
    if optimizer.name in WHOLE_STATE and recipe.engine.kind in ("fsdp2", "deepspeed"):
        remedy = f"{WHOLE_STATE[optimizer.name]} under {recipe.engine.kind}; use adamw, or `engine.kind: single`"
        yield Problem((*key, "name"), optimizer.name, remedy)
    rule = optimizer.scale_lr
    yield from unread(rule, (*key, "scale_lr"), {"reference_batch": "linear, sqrt"}, rule.rule, "rule")


def _objective(recipe: Recipe, stage: Stage, key: Key) -> Iterator[Problem]:
    objective, kind = stage.objective, recipe.model.kind
    if (objective.name == "classification") != (kind == "classification"):
        yield Problem((*key, "name"), objective.name, f"does not fit `model.kind: {kind}`; change one of them")
    yield from unread(objective, key, {"class_weights": "classification"}, objective.name, "name")
    labels, weights = recipe.model.labels or [], objective.class_weights
    if objective.name == "classification" and weights is not None and len(weights) != len(labels):
        yield Problem((*key, "class_weights"), weights, f"{len(weights)} for {len(labels)} labels; give one for each")


def _suite(recipe: Recipe, suite: Suite, key: Key) -> Iterator[Problem]:
    if sum(other.name == suite.name for other in recipe.evaluation.suites[: int(key[-1])]):
        yield Problem((*key, "name"), suite.name, "used twice; give each suite its own name")
    needed = {"classify": "classification", "generate": "causal-lm"}.get(suite.kind, recipe.model.kind)
    if needed != recipe.model.kind:
        other = "generate` with exact_match" if suite.kind == "classify" else "classify`"
        yield Problem((*key, "kind"), suite.kind, f"needs `model.kind: {needed}`; use `{other}")
    source = recipe.sources.get(suite.source)
    if source is None:
        yield no_source(suite.source, recipe.sources, (*key, "source"))
    elif suite.kind == "generate" and source.format == "text":
        yield Problem((*key, "kind"), "generate", f"source `{suite.source}` has no answers; use `loss`")
    if suite.kind == "generate" and not suite.metrics:
        yield Problem((*key, "metrics"), suite.metrics, "name what to measure, e.g. `metrics: [exact_match]`")
    if len(set(suite.metrics)) < len(suite.metrics):
        yield Problem((*key, "metrics"), suite.metrics, "a metric is there twice; name it once")
    readers = {"max_new_tokens": "generate", "batch": "generate", "metrics": "generate, classify"}
    yield from unread(suite, key, readers, suite.kind, "kind")


def _evaluation(recipe: Recipe) -> Iterator[Problem]:
    evaluation = recipe.evaluation
    if not evaluation.suites:
        readers = dict.fromkeys(("every", "baseline", "confidence", "resamples"), "suites")
    elif evaluation.baseline == "none":
        readers = dict.fromkeys(("confidence", "resamples"), "base-model")
    else:
        return
    for field in readers:
        value = getattr(evaluation, field)
        if value != type(evaluation).model_fields[field].get_default():
            what = (
                "there is no suite; add one"
                if not evaluation.suites
                else "only read with `baseline: base-model`; set it"
            )
            yield Problem(("evaluation", field), value, f"{what}, or remove the key")


def _watched(recipe: Recipe) -> Iterator[Problem]:
    """Early stopping and plateau need an evaluation that runs during the stage and gives their metric."""
    for index, stage in enumerate(recipe.stages):
        watched: list[tuple[Key, str]] = []
        if stage.until.early_stopping is not None:
            watched.append((("stages", index, "until", "early_stopping", "metric"), stage.until.early_stopping.metric))
        if stage.schedule.name == "plateau":
            watched.append((("stages", index, "schedule", "metric"), stage.schedule.metric))
        for key, metric in watched:
            giving = [suite for suite in recipe.evaluation.suites if gives(suite, metric)]
            if not giving:
                yield Problem(key, metric, "no suite gives it; add a suite, or name a metric that one gives")
            elif not any(suite.every or recipe.evaluation.every for suite in giving):
                yield Problem(key, metric, f"suite `{giving[0].name}` runs only at the end; set `evaluation.every`")


def _retention(recipe: Recipe) -> Iterator[Problem]:
    checkpoint = recipe.checkpoint
    named = checkpoint.metric != type(checkpoint).model_fields["metric"].get_default()
    if (checkpoint.keep_best or named) and not any(gives(s, checkpoint.metric) for s in recipe.evaluation.suites):
        remedy = "no suite gives it; add a suite, or name a metric that one gives"
        yield Problem(("checkpoint", "metric"), checkpoint.metric, remedy)
    if checkpoint.keep_every and not checkpoint.every:
        yield Problem(("checkpoint", "keep_every"), checkpoint.keep_every, "only read with `every`; set that")
    elif checkpoint.keep_every and checkpoint.every and checkpoint.keep_every % checkpoint.every:
        remedy = f"no multiple of `every: {checkpoint.every}`, so few of those steps are saved; make it one"
        yield Problem(("checkpoint", "keep_every"), checkpoint.keep_every, remedy)
    for field in ("asynchronous", "failure_limit"):
        value = getattr(checkpoint, field)
        if not checkpoint.every and value != type(checkpoint).model_fields[field].get_default():
            yield Problem(("checkpoint", field), value, "only read with `every`; set that or remove the key")


def gives(suite: Suite, metric: str) -> bool:
    """Whether a suite reports `metric` (`name`, or `suite/name`)."""
    wanted_suite, _, name = metric.rpartition("/")
    if wanted_suite and wanted_suite != suite.name:
        return False
    names = {"loss": ["loss", "perplexity"], "classify": ["loss", *(suite.metrics or ["accuracy", "macro_f1"])]}
    return name in names.get(suite.kind, suite.metrics)


def _guarded(recipe: Recipe) -> Iterator[Problem]:
    spike = recipe.guard.spike
    readers = dict.fromkeys(("deviations", "window"), "warn, skip, rollback")
    yield from unread(spike, ("guard", "spike"), readers, spike.policy, "policy")
    if spike.policy == "rollback" and not recipe.checkpoint.every:
        remedy = "goes back to a checkpoint; set `checkpoint.every`, or use `skip`"
        yield Problem(("guard", "spike", "policy"), spike.policy, remedy)
    if recipe.guard.replica_check and recipe.engine.kind == "single":
        remedy = "one process holds no copies; remove it, or change `engine.kind`"
        yield Problem(("guard", "replica_check"), recipe.guard.replica_check, remedy)
    if recipe.ema.evaluate and recipe.ema.decay is None:
        yield Problem(("ema", "evaluate"), True, "there is no average; set `ema.decay`, e.g. 0.999")
    elif recipe.ema.evaluate and not recipe.evaluation.suites:
        yield Problem(("ema", "evaluate"), True, "there is no suite; add one, or remove the key")
