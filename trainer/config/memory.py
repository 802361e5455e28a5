"""An estimate of device memory, part by part, for a recipe and a number of ranks. Pure arithmetic, no torch.

Measured on a 4-layer Llama (width 256, 1024 tokens, AdamW; live tensors counted): 1.03 to 1.16 times the true peak for
full tuning and LoRA in fp32 and bf16. Left out: the CUDA context (about 0.5 GB), communication buffers, fragmentation
of the allocator, generation's cache.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config.model_facts import ModelFacts
from trainer.config.schema import Optimizer, Recipe, Stage

FEED_FORWARD = re.compile(r"mlp|ffn|gate|up_proj|fc|dense_h|intermediate")
OUTPUT_LAYER = re.compile(r"o_proj|out_proj|attention\.output")
Shape = tuple[int, ...]
Shapes = dict[str, Shape]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MASTER = 4  # trainable parameters and their gradients are fp32
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an int8 scale for 64, an fp32 scale for 256 of those
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}  # of one chunk's logits, as in trainer.kernels.chunked
EIGHT_BIT_FROM = 4096  # elements from which bitsandbytes keeps a tensor's moments in 8 bits
HEAD_NAMES = {True: "score.weight", False: "classifier.weight"}


@dataclass(frozen=True)
class Parameters:
    """Shapes by name: what stays frozen and what trains (adapters and new heads included)."""

    frozen: Shapes
    trainable: Shapes

    @property
    def total(self) -> int:
        """All parameters, adapters included."""
        return count(self.frozen) + count(self.trainable)


@dataclass(frozen=True)
class Memory:
    """Bytes by part on each device, and on each rank's host where the engine offloads or a save is copied to.

    `total` is the peak of a step: what stays, and the larger of forward-and-backward and update. `loading` is the
    device's peak before sharding.
    """

    ranks: int
    parameters: int
    trainable: int
    parts: dict[str, int]
    host: dict[str, int]
    total: int
    loading: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def count(shapes: Mapping[str, Shape]) -> int:
    """Elements of all the tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def parameters(recipe: Recipe, facts: ModelFacts) -> Parameters:
    """Which parameters exist under a recipe and which of them train; the rules of trainer.model.methods by names."""
    base = _with_head(recipe, facts)
    tuning = recipe.tuning
    if tuning.method == "full":
        return Parameters({}, base)
    if tuning.method == "last-layers":
        first = facts.layers - (tuning.layers or 0)
        chosen = {name for name in base if _in_last(facts, name, first, tuning.train_head)}
        if tuning.train_head and facts.tied and recipe.model.kind == "causal-lm":
            chosen |= {name for name in base if name.endswith(("embed_tokens.weight", "wte.weight"))}
        return Parameters(
            {name: shape for name, shape in base.items() if name not in chosen},
            {name: shape for name, shape in base.items() if name in chosen},
        )
    return Parameters(base, lora_shapes(recipe, facts, base))


def _in_last(facts: ModelFacts, name: str, first: int, head: bool) -> bool:
    block = facts.block_of(name)
    return block >= first if block is not None else head and not facts.is_embedding(name)


def _with_head(recipe: Recipe, facts: ModelFacts) -> Shapes:
    """The base's shapes with the head that the recipe asks for: a class head takes the language head's place."""
    labels = recipe.model.labels
    if recipe.model.kind != "classification" or labels is None:
        return facts.shapes
    shapes = {name: shape for name, shape in facts.shapes.items() if not facts.is_head(name)}
    shapes[HEAD_NAMES[facts.causal]] = (len(labels), facts.hidden)
    if not facts.causal:
        shapes["classifier.bias"] = (len(labels),)
    return shapes


