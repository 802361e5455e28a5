"""Whole runs under FSDP2's options against one process: 20 steps, losses 1e-5, norms 1e-4 relative, parameters 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_same_numbers import CUTS, Outcome, agree, outcome, recipe_for, run_here
from tiny import next_port, run_ranks

from trainer.tracking import read_run

AHEAD = {"activation_checkpointing": True, "prefetch": 2}
CASES: dict[str, tuple[int, str, dict[str, Any], str]] = {  # ranks, method, engine, how the base model is read
    "replicated": (2, "qlora", {"shard_size": 1, **AHEAD}, "whole"),
    "kept": (2, "full", {"reshard_after_forward": False, **AHEAD}, "sharded"),
    "read-whole": (2, "lora", {"loading": "whole", **AHEAD}, "whole"),
    "offloaded": (2, "lora", {"cpu_offload": True, "loading": "sharded", **AHEAD}, "sharded"),
    "hybrid-full": (4, "full", {"shard_size": 2}, "sharded"),
    "hybrid-lora": (4, "lora", {"shard_size": 2, **AHEAD}, "sharded"),
    "hybrid-qlora": (4, "qlora", {"shard_size": 2, "cpu_offload": True, "loading": "whole"}, "whole"),
}


def made(home: Path, name: str, model: Path, data: Path) -> dict[str, Any]:
    _, method, engine, _ = CASES[name]
    return recipe_for(home / name, model, data, method, CUTS["packed-micro"], engine=engine)


def rank_runs(rank: int, recipes: list[dict[str, Any]]) -> None:
    for recipe in recipes:
        assert run_here(recipe) == "complete"
        next_port()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chats: Path) -> Callable[[str], Outcome]:
    """The outcome of a run by name; all runs of as many ranks start when the first is asked for."""
    home = tmp_path_factory.mktemp("fsdp2-runs")

    def run(name: str) -> Outcome:
        if not (home / name).exists():
            if name in CASES:
                ranks = CASES[name][0]
                names = [other for other, case in CASES.items() if case[0] == ranks]
                run_ranks(ranks, rank_runs, [made(home, other, tiny_folder, chats) for other in names])
            else:
                run_here(recipe_for(home / name, tiny_folder, chats, name, CUTS["reference"]))
        if name in CASES:
            assert read_run(home / name)["loading"] == CASES[name][3]
        return outcome(home / name)

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_every_option_gives_one_process_numbers(name: str, result: Callable[[str], Outcome]) -> None:
    agree(result(name), result(CASES[name][1]))
