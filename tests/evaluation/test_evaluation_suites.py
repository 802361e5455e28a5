from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, run_ranks, tiny_llama, write_chats
from torch import nn

from trainer.config import Recipe, RunError, UserError, build_recipe
from trainer.data.prepare import Prepared, prepare
from trainer.engine.fsdp2 import shard
from trainer.evaluation.likelihood import CHUNK, Likelihoods, joined, perplexity, read_targets
from trainer.evaluation.mode import evaluating
from trainer.evaluation.results import read_result, result_path
from trainer.evaluation.suites import Evaluator, due_suites, loss_result
from trainer.model.attention import enable
from trainer.model.build import can_pack
from trainer.model.load import keep_quantised_weights
from trainer.model.root import Trainee
from trainer.world import World, connected, environment_world

TOKENIZER = byte_tokenizer()
LABELS = ["calm", "angry", "sad"]
SUITES: list[dict[str, Any]] = [
    {"name": "held-out", "source": "held", "kind": "loss"},
    {"name": "answers", "source": "held", "kind": "generate", "metrics": ["exact_match", "chrf"], "max_new_tokens": 8},
]
SUITES[1] |= {"limit": 10, "batch": 4}


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """A recipe over 23 held-out chats: more than one batch, and no multiple of two ranks."""
    train, held = folder / "train.jsonl", folder / "held.jsonl"
    if not held.exists():
        write_chats(train, 4, seed=1)
        write_chats(held, 23, seed=2)
    whole: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(folder), "dtype": "float32", "max_length": 128},
        "tuning": {"method": "full"},
        "sources": {
            "chats": {"path": str(train), "format": "messages"},
            "held": {"path": str(held), "format": "messages"},
        },
        "batch": {"examples": 4, "micro_tokens": 256},
        "stages": [{"name": "only", "mixture": {"chats": 1.0}}],
        "evaluation": {"suites": SUITES, "resamples": 200},
    }
    return build_recipe(whole | changes, "test")


def tiny_trainee(seed: int = 0) -> Trainee:
    network = tiny_llama(seed)
    network.config.use_cache = False
    return Trainee(network).train()


def prepared(recipe: Recipe) -> Prepared:
    return prepare(recipe, tokenizer=TOKENIZER)


def evaluator(folder: Path, **changes: Any) -> Evaluator:
    recipe = recipe_of(folder, **changes)
    return Evaluator(recipe, prepared(recipe), TOKENIZER, World(), folder / "run")


