"""Averaged weights: the formula by hand, the exchange for evaluation, and their way through a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_same_numbers import CUTS, recipe_for
from tiny import next_port, run_ranks
from torch import nn

from trainer.checkpoint.manifest import newest, read_manifest
from trainer.config import build_recipe
from trainer.config.schema import Optimizer
from trainer.ema import EMA
from trainer.engine.single import SingleEngine
from trainer.session import open_session
from trainer.train import train
from trainer.world import World


def test_the_average_by_hand() -> None:
    engine: Any = SingleEngine(nn.Linear(1, 1, bias=False), Optimizer(), 0.1, World())  # type: ignore[arg-type]
    (slot,) = engine.slots()
    slot.owner.data.fill_(2.0)
    average = EMA(engine, 0.2, evaluate=True)
    slot.owner.data.fill_(12.0)
    average.observe(engine.slots())  # d = min(0.2, 1/10) = 0.1: 0.1 * 2 + 0.9 * 12
    assert average.averages[0].item() == pytest.approx(11.0)
    average.observe(engine.slots())  # d = 2/11
    assert average.averages[0].item() == pytest.approx(2 / 11 * 11 + 9 / 11 * 12)
    average.observe(engine.slots())  # d = min(0.2, 3/12) = 0.2
    expected = 0.2 * (2 + 108 / 11) + 0.8 * 12
    assert average.averages[0].item() == pytest.approx(expected)
    with average.evaluated():
        assert slot.owner.item() == pytest.approx(expected)
    assert slot.owner.item() == 12.0 and average.averages[0].item() == pytest.approx(expected)


def averaged(folder: Path, model: Path, data: Path) -> dict[str, Any]:
    recipe = recipe_for(folder, model, data, "lora", CUTS["packed"], until={"steps": 9, "epochs": None})
    return recipe | {"ema": {"decay": 0.7}, "checkpoint": {"every": 3}}


def run_until(recipe: dict[str, Any], step: int | None) -> list[torch.Tensor]:
    with open_session(build_recipe(recipe), console=False) as run:
        due = run.save_if_due

        def stop_there() -> None:
            due()
            if run.step == step:
                run.stop.event.set()

        run.save_if_due = stop_there  # type: ignore[method-assign]
        run.status = train(run)
        return [average.clone() for average in run.ema.averages]  # type: ignore[attr-defined]


def stop_and_go(rank: int, stopped: dict[str, Any], whole: dict[str, Any]) -> None:
    run_until(stopped, 5)
    next_port()
    found = run_until(stopped, None)
    next_port()
    expected = run_until(whole, None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_resumed_average_is_bit_identical_on_two_ranks(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    recipes = [averaged(tmp_path / name, tiny_folder, chats) for name in ("stopped", "whole")]
    run_ranks(2, stop_and_go, *recipes)
    kinds = {tensor.kind for tensor in read_manifest(newest(tmp_path / "whole" / "checkpoints")[0]).tensors}
    assert kinds == {"param", "exp_avg", "exp_avg_sq", "ema"}
