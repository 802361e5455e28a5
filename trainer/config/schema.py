"""The recipe: every key that a user may write, its meaning, its unit and its default.

The field descriptions are the reference: ``tunesmith schema`` and ``docs/recipe.md`` are generated from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    path: str = Field(min_length=1, description="Hub id, local folder, or .gguf file of the base model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    kind: Literal["causal-lm", "classification"] = Field("causal-lm", description="What the model's head does.")
    labels: list[str] | None = Field(None, description="Class names in order; needed by `kind: classification`.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Arithmetic of forward and backward.")
    quantization: Literal["none", "nf4", "int8"] = Field("none", description="Storage of the frozen base (QLoRA).")
    max_length: Count = Field(1024, description="Longest example in tokens; `truncation` of a source acts beyond it.")
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention implementation; `auto` takes `varlen` (packing without padding) where the model can.",
    )
    attention_dropout: Share | None = Field(None, description="Dropout on attention weights; null keeps the model's.")
    hidden_dropout: Share | None = Field(None, description="Dropout on residual branches; null keeps the model's.")
    chat_template: str | None = Field(None, description="Path of a Jinja chat template that replaces the tokenizer's.")
    trust_remote_code: bool = Field(
        False, description="Run code shipped with the model; of a hub model only with a commit as `revision`."
    )


class Tuning(Section):
    method: Literal["full", "last-layers", "lora"] = Field("lora", description="What is trainable.")
    layers: Count | None = Field(None, description="last-layers: how many of the last blocks train.")
    train_head: bool = Field(True, description="last-layers: train the output head and final norm too.")
    rank: Count = Field(16, description="lora: rank r.")
    alpha: Positive = Field(32.0, description="lora: scale is alpha / rank (alpha / sqrt(rank) with `rslora`).")
    dropout: Share = Field(0.0, description="lora: dropout on the adapter's input.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="lora: module names; `all-linear` is every linear layer but the head."
    )
    rslora: bool = Field(False, description="lora: rank-stabilised scale (Kalajdzievski 2023).")


class Engine(Section):
    kind: Literal["auto", "single", "fsdp2", "deepspeed"] = Field(
        "auto", description="`auto`: single in one process, fsdp2 in several."
    )
    config: str | None = Field(
        None,
        description="deepspeed: what DeepSpeed alone knows, as JSON: a file, or a name in ds_configs; null: `zero2`.",
    )
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward: less memory.")
    cpu_offload: bool = Field(False, description="fsdp2: parameters, gradients and optimizer live in host memory.")
    reshard_after_forward: bool = Field(True, description="fsdp2: free gathered weights after the forward (ZeRO-3).")
    shard_size: Count | None = Field(
        None, description="fsdp2: ranks that share one copy of the model; the others replicate. Null: all ranks share."
    )
    prefetch: Count = Field(1, description="fsdp2: blocks gathered ahead of the one that computes.")
    loading: Literal["auto", "whole", "sharded"] = Field(
        "auto",
        description="fsdp2, deepspeed stage 3: `sharded` reads each rank's part of the base model alone; `auto` does "
        "so where the files allow it (safetensors, not quantised on loading).",
    )


class ScaleLR(Section):
    rule: Literal["none", "linear", "sqrt"] = Field("none", description="How lr grows with the global batch.")
    reference_batch: Count = Field(32, description="Batch (in the unit of `batch`) at which `lr` holds unscaled.")


class Optimizer(Section):
    name: Literal["adamw", "adamw8bit", "sgd", "lion", "muon"] = Field("adamw", description="Update rule.")
    lr: Positive = Field(2.0e-4, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Decay, decoupled (for sgd coupled, L2); never on norms, biases."
    )
    betas: tuple[Share, Share] = Field(
        (0.9, 0.999), description="adamw, adamw8bit, lion (muon: what is no matrix): decay of the moments."
    )
    eps: Positive = Field(1.0e-8, description="adamw, adamw8bit (muon: what is no matrix): term in the denominator.")
    momentum: Share | None = Field(None, description="sgd (default 0), muon (default 0.95): momentum.")
    clip: Positive | None = Field(1.0, description="Largest global gradient norm; null: no clipping.")
    scale_lr: ScaleLR = Field(ScaleLR(), description="Learning-rate scaling with the global batch.")


class Schedule(Section):
    name: Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial", "inverse-sqrt", "wsd", "plateau"] = (
        Field("cosine", description="Shape of the learning rate after warm-up.")
    )
    warmup: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Below 1: share of the stage's steps; from 1 on: whole steps."
    )
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.0, description="Lowest factor of the peak.")
    cycles: Count = Field(2, description="cosine-restarts: number of cosine cycles.")
    power: Positive = Field(2.0, description="polynomial: exponent.")
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.2, description="wsd: share of steps in the final decay.")
    metric: str = Field("loss", description="plateau: evaluated metric to watch, `suite/metric` or `metric`.")
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="plateau: multiplier at each plateau.")
    patience: Annotated[int, Field(ge=0)] = Field(2, description="plateau: evaluations without gain before a cut.")
    threshold: Annotated[float, Field(ge=0.0)] = Field(1.0e-4, description="plateau: smallest relative gain.")


class Batch(Section):
    examples: Count | None = Field(None, description="Examples in one optimizer step, over all devices.")
    tokens: Count | None = Field(None, description="Tokens in one optimizer step instead, over all devices.")
    micro_tokens: Count = Field(4096, description="Most tokens of one forward on one device, padding included.")
    packing: Literal["auto", "packed", "padded"] = Field(
        "auto", description="`packed`: no padding; `padded`: length-bucketed; `auto`: packed where attention can."
    )


class Source(Section):
    path: str = Field(min_length=1, description="File, folder of files, or hub dataset id.")
    format: Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text", "text-label"] = Field(
        description="Shape of a row."
    )
    task: Name | None = Field(None, description="Task name for per-task losses; default: the source's own name.")
    split: str = Field("train", description="Hub datasets: split.")
    subset: str | None = Field(None, description="Hub datasets: configuration name.")
    revision: str | None = Field(None, description="Hub datasets: branch, tag or commit.")
    fields: dict[str, str] = Field({}, description="Renames: the format's field -> the row's field.")
    system: str | None = Field(None, description="System prompt put before conversations that have none.")
    limit: Count | None = Field(None, description="Read at most this many rows.")
    streaming: bool = Field(False, description="Hub datasets: iterate without downloading the whole.")
    train_on: Literal["assistant", "last-assistant", "all"] = Field(
        "assistant", description="Which turns are targets; a turn's own `weight` multiplies."
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="What a malformed row does.")
    max_bad_rows: Annotated[int, Field(ge=0)] = Field(
        100, description="skip: more malformed rows than this is an error."
    )
    truncation: Literal["error", "drop", "left", "right"] = Field("error", description="Examples over max_length.")
    encoding: Literal["utf-8", "utf-16", "latin-1", "gb18030"] = Field("utf-8", description="Encoding of text files.")


class Objective(Section):
    name: Literal["supervised", "language-modeling", "classification"] = Field(
        "supervised", description="supervised: answer tokens; language-modeling: every token."
    )
    label_smoothing: Share = Field(0.0, description="Share of the target spread over the vocabulary (Szegedy 2016).")
    class_weights: list[Positive] | None = Field(None, description="classification: weight of each class.")


class EarlyStopping(Section):
    metric: str = Field("loss", description="Evaluated metric, `suite/metric` or `metric` of the first suite with it.")
    patience: Count = Field(3, description="Evaluations without gain before the stage ends.")
    min_delta: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Smallest gain that counts.")


class Until(Section):
    epochs: Positive | None = Field(None, description="Passes over the source with the largest mixture weight.")
    steps: Count | None = Field(None, description="Optimizer steps; with `epochs` too, whichever comes first.")
    early_stopping: EarlyStopping | None = Field(None, description="End the stage when a metric stops improving.")


class Suite(Section):
    name: Name = Field(description="Name of the suite; its files are evaluation/<name>-....json.")
    source: str = Field(description="A name from `sources`, held out from training.")
    kind: Literal["loss", "generate", "classify"] = Field("loss", description="What is measured.")
    metrics: list[str] = Field([], description="generate/classify: exact_match, json_match, rougeL, bleu, macro_f1 ...")
    limit: Count | None = Field(None, description="Use the first n examples.")
    max_new_tokens: Count = Field(64, description="generate: longest answer in tokens.")
    batch: Count = Field(32, description="generate: examples of one batch on one device.")
    every: Count | None = Field(None, description="Run each n steps (default: evaluation.every); the end always runs.")


class Evaluation(Section):
    every: Count | None = Field(None, description="Steps between evaluations; null: only at the end.")
    suites: list[Suite] = Field([], description="What to evaluate.")
    baseline: Literal["base-model", "none"] = Field("base-model", description="What the run is compared with.")
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(0.95, description="Level of intervals.")
    resamples: Annotated[int, Field(ge=100)] = Field(10_000, description="Bootstrap resamples.")


class Checkpoint(Section):
    every: Count | None = Field(None, description="Steps between checkpoints; null: only at the end.")
    keep: Count = Field(3, description="How many of the newest stay on disk.")
    keep_best: Annotated[int, Field(ge=0)] = Field(0, description="How many of the best by `metric` stay as well.")
    metric: str = Field("loss", description="keep_best: evaluated metric, `suite/metric` or `metric`.")
    keep_every: Count | None = Field(None, description="Checkpoints at multiples of this many steps stay for ever.")
    asynchronous: bool = Field(True, description="Write in the background, at most one save in flight.")
    failure_limit: Count = Field(3, description="Failed saves in a row before the run stops; the last must succeed.")


class EMA(Section):
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="Exponential moving average of the trained weights: share kept at each step; null: none."
    )
    evaluate: bool = Field(False, description="Evaluate the averaged weights in place of the trained ones.")


class Tracking(Section):
    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases, fed from metrics.jsonl.")
    project: str = Field("tunesmith", description="wandb project.")
    ledger: bool = Field(False, description="Write ledger.jsonl: the ids of the examples of every step.")
    every: Count = Field(1, description="Steps between `step` rows.")


class Spike(Section):
    policy: Literal["off", "warn", "skip", "rollback"] = Field(
        "off",
        description="What a loss spike does: nothing, an event, no update, or back to the last checkpoint and past it.",
    )
    deviations: Positive = Field(6.0, description="Robust deviations above the window's median that make a spike.")
    window: Annotated[int, Field(ge=8)] = Field(64, description="Steps whose losses are the yardstick.")


class Guard(Section):
    nonfinite_limit: Count = Field(3, description="Skipped non-finite steps in a row before the run stops.")
    spike: Spike = Field(Spike(), description="What a sudden rise of the loss does.")
    replica_check: Count | None = Field(
        None, description="Steps between comparisons of what ranks hold in copies; names the rank that differs."
    )
    skip_steps: list[Count] = Field(
        [], description="Global steps whose examples are passed over untrained (a poison batch)."
    )


class Stage(Section):
    """One stage as resolved: what it inherits is filled in."""

    name: Name = Field(description="Name of the stage.")
    objective: Objective = Field(Objective(), description="What is minimised.")
    mixture: dict[str, Positive] = Field(description="Source -> weight; each step holds them in this proportion.")
    until: Until = Field(Until(epochs=1.0, steps=None, early_stopping=None), description="When the stage ends.")
    optimizer: Optimizer = Field(Optimizer(), description="Overrides for this stage.")
    schedule: Schedule = Field(Schedule(), description="Overrides for this stage.")
    batch: Batch = Field(Batch(examples=32), description="Overrides for this stage.")


class Recipe(Section):
    """A whole fine-tuning practice, resolved."""

    name: Name = Field(description="Name of the run.")
    output: str = Field("", description="The run's folder; default runs/<name>.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(17, description="Every random choice comes from it.")
    model: Model = Field(description="The base model.")
    tuning: Tuning = Field(Tuning(), description="What is trainable.")
    engine: Engine = Field(Engine(), description="Parallelism.")
    sources: dict[Name, Source] = Field(description="Data sets by name.")
    stages: list[Stage] = Field(min_length=1, description="What happens, in order.")
    evaluation: Evaluation = Field(Evaluation(), description="Suites, baseline and significance.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="Saving and retention.")
    ema: EMA = Field(EMA(), description="Averaged weights beside the trained ones.")
    tracking: Tracking = Field(Tracking(), description="Records.")
    guard: Guard = Field(Guard(), description="What a run does when numbers go wrong.")