class Watched(nn.Module):
    """An identity head that notes how many positions it is given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(hidden))
        return hidden


def test_losses_of_known_logits_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    losses, best = read_targets(logits, nn.Identity(), torch.tensor([0, 0, 0]), None)
    # p = 1/2, 3/4, 1/4
    assert losses.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)], rel=1e-6)
    assert best.tolist()[1:] == [0, 1]
    capped, _ = read_targets(logits * 1e6, nn.Identity(), torch.tensor([0, 0, 0]), math.log(3))
    assert capped.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)], rel=1e-6)


def test_logits_exist_a_chunk_at_a_time() -> None:
    logits, targets = torch.randn(2 * CHUNK + 7, 11), torch.randint(11, (2 * CHUNK + 7,))
    head = Watched()
    losses, _ = read_targets(logits, head, targets, None)
    torch.testing.assert_close(losses, nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert head.seen == [CHUNK, CHUNK, 7]


def test_corpus_loss_is_per_target_and_perplexity_its_exponential() -> None:
    found = Likelihoods(["a", "b", "nothing"], nll=[6.0, 1.0, 0.0], weight=[3.0, 0.5, 0.0])
    whole = loss_result(found)
    assert whole["metrics"] == {"loss": 2.0, "perplexity": pytest.approx(math.exp(2.0))}
    assert (whole["ids"], whole["n"]) == (["a", "b"], 2)
    assert whole["per_example"] == {"loss": [2.0, 2.0], "weight": [3.0, 0.5]}
    assert whole["directions"] == {"loss": "lower", "perplexity": "lower"}
    assert perplexity(800.0) == math.inf and math.isnan(perplexity(math.nan))
    with pytest.raises(UserError, match="none of 1 examples"):
        loss_result(Likelihoods(["a"], [0.0], [0.0]))


def test_parts_of_ranks_join_in_the_order_of_the_source() -> None:
    parts = [Likelihoods(["c", "a"], [3.0, 1.0], [1, 1], [0, 0], [0, 0]), Likelihoods(["b"], [2.0], [1], [0], [0])]
    assert joined(parts, ["a", "b", "c"]).nll == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="3 likelihoods"):
        joined(parts, ["a", "b"])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_loss_suite_agrees_with_the_plain_forward(tmp_path: Path, packed: bool) -> None:
    trainee, own = tiny_trainee(), evaluator(tmp_path)
    if packed:
        enable(trainee.base)
    assert can_pack(trainee) is packed
    result = own.run(trainee, 3, "run")["held-out"]
    source = own.sources["held"]
    total = count = 0.0
    for index in range(len(source)):
        ids, weights, _ = source.example(index)
        with torch.no_grad():
            logits = trainee.network.eval()(input_ids=torch.tensor(ids[None]).long()).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, torch.tensor(ids[1:]).long(), reduction="none")
        mine = float((losses * torch.tensor(weights[1:])).sum())
        assert result["per_example"]["loss"][index] == pytest.approx(mine / weights[1:].sum(), rel=1e-5)
        total, count = total + mine, count + float(weights[1:].sum())
    assert result["metrics"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["metrics"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result["ids"] == [f"held:{line}" for line in range(1, 24)] and result["n"] == 23


def test_files_are_what_was_returned_and_a_run_is_compared_with_its_base(tmp_path: Path) -> None:
    own = evaluator(tmp_path)
    base = own.run(tiny_trainee(0), None, "base")
    run = own.run(tiny_trainee(1), 50, "run")
    for model, step, results in (("base", None, base), ("run", 50, run)):
        for suite, result in results.items():
            written = read_result(result_path(tmp_path / "run", suite, step, model))  # type: ignore[arg-type]
            assert written == result
            assert (result["model"], result["step"], result["source"]) == (model, step, "held")
    assert "verdicts" not in base["held-out"]
    assert [v["metric"] for v in run["answers"]["verdicts"]] == ["exact_match", "chrf"]
    loss = run["held-out"]["verdicts"][0]
    assert loss["baseline"] == pytest.approx(base["held-out"]["metrics"]["loss"])
    assert loss["candidate"] == pytest.approx(run["held-out"]["metrics"]["loss"])
    answers = run["answers"]
    assert answers["n"] == len(answers["examples"]) == 10
    shown = answers["examples"][0]
    assert shown["reference"] == answers["references"][0] and shown["prediction"] == answers["predictions"][0]
    assert "user" in shown["prompt"] and shown["prompt"].endswith("assistant\n")
    assert set(shown["scores"]) == {"exact_match"} == set(answers["per_example"])
    assert answers["directions"] == {"exact_match": "higher", "chrf": "higher"}


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    trainee, own = tiny_trainee(), evaluator(tmp_path)
    frozen = trainee.network.model.layers[0]
    frozen.eval()
    modes = {name: module.training for name, module in trainee.named_modules()}
    before = {name: p.detach().clone() for name, p in trainee.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    own.run(trainee, 1, "run")
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in trainee.named_modules()} == modes
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in trainee.parameters())
    assert all(torch.equal(p, before[name]) for name, p in trainee.named_parameters())
    assert trainee.config.use_cache is False
    with pytest.raises(RuntimeError, match="stop"), evaluating(trainee):
        assert not trainee.training and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert {name: module.training for name, module in trainee.named_modules()} == modes


def test_four_bit_weights_still_pass_gradients_after_an_evaluation(tmp_path: Path) -> None:
    import bitsandbytes

    trainee = tiny_trainee()
    layer = trainee.network.model.layers[0].mlp
    small = bitsandbytes.nn.Linear4bit(32, 52, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    small.load_state_dict({"weight": layer.gate_proj.weight.detach()})
    layer.gate_proj = small.to("cpu")
    keep_quantised_weights(trainee)
    packed = layer.gate_proj.weight.detach().clone()
    assert packed.dtype == torch.uint8
    evaluator(tmp_path).run(trainee, 1, "run")
    assert torch.equal(layer.gate_proj.weight, packed)
    inputs = torch.randn(2, 32, requires_grad=True)
    layer.gate_proj(inputs).sum().backward()
    assert inputs.grad is not None and bool(inputs.grad.any())


def test_a_base_of_other_examples_is_refused(tmp_path: Path) -> None:
    evaluator(tmp_path).run(tiny_trainee(), None, "base")
    fewer = [SUITES[0] | {"limit": 7}]
    with pytest.raises(UserError, match=r"suite held-out: example 'held:8': only in the baseline's"):
        evaluator(tmp_path, evaluation={"suites": fewer, "resamples": 200}).run(tiny_trainee(), 1, "run")
    assert not result_path(tmp_path / "run", "held-out", 1, "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX paths")
def test_a_result_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    own = evaluator(tmp_path)
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="evaluation held-out: its result cannot be written"):
        own.run(tiny_trainee(), 1, "run")


def test_classify_gives_labels_loss_and_accuracy(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    rows = [{"text": f"text number {index} " + "!" * (index % 5), "label": LABELS[index % 3]} for index in range(14)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    sources = {name: {"path": str(tmp_path / f"{name}.jsonl"), "format": "text-label"} for name in ("train", "held")}
    own = evaluator(
        tmp_path,
        model={"path": "x", "kind": "classification", "labels": LABELS, "dtype": "float32", "max_length": 128},
        sources=sources,
        stages=[{"name": "only", "mixture": {"train": 1.0}, "objective": {"name": "classification"}}],
        evaluation={"suites": [{"name": "moods", "source": "held", "kind": "classify"}]},
    )
    config = LlamaConfig(**(tiny_llama().config.to_dict() | {"num_labels": 3, "pad_token_id": TOKENIZER.pad_token_id}))
    torch.manual_seed(0)
    trainee = Trainee(LlamaForSequenceClassification(config)).train()
    result = own.run(trainee, 2, "run")["moods"]
    losses, right = [], []
    for index, row in enumerate(rows):
        ids = torch.tensor(own.sources["held"].example(index)[0])[None].long()
        with torch.no_grad():
            logits = trainee.network.eval()(input_ids=ids).logits[0]
        losses.append(float(-logits.log_softmax(-1)[LABELS.index(row["label"])]))
        right.append(float(LABELS[int(logits.argmax())] == row["label"]))
    assert result["metrics"]["loss"] == pytest.approx(sum(losses) / 14, rel=1e-5)
    assert result["per_example"]["loss"] == pytest.approx(losses, rel=1e-5)
    assert result["per_example"]["accuracy"] == right and result["metrics"]["accuracy"] == sum(right) / 14
    assert set(result["metrics"]) == {"accuracy", "macro_f1", "loss"} == set(result["directions"])
    assert result["examples"][1]["prompt"] == "text number 1 !" and result["examples"][1]["reference"] == "angry"


def test_references_are_checked_without_a_model(tmp_path: Path) -> None:
    evaluator(tmp_path).check()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "{not JSON"}]
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": turns}))
    write_chats(tmp_path / "train.jsonl", 4)
    evaluator(tmp_path).check()
    suites = [SUITES[1] | {"metrics": ["exact_match", "json_match"]}]
    with pytest.raises(UserError, match=r"held:1: json_match of suite 'answers': .*'\{not JSON': not JSON"):
        evaluator(tmp_path, evaluation={"suites": suites}).check()


def test_suites_are_due_by_their_own_rhythm_and_all_at_the_end(tmp_path: Path) -> None:
    suites = [SUITES[0], SUITES[1] | {"every": 4}]
    settings = recipe_of(tmp_path, evaluation={"suites": suites, "every": 2}).evaluation
    due = {step: [suite.name for suite in due_suites(settings, step, final=False)] for step in range(5)}
    assert due == {0: [], 1: [], 2: ["held-out"], 3: [], 4: ["held-out", "answers"]}
    assert [suite.name for suite in due_suites(settings, 3, final=True)] == ["held-out", "answers"]
    once = recipe_of(tmp_path).evaluation
    assert due_suites(once, 100, final=False) == [] and len(due_suites(once, 100, final=True)) == 2


def _one_rank(rank: int, folder: str) -> None:
    os.environ["TUNESMITH_CACHE"] = f"{folder}/cache"
    with connected(environment_world()) as world:
        recipe = recipe_of(Path(folder))
        for way in ("replicated", "sharded"):
            own = Evaluator(recipe, prepared(recipe), TOKENIZER, world, Path(folder, way))
            own.run(tiny_trainee(), None, "base")
            trainee = tiny_trainee(seed=1)
            if way == "sharded":
                shard(trainee, recipe.engine, torch.float32, world)
            Path(folder, f"{way}-{rank}.json").write_text(json.dumps(own.run(trainee, 50, "run")))


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    one = evaluator(tmp_path)
    one.run(tiny_trainee(), None, "base")
    expected = one.run(tiny_trainee(seed=1), 50, "run")
    run_ranks(2, _one_rank, str(tmp_path))
    for way in ("replicated", "sharded"):
        ranks = [json.loads((tmp_path / f"{way}-{rank}.json").read_text()) for rank in range(2)]
        assert ranks[0] == ranks[1]
        for suite, ours in expected.items():
            theirs = read_result(result_path(tmp_path / way, suite, 50, "run"))
            assert theirs == ranks[0][suite]
            assert list(theirs) == list(ours)
            for key in ours.keys() - {"seconds", "metrics", "per_example", "verdicts"}:
                assert theirs[key] == ours[key], (way, key)
            for name, values in ours["per_example"].items():
                assert theirs["per_example"][name] == pytest.approx(values, rel=1e-5)
            assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=1e-6)
            for left, right in zip(theirs["verdicts"], ours["verdicts"], strict=True):
                assert (left["metric"], left["better"], left["n"]) == (right["metric"], right["better"], right["n"])
                assert left["low"] == pytest.approx(right["low"], rel=1e-4)
