"""Come back to a run's newest checkpoint in one process: evaluate it anew, export it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.checkpoint import load
from trainer.checkpoint.export import export
from trainer.config import Recipe, UserError, load_recipe
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.engine.single import SingleEngine
from trainer.evaluation.suites import Evaluator
from trainer.model.build import build_trainee
from trainer.model.root import Trainee
from trainer.tracking import read_run
from trainer.world import World, connected, environment_world


@contextmanager
def reopened(folder: Path, overrides: list[str]) -> Iterator[tuple[Recipe, Trainee, Any, World, int]]:
    """(recipe, trainee with the newest good checkpoint's weights, tokenizer, world, step) of a run's folder."""
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"run: {folder}: has no recipe.yaml; give the folder of a run")
    read_run(folder)
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    world = environment_world()
    if world.size > 1:
        raise UserError(f"run: {folder}: this verb works in one process; start it without torchrun")
    tokenizer = load_tokenizer(recipe.model)
    with connected(world):
        trainee = build_trainee(recipe, "single", tokenizer.pad_token_id)
        last = recipe.stages[-1]
        engine = SingleEngine(trainee, last.optimizer, last.optimizer.lr, world)
        loaded = load(folder / "checkpoints", engine, world, optimizer=False)
        yield recipe, trainee, tokenizer, world, loaded.step


def evaluate_run(folder: Path, overrides: list[str]) -> list[str]:
    """Run the suites of a run on its newest checkpoint; one line a suite. Overrides may change `evaluation` only."""
    for item in overrides:
        if not item.startswith(("evaluation.", "sources.")):
            raise UserError(f"override: {item!r}: only evaluation and sources can change after training")
    with reopened(folder, overrides) as (recipe, trainee, tokenizer, world, step):
        evaluator = Evaluator(recipe, prepare(recipe), tokenizer, world, folder)
        results = evaluator.run(trainee, step, "run", recipe.evaluation.suites)
    return [f"{name}: {json.dumps(result['metrics'])}" for name, result in results.items()]


def export_run(folder: Path, out: Path, merge: bool) -> dict[str, Any]:
    """Write the newest checkpoint as a Hugging Face folder; returns the parity report."""
    with reopened(folder, []) as (recipe, trainee, tokenizer, _, step):
        return export(trainee.network, tokenizer, out, merge=merge, recipe=recipe, step=step)
