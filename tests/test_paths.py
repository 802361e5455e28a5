"""Whole runs down the less trodden paths: classification, quantised bases, every optimizer, stages, patience."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import identical, run_until
from test_same_numbers import outcome, run_here
from tiny import byte_tokenizer, write_chats

from trainer.config import UserError, build_recipe
from trainer.session import open_session
from trainer.tracking import read_rows, read_run
from trainer.train import train, train_step


def base(folder: Path, model_folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    recipe = {
        "name": "run",
        "output": str(folder / "run"),
        "model": {"path": str(model_folder), "dtype": "float32", "max_length": 96},
        "sources": {"chats": {"path": str(data), "format": "messages"}},
        "optimizer": {"lr": 0.003},
        "batch": {"examples": 6, "micro_tokens": 128},
        "until": {"steps": 20, "epochs": None},
    }
    return recipe | changes


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder) if row["kind"] == "step"]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder) if row["kind"] == "event" and row["name"] == name]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd", "lion", "muon"])
def test_every_optimizer_trains_and_goes_on_bit_for_bit(
    name: str, tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    lr = {"sgd": 0.1, "lion": 0.0005}.get(name, 0.003)
    settings = {"optimizer": {"name": name, "lr": lr} | ({"momentum": 0.9} if name == "sgd" else {})}
    full = {"tuning": {"method": "full"}}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_here(base(whole, tiny_folder, chats, **settings, **full))
    run_until(base(stopped, tiny_folder, chats, **settings, **full), 9)
    run_here(base(stopped, tiny_folder, chats, **settings, **full))
    identical(outcome(stopped / "run"), outcome(whole / "run"))
    losses = [row["loss"] for row in steps(whole / "run")]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_bases_train_adapters(
    quantization: str, dtype: str, tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    model = {"path": str(tiny_folder), "dtype": dtype, "max_length": 96, "quantization": quantization}
    held_out = write_chats(tmp_path / "held-out.jsonl", 8, seed=9)
    recipe = base(tmp_path, tiny_folder, chats, model=model, tuning={"rank": 4})
    recipe["sources"]["held-out"] = {"path": str(held_out), "format": "messages"}
    recipe["mixture"] = {"chats": 1.0}
    recipe["evaluation"] = {"every": 5, "suites": [{"name": "loss", "source": "held-out"}]}
    run_here(recipe)
    losses = [row["loss"] for row in steps(tmp_path / "run")]
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])


def label_rows(path: Path, rows: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            label = draw.choice(["low", "high"])
            text = "".join(draw.choice("abc" if label == "low" else "xyz") for _ in range(draw.randrange(4, 20)))
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-bert")
    config = BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_classification_learns_and_says_so_with_significance(
    architecture: str, tmp_path: Path, tiny_folder: Path, tiny_bert: Path
) -> None:
    folder = tiny_folder if architecture == "decoder" else tiny_bert
    recipe = base(tmp_path, folder, tmp_path, objective={"name": "classification", "class_weights": [1.0, 2.0]})
    recipe["model"] |= {"kind": "classification", "labels": ["low", "high"]}
    recipe["tuning"] = {"method": "full"}
    recipe["until"] = {"epochs": 3}
    recipe["sources"] = {
        "train": {"path": str(label_rows(tmp_path / "train.jsonl", 80, 1)), "format": "text-label"},
        "test": {"path": str(label_rows(tmp_path / "test.jsonl", 60, 2)), "format": "text-label"},
    }
    recipe["evaluation"] = {"suites": [{"name": "held-out", "source": "test", "kind": "classify"}]}
    run_here(recipe)
    file = next((tmp_path / "run" / "evaluation").glob("held-out-step-*.json"))
    result = json.loads(file.read_text())
    assert result["metrics"]["accuracy"] > 0.9
    verdict = next(v for v in result["verdicts"] if v["metric"] == "accuracy")
    assert verdict["better"] is True
    assert 0 < verdict["low"] <= verdict["difference"] <= verdict["high"]
    assert read_run(tmp_path / "run")["status"] == "complete"
    assert sum(row["examples"] for row in steps(tmp_path / "run")) == 240  # each example once an epoch
    assert all(
        row["packed"] is (architecture == "decoder")
        for row in [{"packed": p} for p in read_run(tmp_path / "run")["packed"]]
    )


def test_stages_follow_one_another_with_their_own_settings(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    text = tmp_path / "domain.txt.jsonl"
    text.write_text("".join(json.dumps({"text": f"the sum of {i} and {i} is {2 * i}"}) + "\n" for i in range(40)))
    recipe = base(tmp_path, tiny_folder, chats, tuning={"method": "last-layers", "layers": 1})
    recipe["sources"] |= {"domain": {"path": str(text), "format": "text", "task": "prose"}}
    recipe["optimizer"]["scale_lr"] = {"rule": "sqrt", "reference_batch": 24}
    recipe["stages"] = [
        {
            "name": "domain",
            "objective": {"name": "language-modeling"},
            "mixture": {"domain": 1.0},
            "until": {"epochs": 1, "steps": None},
            "batch": {"tokens": 200, "micro_tokens": 128},
        },
        {"name": "task", "mixture": {"chats": 0.75}, "until": {"steps": 6}},
    ]
    del recipe["batch"]
    recipe["stages"][1]["batch"] = {"examples": 6, "micro_tokens": 128}
    run_here(recipe)
    rows = steps(tmp_path / "run")
    assert [row["stage"] for row in rows[-6:]] == ["task"] * 6
    first = [row for row in rows if row["stage"] == "domain"]
    assert sum(row["examples"] for row in first) == 40
    assert max(row["tokens"] for row in first) <= 200
    assert set(first[0]["losses"]) == {"prose"} and set(rows[-1]["losses"]) == {"chats"}
    # peak 0.003 at 24; the second stage's batch of 6 halves it: sqrt(6/24)
    assert max(row["lr"] for row in rows[-6:]) == pytest.approx(0.0015)
    assert len(events(tmp_path / "run", "lr_scaled")) == 2


def test_early_stopping_and_plateau_follow_the_evaluated_metric(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    held_out = write_chats(tmp_path / "held-out.jsonl", 8, seed=9)
    recipe = base(tmp_path, tiny_folder, chats, tuning={"method": "full"})
    recipe["sources"]["held-out"] = {"path": str(held_out), "format": "messages"}
    recipe["mixture"] = {"chats": 1.0}
    recipe["optimizer"] = {"name": "sgd", "lr": 1e-7}  # nothing improves: both must act
    recipe["schedule"] = {"name": "plateau", "factor": 0.5, "patience": 0, "threshold": 0.01}
    recipe["until"] = {
        "steps": 50,
        "epochs": None,
        "early_stopping": {"metric": "watch/loss", "patience": 3, "min_delta": 0.01},
    }
    recipe["evaluation"] = {"every": 2, "suites": [{"name": "watch", "source": "held-out"}]}
    run_here(recipe)
    rows = steps(tmp_path / "run")
    assert len(rows) == 8  # the first evaluation sets the mark at step 2; patience ends at 4, 6, 8
    assert len(events(tmp_path / "run", "early_stop")) == 1
    assert [row["lr"] for row in rows] == pytest.approx([1e-7] * 4 + [5e-8] * 2 + [2.5e-8] * 2)


def test_packing_that_cannot_be_had_is_refused(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    recipe = base(tmp_path, tiny_folder, chats)
    recipe["model"]["attention"] = "sdpa"
    recipe["batch"]["packing"] = "packed"
    with pytest.raises(UserError, match=r"batch.packing: .packed.*sdpa. would mix"):
        run_here(recipe)


def test_a_packed_neighbour_changes_no_other_samples_loss(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    """Perturb one packed sample: the loss of every other stays the same to the last bit."""
    from dataclasses import replace

    from trainer.evaluation.likelihood import likelihoods

    with open_session(build_recipe(base(tmp_path, tiny_folder, chats)), console=False) as run:
        train_step(run)
        batch = run.loader.next_step()[0]
        assert batch.packed and len(batch.example_ids) >= 2
        model = run.engine.model.eval()
        before = likelihoods(model, [batch], run.world.device)
        first = int(batch.lengths[0])
        ids = batch.ids.clone()
        ids[0, :first] = (ids[0, :first] + 7) % 259
        after = likelihoods(model, [replace(batch, ids=ids)], run.world.device)
        run.status = train(run)
    assert before.nll[0] != after.nll[0]
    assert before.nll[1:] == after.nll[1:]
