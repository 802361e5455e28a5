"""Every wrong recipe: one line that names the key as written, the value, and the remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from trainer.config import UserError, build_recipe

GOOD: dict[str, Any] = {
    "name": "good",
    "model": {"path": "owner/model", "max_length": 256},
    "batch": {"examples": 8, "micro_tokens": 1024},
    "sources": {
        "tickets": {"path": "tickets.jsonl", "format": "messages"},
        "held-out": {"path": "held-out.jsonl", "format": "messages"},
    },
    "evaluation": {"suites": [{"name": "triage", "source": "held-out"}]},
}
TWO_STAGES = {"stages": [{"name": "a"}, {"name": "b"}]}
CLASSES = {
    "model": {"kind": "classification", "labels": ["no", "yes"]},
    "objective": {"name": "classification"},
    "sources": {"tickets": {"format": "text-label"}, "held-out": {"format": "text-label"}},
}


def merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    return {key: merged(base.get(key), over[key]) if key in over else base[key] for key in base | over}


def message(change: dict[str, Any], base: dict[str, Any] = GOOD) -> str:
    with pytest.raises(UserError) as caught:
        build_recipe(merged(base, change))
    return str(caught.value)


def in_stage(section: str, values: Any, index: int = 1) -> dict[str, Any]:
    stages: list[dict[str, Any]] = copy.deepcopy(TWO_STAGES["stages"])  # type: ignore[assignment]
    stages[index][section] = values
    return {"stages": stages}


def source(**values: Any) -> dict[str, Any]:
    return {"sources": {"tickets": values}}


def suite(**values: Any) -> dict[str, Any]:
    return {"evaluation": {"suites": [{"name": "triage", "source": "held-out"} | values]}}


CASES: list[tuple[dict[str, Any], str, str]] = [
    # unknown keys, where they were written
    ({"optimizer": {"lrr": 1}}, "optimizer.lrr: 1:", "did you mean `lr`"),
    (in_stage("optimizer", {"lrr": 1}), "stages.1.optimizer.lrr: 1:", "did you mean `lr`"),
    ({"optimizer": {"lrr": 1}} | TWO_STAGES, "optimizer.lrr: 1:", "did you mean `lr`"),
    ({"modle": {}}, "modle: {}:", "did you mean `model`"),
    ({"lr": 1e-4}, "lr: 0.0001:", "it is written `optimizer.lr`"),
    ({"tuning": {"lora_alpha": 16}}, "tuning.lora_alpha: 16:", "it is written `tuning.alpha`"),
    ({"batch_size": 8}, "batch_size: 8:", "it is written `batch.examples`"),
    ({"optimizer": {"scale_lr": {"rul": "sqrt"}}}, "optimizer.scale_lr.rul: 'sqrt':", "did you mean `rule`"),
    (source(formt="text"), "sources.tickets.formt: 'text':", "did you mean `format`"),
    (suite(metric=["bleu"]), "evaluation.suites.0.metric: ['bleu']:", "did you mean `metrics`"),
    ({"until": {"early_stopping": {"patiense": 2}}}, "until.early_stopping.patiense: 2:", "did you mean `patience`"),
    (in_stage("adversary", {"name": "fgm"}), "stages.1.adversary:", "not available in this version"),
    ({"xyzzy": 1}, "xyzzy: 1:", "known keys: name, output"),
    # types and ranges
    ({"optimizer": {"lr": "fast"}}, "optimizer.lr: 'fast':", "must be a number"),
    ({"optimizer": {"lr": "3e-4"}}, "optimizer.lr: '3e-4':", "unquoted"),
    ({"optimizer": {"lr": 0}}, "optimizer.lr: 0:", "above 0"),
    ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: inf:", "finite"),
    ({"optimizer": {"betas": [0.9]}}, "optimizer.betas", "missing"),
    ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1: 1.0:", "below 1"),
    ({"optimizer": None}, "optimizer: null:", "must hold keys"),
    ({"optimizer": {"name": "adam"}}, "optimizer.name: 'adam':", "did you mean `adamw`"),
    (in_stage("optimizer", {"name": "adam"}), "stages.1.optimizer.name: 'adam':", "use one of adamw"),
    ({"seed": True}, "seed: true:", "whole number"),
    ({"seed": "17"}, "seed: '17':", "whole number"),
    ({"seed": -1}, "seed: -1:", "0 or more"),
    ({"name": 17}, "name: 17:", "in quotes"),
    ({"name": "a b"}, "name: 'a b':", "letters, digits"),
    ({"name": "a\nb"}, "name: 'a\\nb':", "letters, digits"),
    ({"sources": {"a b": {"path": "x.jsonl", "format": "text"}}}, "sources.a b: 'a b':", "letters, digits"),
    ({"engine": {"cpu_offload": "yes"}}, "engine.cpu_offload: 'yes':", "true or false"),
    ({"tuning": {"targets": "q_proj"}}, "tuning.targets: 'q_proj':", "all-linear or a list"),
    ({"tuning": {"rank": 1.5}}, "tuning.rank: 1.5:", "whole number"),
    ({"model": {"labels": "no"}}, "model.labels: 'no':", "must be a list"),
    ({"stages": []}, "stages: []:", "needs 1 or more"),
    ({"stages": {"name": "a"}}, "stages: {'name': 'a'}:", "must be a list"),
    ({"sources": []}, "sources: []:", "must hold keys"),
    ({"mixture": {"tickets": 0}}, "mixture.tickets: 0:", "above 0"),
    (source(path=""), "sources.tickets.path: '':", "must not be empty"),
    (source(path="a\0b"), "sources.tickets.path:", "NUL"),
    ({"output": "\ud800"}, "output:", "half a character"),
    # across fields
    ({"output": "../../etc"}, "output: '../../etc':", "must not climb"),
    ({"model": {"labels": ["a", "b"]}}, "model.labels:", "only read by `kind: classification`"),
    ({"model": {"trust_remote_code": True}}, "model.trust_remote_code: true:", "`model.revision: <commit>`"),
    ({"model": {"path": "./here", "revision": "v1"}}, "model.revision: 'v1':", "only hub models"),
    ({"model": {"attention": "flash_attention_2", "dtype": "float32"}}, "model.attention:", "bfloat16"),
    ({"model": {"quantization": "nf4"}, "tuning": {"method": "full"}}, "tuning.method: 'full':", "method: lora"),
    ({"model": {"quantization": "nf4", "path": "x.gguf"}}, "model.quantization: 'nf4':", "export it as a folder"),
    ({"model": {"quantization": "int8"}, "engine": {"kind": "fsdp2"}}, "model.quantization: 'int8':", "use `nf4`"),
    ({"tuning": {"method": "full", "rank": 8}}, "tuning.rank: 8:", "only read by `method: lora`"),
    ({"tuning": {"method": "last-layers"}}, "tuning.layers: missing", "layers: 4"),
    ({"tuning": {"layers": 2}}, "tuning.layers: 2:", "only read by `method: last-layers`"),
    ({"tuning": {"targets": []}}, "tuning.targets: []:", "names no module"),
    ({"engine": {"config": "zero2"}}, "engine.config: 'zero2':", "only read by `kind: deepspeed`"),
    ({"engine": {"kind": "deepspeed", "config": "zero9"}}, "engine.config: 'zero9':", "zero1, zero1_offload"),
    ({"engine": {"kind": "deepspeed", "cpu_offload": True}}, "engine.cpu_offload: true:", "fsdp2"),
    ({"engine": {"kind": "deepspeed", "shard_size": 2}}, "engine.shard_size: 2:", "fsdp2"),
    ({"engine": {"kind": "deepspeed", "loading": "sharded"}}, "engine.loading: 'sharded':", "ZeRO 2 keeps the whole"),
    ({"model": {"quantization": "int8"}, "engine": {"kind": "deepspeed"}}, "model.quantization: 'int8':", "use `nf4`"),
    ({"optimizer": {"name": "adamw8bit"}, "engine": {"kind": "deepspeed"}}, "optimizer.name: 'adamw8bit':", "ranges"),
    ({"engine": {"kind": "single", "cpu_offload": True}}, "engine.cpu_offload: true:", "fsdp2"),
    ({"engine": {"kind": "single", "shard_size": 2}}, "engine.shard_size: 2:", "fsdp2"),
    ({"engine": {"kind": "single", "prefetch": 2}}, "engine.prefetch: 2:", "fsdp2"),
    ({"engine": {"kind": "single", "loading": "sharded"}}, "engine.loading: 'sharded':", "fsdp2, deepspeed"),
    ({"engine": {"loading": "sharded"}, "model": {"quantization": "nf4"}}, "engine.loading: 'sharded':", "as a whole"),
    (
        {"engine": {"loading": "sharded"}, "model": {"path": "x.gguf"}},
        "engine.loading: 'sharded':",
        "`auto` or `whole`",
    ),
    ({"engine": {"kind": "single", "reshard_after_forward": False}}, "engine.reshard_after_forward: false:", "fsdp2"),
    ({"optimizer": {"name": "sgd", "betas": [0.8, 0.9]}}, "optimizer.betas: (0.8, 0.9):", "only read by `name: adamw"),
    ({"optimizer": {"name": "lion", "eps": 1e-6}}, "optimizer.eps: 1e-06:", "only read by"),
    ({"optimizer": {"name": "muon", "eps": 1e-6}}, "optimizer.eps: 1e-06:", "only read by"),  # LoRA: matrices alone
    ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum: 0.9:", "sgd, muon"),
    ({"optimizer": {"name": "muon"}, "engine": {"kind": "fsdp2"}}, "optimizer.name: 'muon':", "whole matrices"),
    ({"optimizer": {"scale_lr": {"reference_batch": 8}}}, "optimizer.scale_lr.reference_batch: 8:", "linear, sqrt"),
    ({"schedule": {"cycles": 3}}, "schedule.cycles: 3:", "name: cosine-restarts"),
    ({"schedule": {"name": "constant", "floor": 0.1}}, "schedule.floor: 0.1:", "linear, cosine"),
    ({"schedule": {"warmup": 1.5}}, "schedule.warmup: 1.5:", "whole steps"),
    ({"schedule": {"name": "plateau"}}, "schedule.metric: 'loss':", "set `evaluation.every`"),
    ({"until": {"early_stopping": {"metric": "bleu"}}}, "until.early_stopping.metric: 'bleu':", "no suite gives it"),
    ({"checkpoint": {"keep_best": 2, "metric": "x/loss"}}, "checkpoint.metric: 'x/loss':", "no suite gives it"),
    ({"checkpoint": {"metric": "bleu"}}, "checkpoint.metric: 'bleu':", "no suite gives it"),
    ({"checkpoint": {"keep_every": 100}}, "checkpoint.keep_every: 100:", "only read with `every`"),
    ({"checkpoint": {"every": 40, "keep_every": 100}}, "checkpoint.keep_every: 100:", "no multiple of `every: 40`"),
    ({"checkpoint": {"asynchronous": False}}, "checkpoint.asynchronous: false:", "only read with `every`"),
    ({"guard": {"spike": {"window": 9}}}, "guard.spike.window: 9:", "only read by `policy: warn"),
    ({"guard": {"spike": {"policy": "rollback"}}}, "guard.spike.policy: 'rollback':", "set `checkpoint.every`"),
    ({"guard": {"replica_check": 5}, "engine": {"kind": "single"}}, "guard.replica_check: 5:", "holds no copies"),
    ({"ema": {"evaluate": True}}, "ema.evaluate: true:", "set `ema.decay`"),
    (
        {"ema": {"evaluate": True, "decay": 0.9}, "evaluation": {"suites": []}, "mixture": {"tickets": 1.0}},
        "ema.evaluate: true:",
        "there is no suite",
    ),
    ({"checkpoint": {"failure_limit": 5}}, "checkpoint.failure_limit: 5:", "only read with `every`"),
    ({"batch": {"tokens": 64}}, "batch.tokens: 64:", "set one to null"),
    ({"batch": {"micro_tokens": 64}}, "batch.micro_tokens: 64:", "max_length 256"),
    ({"model": {"max_length": 2048}}, "batch.micro_tokens: 1024:", "max_length 2048"),
    (in_stage("batch", {"micro_tokens": 64}), "stages.1.batch.micro_tokens: 64:", "raise it"),
    ({"model": {"attention": "eager"}, "batch": {"packing": "packed"}}, "batch.packing: 'packed':", "varlen"),
    ({"mixture": {"ticket": 1}}, "mixture.ticket: 'ticket':", "did you mean `tickets`"),
    (in_stage("mixture", {"held-out": 1}), "stages.1.mixture.held-out: 1.0:", "held out"),
    ({"mixture": {}}, "mixture: {}:", "empty"),
    ({"sources": {"more": {"path": "m.jsonl", "format": "text"}}}, "mixture: missing", "mixture: {tickets: 1.0}"),
    ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages.1.name: 'a':", "used twice"),
    ({"objective": {"name": "classification"}}, "objective.name: 'classification':", "model.kind: causal-lm"),
    ({"objective": {"class_weights": [1.0]}}, "objective.class_weights: [1.0]:", "name: classification"),
    # sources
    (source(format="text"), "sources.tickets.format: 'text':", "language-modeling"),
    (source(format="text-label"), "sources.tickets.format: 'text-label':", "prompt-completion"),
    (source(split="test"), "sources.tickets.split: 'test':", "hub datasets"),
    (source(subset="en"), "sources.tickets.subset: 'en':", "hub datasets"),
    (source(streaming=True), "sources.tickets.streaming: true:", "hub datasets"),
    (source(revision="main"), "sources.tickets.revision: 'main':", "hub datasets"),
    (source(path="owner/data", encoding="latin-1"), "sources.tickets.encoding: 'latin-1':", "local files"),
    (source(path="x.parquet", encoding="latin-1"), "sources.tickets.encoding: 'latin-1':", "Parquet"),
    (source(max_bad_rows=5), "sources.tickets.max_bad_rows: 5:", "on_bad_row: skip"),
    (
        {**source(format="text", system="Hi"), "objective": {"name": "language-modeling"}},
        "sources.tickets.system: 'Hi':",
        "no turns",
    ),
    (
        {**source(train_on="all"), "objective": {"name": "language-modeling"}},
        "sources.tickets.train_on: 'all':",
        "every token",
    ),
    # suites
    (suite(source="held"), "evaluation.suites.0.source: 'held':", "did you mean `held-out`"),
    (suite(kind="generate"), "evaluation.suites.0.metrics: []:", "exact_match"),
    (suite(kind="classify"), "evaluation.suites.0.kind: 'classify':", "model.kind: classification"),
    (suite(metrics=["bleu"]), "evaluation.suites.0.metrics: ['bleu']:", "generate, classify"),
    (suite(max_new_tokens=8), "evaluation.suites.0.max_new_tokens: 8:", "kind: generate"),
    (suite(batch=8), "evaluation.suites.0.batch: 8:", "kind: generate"),
    (suite(kind="generate", metrics=["bleu", "bleu"]), "evaluation.suites.0.metrics:", "twice"),
    ({"evaluation": {"baseline": "none", "resamples": 500}}, "evaluation.resamples: 500:", "baseline: base-model"),
    ({"evaluation": {"suites": [], "every": 5}, "mixture": {"tickets": 1}}, "evaluation.every: 5:", "no suite"),
]


@pytest.mark.parametrize(("change", "start", "remedy"), CASES, ids=[case[1] + case[2][:12] for case in CASES])
def test_message(change: dict[str, Any], start: str, remedy: str) -> None:
    text = message(change)
    assert text.startswith(start)
    assert remedy in text
    assert len(text.splitlines()) == 1
    assert text.isprintable()


CLASS_CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": {"labels": ["no"]}}, "model.labels: ['no']:", "two or more"),
    ({"model": {"labels": ["a", "b", "a"]}}, "model.labels:", "twice"),
    ({"objective": {"class_weights": [1.0]}}, "objective.class_weights: [1.0]:", "1 for 2 labels"),
    ({"objective": {"name": "supervised"}}, "objective.name: 'supervised':", "model.kind: classification"),
    (source(format="messages"), "sources.tickets.format: 'messages':", "text-label"),
    (source(train_on="all"), "sources.tickets.train_on: 'all':", "no turns"),
    (suite(kind="generate", metrics=["bleu"]), "evaluation.suites.0.kind: 'generate':", "use `classify`"),
    ({"model": {"chat_template": "x.jinja"}}, "model.chat_template: 'x.jinja':", "no source holds conversations"),
]


@pytest.mark.parametrize(("change", "start", "remedy"), CLASS_CASES, ids=[case[1] for case in CLASS_CASES])
def test_message_of_classification(change: dict[str, Any], start: str, remedy: str) -> None:
    text = message(change, merged(GOOD, CLASSES))
    assert text.startswith(start) and remedy in text


def test_good_ones_load() -> None:
    assert build_recipe(GOOD).stages[0].mixture == {"tickets": 1.0}
    assert build_recipe(merged(GOOD, CLASSES)).stages[0].objective.name == "classification"


def test_several_problems_are_counted_on_one_line() -> None:
    text = message({"optimizer": {"lrr": 1, "lr": -1}, "seed": "x"})
    assert text == ("optimizer.lrr: 1: unknown key; did you mean `lr`? (and 2 more: seed, optimizer.lr)")


def test_a_shared_fault_of_two_stages_is_one_problem() -> None:
    text = message({"batch": {"micro_tokens": 64}} | TWO_STAGES)
    assert (
        text.startswith("batch.micro_tokens: 64:") and "more" not in text.partition("below")[0] and "(and" not in text
    )


def test_long_values_are_shortened() -> None:
    assert len(message({"name": "x " * 5000})) < 300
    assert len(message({"k" * 5000: 1})) < 600


def test_unread_values_at_their_default_are_accepted() -> None:
    recipe = build_recipe(merged(GOOD, {"tuning": {"method": "full", "rank": 16}, "schedule": {"cycles": 2}}))
    assert recipe.tuning.method == "full"


def test_origin_comes_first() -> None:
    with pytest.raises(UserError, match=r"^recipes/x\.yaml: seed: -1: "):
        build_recipe(merged(GOOD, {"seed": -1}), "recipes/x.yaml")