def lora_shapes(recipe: Recipe, facts: ModelFacts, base: Shapes) -> Shapes:
    """A (rank, in) and B (out, rank) for each adapted layer; a class head trains beside them as a copy."""
    tuning = recipe.tuning
    rank, targets = tuning.rank, tuning.targets
    linears = facts.linears()
    if targets != "all-linear":
        modules = {name.removesuffix(".weight"): shape for name, shape in base.items() if len(shape) == 2}
        if facts.tied and recipe.model.kind == "causal-lm":
            modules["lm_head"] = next((s for n, s in modules.items() if n.endswith(("embed_tokens", "wte"))), (0, 0))
        linears = {name: shape for name, shape in modules.items() if any(f".{name}".endswith(f".{t}") for t in targets)}
    shapes: Shapes = {}
    for name, (rows, columns) in linears.items():
        shapes[f"{name}.lora_A.weight"] = (rank, columns)
        shapes[f"{name}.lora_B.weight"] = (rows, rank)
    heads = {f"{name}.copy": base[name] for name in base if name.startswith(("score.", "classifier."))}
    return shapes | heads if recipe.model.kind == "classification" else shapes


# ---------------------------------------------------------------- bytes


def estimate(recipe: Recipe, facts: ModelFacts, ranks: int = 1, device: str = "cuda") -> Memory:
    """The memory of the largest stage on each of `ranks` devices: fsdp2 shards over several, single uses one."""
    held = parameters(recipe, facts)
    sharded = ranks > 1
    shards = min(ranks, recipe.engine.shard_size or ranks)  # of one copy of the model
    kept = {
        "frozen weights": _frozen_bytes(recipe, facts, held.frozen, shards),
        "trainable weights (fp32)": MASTER * _local(held.trainable, shards),
        "gradients (fp32)": MASTER * _local(held.trainable, shards),
        "optimizer state": max(optimizer_bytes(stage.optimizer, held.trainable, shards) for stage in recipe.stages),
    }
    host: dict[str, int] = {}
    if sharded and recipe.engine.cpu_offload:
        host, kept = kept, {}
    offloaded = bool(host)
    if recipe.checkpoint.every and recipe.checkpoint.asynchronous:
        saved = kept if not offloaded else host
        copied = saved["trainable weights (fp32)"] + saved["optimizer state"]
        (kept if device == "cpu" else host)["copy that a save in the background writes"] = copied
    gradients = kept.get(
        "gradients (fp32)", 0
    )  # they grow as activations go, but lie beside those of a next micro-batch
    repeated = any(accumulates(recipe, stage, ranks) for stage in recipe.stages)
    work: dict[str, int] = {}
    if sharded:
        work["gathered weights"] = gathered_bytes(recipe, facts, held)
        if repeated:
            work["gradients while accumulating"] = MASTER * count(held.trainable)  # whole until the last micro-batch
    elif recipe.model.dtype == "bfloat16":
        work["bf16 copies of trainable weights"] = 2 * count({n: s for n, s in held.trainable.items() if len(s) == 2})
    stages: list[dict[str, int]] = [_step_bytes(recipe, stage, facts, held, ranks, device) for stage in recipe.stages]
    largest: dict[str, int] = max(stages, key=_total)
    work.update(largest)
    update = max(_update_bytes(stage.optimizer, held.trainable, shards) for stage in recipe.stages)
    parts = shards if sharded and _read_in_parts(recipe) else 1
    loading = _frozen_bytes(recipe, facts, held.frozen, parts) + MASTER * _local(held.trainable, parts)
    return Memory(
        ranks=ranks,
        parameters=held.total,
        trainable=count(held.trainable),
        parts=kept | work,
        host=host,
        total=sum(kept.values()) - gradients + max(sum(work.values()) + repeated * gradients, gradients + update),
        loading=0 if offloaded else loading,
    )


def _read_in_parts(recipe: Recipe) -> bool:
    """Whether each rank reads its own shards alone; an old form of stored experts, which does not allow it, aside."""
    model = recipe.model
    whole = model.quantization != "none" or model.path.endswith(".gguf") or model.trust_remote_code
    return recipe.engine.loading != "whole" and not whole


def _local(shapes: Shapes, ranks: int) -> int:
    """Elements of the largest shard: FSDP2 deals whole rows, ceil(rows / ranks) to each."""
    return sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) if shape else 1 for shape in shapes.values())


def _frozen_bytes(recipe: Recipe, facts: ModelFacts, frozen: Shapes, ranks: int) -> int:
    return round(
        sum(_local({name: shape}, ranks) * _width(recipe, facts, name, shape) for name, shape in frozen.items())
    )


