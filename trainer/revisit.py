"""Come back to a run's newest checkpoint in one process: evaluate it anew, export it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import load
from trainer.checkpoint.export import export
from trainer.config import Recipe, UserError, load_recipe
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.engine.single import SingleEngine
from trainer.evaluation.suites import Evaluator
from trainer.model.build import build_trainee
from trainer.model.load import DTYPES, base_digest
from trainer.model.root import Trainee
from trainer.world import World, connected, environment_world


@dataclass
class Reopened:
    """A run's parts without its training: the weights are the base model's until `restore`."""

    recipe: Recipe
    trainee: Trainee
    tokenizer: Any
    world: World
    checkpoints: Path
    engine: SingleEngine
    digest: str  # of the base model and the method's first parameters

    def restore(self) -> int:
        """Read the newest good checkpoint's weights; returns its step."""
        return load(self.checkpoints, self.engine, self.world, self._check_base, optimizer=False).step

    def _check_base(self, state: dict[str, Any]) -> None:
        """An adapter over another base would load without a word and mean nothing."""
        if state.get("base_digest") != self.digest:
            raise UserError(
                f"model.path: {self.recipe.model.path}: is not the base model that this run was trained on; restore it"
            )


@contextmanager
def reopened(folder: Path, overrides: list[str], masters: bool = False) -> Iterator[Reopened]:
    """The parts of a run's folder in one process; with `masters` trainable weights stay in fp32 whatever the dtype."""
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"run: {folder}: has no recipe.yaml; give the folder of a run")
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    world = environment_world()
    if world.size > 1:
        raise UserError(f"run: {folder}: this verb works in one process; start it without torchrun")
    tokenizer = load_tokenizer(recipe.model)
    with connected(world):
        trainee = build_trainee(recipe, tokenizer.pad_token_id)
        digest = base_digest(trainee)  # before the engine puts low-precision copies in
        settings = recipe.stages[-1].optimizer
        dtype = torch.float32 if masters else DTYPES[recipe.model.dtype]
        engine = SingleEngine(trainee, settings, settings.lr, world, dtype)
        yield Reopened(recipe, trainee, tokenizer, world, folder / "checkpoints", engine, digest)


def evaluate_run(folder: Path, overrides: list[str]) -> list[str]:
    """Run the suites of a run on its newest checkpoint; one line a suite.

    Overrides may change `evaluation` and `sources` only; with any, the base model is measured anew too, since a verdict
    pairs the same examples.
    """
    for item in overrides:
        if not item.startswith(("evaluation.", "sources.")):
            raise UserError(f"override: {item!r}: only evaluation and sources can change after training")
    with reopened(folder, overrides) as run:
        evaluator = Evaluator(
            run.recipe, prepare(run.recipe, tokenizer=run.tokenizer), run.tokenizer, run.world, folder
        )
        evaluator.check()
        if overrides and run.recipe.evaluation.baseline == "base-model":
            evaluator.run(run.trainee, None, "base", run.recipe.evaluation.suites)
        results = evaluator.run(run.trainee, run.restore(), "run", run.recipe.evaluation.suites)
    lines = []
    for name, result in results.items():
        lines.append(f"{name}: {json.dumps(result['metrics'])}")
        lines += [f"  {verdict['summary']}" for verdict in result.get("verdicts", [])]
    return lines


def export_run(folder: Path, out: Path, merge: bool) -> dict[str, Any]:
    """Write the newest checkpoint as a Hugging Face folder; returns the parity report."""
    with reopened(folder, [], masters=True) as run:
        step = run.restore()
        return export(run.trainee.network, run.tokenizer, out, merge=merge, recipe=run.recipe, step=step)
