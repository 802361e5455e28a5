"""A run that is stopped goes on under other numbers of ranks: each example once in an epoch, losses to rounding.

Dropout is off here: its draws belong to a rank. In fp32 a change of ranks changes the order of sums, no more.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_resume import run_until
from test_same_numbers import CUTS, outcome, recipe_for
from tiny import run_ranks

from trainer.config import build_recipe
from trainer.session import open_session
from trainer.tracking import read_run
from trainer.train import train

EXAMPLES = 60  # of the chats fixture; 6 a step: an epoch has 10 steps


def leg(rank: int, recipe: dict[str, Any], stop: int | None) -> None:
    os.environ.setdefault("TEST_PORTS", "")
    if stop is not None:
        assert run_until(recipe, stop) == "preempted"
        return
    with open_session(build_recipe(recipe), console=False) as run:
        run.status = train(run)
    assert run.status == "complete"


def travel(recipe: dict[str, Any], legs: list[tuple[int, int | None]]) -> None:
    for ranks, stop in legs:
        if ranks == 1:
            leg(0, recipe, stop)
        else:
            run_ranks(ranks, leg, recipe, stop)


def check(folder: Path, straight: Path) -> None:
    found, expected = outcome(folder), outcome(straight)
    assert len(found.losses) == 20
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    for name, value in expected.parameters.items():
        assert (found.parameters[name] - value).abs().max() <= 1e-5, name
    steps = {row["step"]: row["ids"] for row in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())}
    for epoch in (range(1, 11), range(11, 21)):
        counts = Counter(name for step in epoch for name in steps[step])
        assert len(counts) == EXAMPLES and set(counts.values()) == {1}
    calm = {row["step"]: row["ids"] for row in map(json.loads, (straight / "ledger.jsonl").read_text().splitlines())}
    assert steps == calm


def recipes(folder: Path, model: Path, data: Path, method: str) -> list[dict[str, Any]]:
    cut = {"batch": {"packing": "packed", "micro_tokens": 96}}
    made = [recipe_for(folder / name, model, data, method, cut) for name in ("moved", "straight")]
    return [recipe | {"until": {"epochs": 2}, "schedule": {"name": "cosine", "warmup": 2}} for recipe in made]


def test_two_ranks_then_one(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    assert CUTS["packed-micro"]["batch"]["micro_tokens"] == 96
    moved, straight = recipes(tmp_path, tiny_folder, chats, "lora")
    travel(moved, [(2, 7), (1, None)])
    travel(straight, [(1, None)])
    check(tmp_path / "moved", tmp_path / "straight")
    assert read_run(tmp_path / "moved")["engine"] == "single"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_four_two_one_two(method: str, tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    moved, straight = recipes(tmp_path, tiny_folder, chats, method)
    travel(moved, [(4, 4), (2, 9), (1, 13), (2, None)])
    travel(straight, [(1, None)])
    check(tmp_path / "moved", tmp_path / "straight")
