"""The proof of the engine room: however a step is cut up, the numbers are the same.

fp32, a tiny model, 20 steps of AdamW with clipping: packed = padded, one micro-batch = many, 1 process = 2 = 4
under FSDP2, for full fine-tuning, LoRA and QLoRA. Losses within 1e-5 relative, final parameters within 1e-5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import next_port, run_ranks

from trainer.checkpoint.manifest import newest
from trainer.config import build_recipe
from trainer.session import open_session
from trainer.tracking import read_rows
from trainer.train import train

METHODS: dict[str, dict[str, Any]] = {
    "full": {"tuning": {"method": "full"}},
    "lora": {"tuning": {"method": "lora", "rank": 4}},
    "qlora": {"tuning": {"method": "lora", "rank": 4}, "model": {"quantization": "nf4"}},
}
CUTS: dict[str, dict[str, Any]] = {
    "reference": {"batch": {"packing": "padded", "micro_tokens": 4096}},
    "packed": {"batch": {"packing": "packed", "micro_tokens": 4096}},
    "packed-micro": {"batch": {"packing": "packed", "micro_tokens": 96}},
    "padded-micro": {"batch": {"packing": "padded", "micro_tokens": 96}},
}


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    parameters: dict[str, torch.Tensor]


def recipe_for(
    folder: Path, model: Path, data: Path, method: str, cut: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    extra = METHODS[method]
    return {
        "name": folder.name,
        "output": str(folder),
        "model": {"path": str(model), "dtype": "float32", "max_length": 96, **extra.get("model", {})},
        "tuning": extra["tuning"],
        "sources": {"chats": {"path": str(data), "format": "messages"}},
        "optimizer": {"lr": 0.003, "weight_decay": 0.01, "clip": 1.0},
        "schedule": {"name": "cosine", "warmup": 2},
        "objective": {"name": "supervised", "label_smoothing": 0.1},
        "batch": {"examples": 6, **cut["batch"]},
        "until": {"steps": 20, "epochs": None},
        "tracking": {"ledger": True},
    } | changes


def run_here(recipe: dict[str, Any]) -> str:
    with open_session(build_recipe(recipe), console=False) as run:
        run.status = train(run)
    return run.status


def outcome(folder: Path) -> Outcome:
    """Losses from the record and parameters from the final checkpoint, put together from all ranks' files."""
    from safetensors.torch import load_file

    rows = [row for row in read_rows(folder) if row["kind"] == "step"]
    path = newest(folder / "checkpoints")[0]
    shards = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    manifest = json.loads((path / "manifest.json").read_text())
    parameters = {}
    for tensor in manifest["tensors"]:
        if tensor["kind"] != "param":
            continue
        whole = torch.full((int(torch.tensor(tensor["shape"]).prod()),), float("nan"))
        for part in tensor["ranges"]:
            key = f"param/{tensor['name']}@{part['start']}"
            whole[part["start"] : part["start"] + part["numel"]] = shards[part["file"]][key]
        parameters[tensor["name"]] = whole
    return Outcome([row["loss"] for row in rows], [row["grad_norm"] for row in rows], parameters)


def agree(found: Outcome, expected: Outcome) -> None:
    assert len(expected.losses) == 20
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        assert (found.parameters[name] - value).abs().max() <= 1e-5, name


def rank_runs(rank: int, recipes: list[dict[str, Any]]) -> None:
    for recipe in recipes:
        run_here(recipe)
        next_port()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chats: Path) -> Path:
    """All runs: every method by every cut in this process, and by 2 and 4 processes under FSDP2."""
    home = tmp_path_factory.mktemp("same-numbers")
    for method in METHODS:
        for cut, settings in CUTS.items():
            run_here(recipe_for(home / f"{method}-{cut}", tiny_folder, chats, method, settings))
    for size in (2, 4):
        cut = {"batch": {"packing": "packed", "micro_tokens": 96}}
        run_ranks(size, rank_runs, [recipe_for(home / f"{m}-fsdp{size}", tiny_folder, chats, m, cut) for m in METHODS])
    return home


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cut", ["packed", "packed-micro", "padded-micro", "fsdp2", "fsdp4"])
@pytest.mark.parametrize("method", METHODS)
def test_same_numbers(runs: Path, method: str, cut: str) -> None:
    agree(outcome(runs / f"{method}-{cut}"), outcome(runs / f"{method}-reference"))


def test_training_trains(runs: Path) -> None:
    for method in METHODS:
        losses = outcome(runs / f"{method}-reference").losses
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), method


def test_the_examples_of_a_step_do_not_depend_on_the_ranks(runs: Path) -> None:
    ledgers = [
        [sorted(json.loads(line)["ids"]) for line in (runs / name / "ledger.jsonl").read_text().splitlines()]
        for name in ("full-reference", "full-fsdp2", "lora-fsdp4", "qlora-packed")
    ]
    assert len(ledgers[0]) == 20
    assert all(ledger == ledgers[0] for ledger in ledgers)