def _width(recipe: Recipe, facts: ModelFacts, name: str, shape: Shape) -> float:
    """Bytes of one element of a frozen weight: quantisation is for the linear layers but the head."""
    linear = len(shape) == 2 and not facts.is_embedding(name) and not facts.is_head(name)
    if linear and recipe.model.quantization == "nf4":
        return NF4_BYTES
    if linear and recipe.model.quantization == "int8":
        return 1 + 4 / shape[1]  # an fp32 scale for each row (Dettmers et al. 2022, arXiv 2208.07339)
    return DTYPE_BYTES[recipe.model.dtype]


def optimizer_bytes(optimizer: Optimizer, trainable: Shapes, ranks: int = 1) -> int:
    """State of one rank in bytes.

    AdamW: two fp32 moments. 8-bit AdamW: two bytes, and two fp32 scales for 256 elements (Dettmers et al. 2022, arXiv
    2110.02861). SGD: an fp32 buffer if it has momentum. Lion: one. Muon: one for matrices, AdamW's two for the rest.
    """
    total = 0.0
    for name, shape in trainable.items():
        size = _local({name: shape}, ranks)
        if optimizer.name == "adamw8bit" and size >= EIGHT_BIT_FROM:
            total += size * (2 + 2 * 4 / 256)
        elif optimizer.name == "sgd":
            total += 4 * size if optimizer.momentum else 0
        elif optimizer.name == "lion" or (optimizer.name == "muon" and _is_matrix(name, shape)):
            total += 4 * size
        else:
            total += 8 * size
    return round(total)


def _is_matrix(name: str, shape: Shape) -> bool:
    """The rule of trainer.optim: tables and heads are no matrices to Muon."""
    return len(shape) == 2 and not any(part in name for part in ("embed", "lm_head", "score", "classifier"))


def _update_bytes(optimizer: Optimizer, trainable: Shapes, ranks: int) -> int:
    """Scratch of the update, when activations are gone: Lion makes its signs for all parameters at once."""
    return 4 * _local(trainable, ranks) if optimizer.name == "lion" else 0


def gathered_bytes(recipe: Recipe, facts: ModelFacts, held: Parameters) -> int:
    """Whole weights that FSDP2 has in hand: the root group, and the largest block with those fetched ahead of it, or
    every block where nothing is resharded after the forward."""
    blocks: dict[int | None, float] = {}
    for name, shape in (held.frozen | held.trainable).items():
        frozen = name in held.frozen
        width = _width(recipe, facts, name, shape) if frozen else DTYPE_BYTES[recipe.model.dtype]
        block = facts.block_of(name)
        blocks[block] = blocks.get(block, 0.0) + math.prod(shape) * width
    root = blocks.pop(None, 0.0)
    inner = min(1 + recipe.engine.prefetch, len(blocks)) * max(blocks.values(), default=0.0)
    return round(root + (inner if recipe.engine.reshard_after_forward else sum(blocks.values())))


def micro_tokens(recipe: Recipe, stage: Stage, ranks: int) -> int:
    """Tokens of one forward on one device, at most."""
    batch = stage.batch
    whole = batch.tokens or (batch.examples or 1) * recipe.model.max_length
    return min(batch.micro_tokens, max(math.ceil(whole / ranks), recipe.model.max_length))


def accumulates(recipe: Recipe, stage: Stage, ranks: int) -> bool:
    """Whether a step may take several micro-batches on a device."""
    whole = stage.batch.tokens or (stage.batch.examples or 1) * recipe.model.max_length
    return whole > stage.batch.micro_tokens * ranks


def _step_bytes(
    recipe: Recipe, stage: Stage, facts: ModelFacts, held: Parameters, ranks: int, device: str
) -> dict[str, int]:
    """Activations and logits of one micro-batch; every position is taken for a target."""
    tokens = micro_tokens(recipe, stage, ranks)
    if recipe.model.kind == "classification":
        return {"activations": activation_bytes(recipe, facts, tokens)}
    rows = min(tokens, max(1, CHUNK_ELEMENTS[device] // max(facts.vocabulary, 1)))
    head = [name for name in held.trainable if facts.is_head(name) or (facts.tied and facts.is_embedding(name))]
    return {
        "activations": activation_bytes(recipe, facts, tokens),
        "logits of one chunk": rows * facts.vocabulary * 8,  # two fp32 arrays at once: log-probabilities and gradient
        **({"gradient of the head": MASTER * count({name: held.trainable[name] for name in head})} if head else {}),
    }


def activation_bytes(recipe: Recipe, facts: ModelFacts, tokens: int) -> int:
    """What autograd keeps of one forward over `tokens`.

    The count is that of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1), tensor by tensor, made for pre-norm
    blocks with an RMSNorm in fp32 and attention that keeps no square of the length. For hidden h, query width q, key
    and value width k, feed-forward width f and e bytes an element, a block keeps for each token

        2 (4h + 2eh)   norms: fp32 input, normalised value, output (the last two only where weights after them train)
        e (2q + 2k)    queries, keys, values, attention output; and its fp32 log-sum, 4 a head
        4ef            gate, SiLU(gate), up and their product (2ef without a gate)

    and over frozen weights LoRA keeps the inputs of its layers instead, a copy for each where they are cast; full
    tuning in bfloat16 keeps fp32 normalised values and outputs, and a cast copy for each of five layers. With
    activation checkpointing a block keeps its input, eh, and one block at a time is whole. `eager` attention adds
    its probabilities, (4 + 2e) a head for each pair of positions.
    """
    element = DTYPE_BYTES[recipe.model.dtype]
    block = _block_bytes(recipe, facts, element)
    if recipe.model.attention == "eager":
        block += facts.heads * recipe.model.max_length * (4 + 2 * element)
    if recipe.model.hidden_dropout:
        block += 2 * facts.hidden  # two masks of a byte
    ends = facts.hidden * (4 + 3 * element)  # final norm and the selected hidden states
    layers = facts.layers
    if recipe.tuning.method == "last-layers" and not (recipe.tuning.train_head and facts.tied):
        layers = min(layers, recipe.tuning.layers or 0)  # below the first block that trains nothing is kept
    if recipe.engine.activation_checkpointing:
        return tokens * (layers * facts.hidden * element + block + ends)
    return tokens * (layers * block + ends)


def _block_bytes(recipe: Recipe, facts: ModelFacts, element: int) -> int:
    """Bytes that one block keeps for one token."""
    hidden, wide = facts.hidden, facts.intermediate
    query, key = facts.heads * facts.head_width, facts.kv_heads * facts.head_width
    attention = element * (2 * query + 2 * key) + 4 * facts.heads
    if recipe.tuning.method != "lora":
        norms = 2 * (4 + 2 * element) * hidden
        if (
            recipe.tuning.method == "full" and element < MASTER
        ):  # fp32 masters: the norms stay fp32, each layer casts its input
            norms = 2 * (4 + MASTER) * hidden + 5 * element * hidden
        return norms + attention + element * wide * (4 if facts.gated else 2)
    adapted = lora_shapes(recipe, facts, facts.shapes)
    chosen = {
        name: shape[1]
        for name, shape in facts.linears().items()
        if facts.block_of(name) == 0 and f"{name}.lora_A.weight" in adapted
    }
    inputs = sum(chosen.values()) if element < MASTER else _shared_inputs(chosen, wide)
    masks = sum(chosen.values()) if recipe.tuning.dropout else 0
    return 2 * 4 * hidden + attention + element * (wide * (3 if facts.gated else 1) + inputs) + masks


def _shared_inputs(widths: dict[str, int], wide: int) -> int:
    """Widths of the inputs that uncast adapters share: before attention, before the feed-forward part, and inside it.

    The input of the attention's output layer is counted with the attention already.
    """
    outer = {name: width for name, width in widths.items() if width != wide and not OUTPUT_LAYER.search(name)}
    groups = {bool(FEED_FORWARD.search(name)): width for name, width in outer.items()}
    return sum(groups.values()) + wide * (wide in widths.values())


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())
