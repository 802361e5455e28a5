"""Come back to what a run saved, in one process: choose weights, evaluate them anew, export them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import Reader, newest, open_checkpoint, verify
from trainer.checkpoint.export import export
from trainer.checkpoint.manifest import step_name, step_of
from trainer.checkpoint.ranges import PARAMETER
from trainer.checkpoint.retention import best, scores_of
from trainer.checkpoint.weights import EMA, Weights, fill
from trainer.config import Recipe, UserError, load_recipe
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.evaluation.suites import Evaluator
from trainer.model.build import build_trainee
from trainer.model.files import base_digest
from trainer.model.load import DTYPES
from trainer.model.probes import verify_trainee
from trainer.model.root import Trainee
from trainer.tracking import read_rows
from trainer.tracking.run_folder import check_run_folder
from trainer.world import World, connected, environment_world

CHECKPOINTS, AVERAGES = "checkpoints", "averages"
AVERAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Choice:
    """Which of a run's weights: of a step, of the best evaluated step, of an average; default the newest good ones.

    With `ema` the moving average that training kept at that step, in place of the trained weights.
    """

    step: int | None = None
    best: bool = False
    average: str | None = None
    ema: bool = False

    def __post_init__(self) -> None:
        given = [
            name
            for name, value in (("--step", self.step is not None), ("--best", self.best), ("--average", self.average))
            if value
        ]
        if len(given) > 1:
            raise UserError(f"{given[1]}: cannot stand beside {given[0]}; give one of them")
        if self.average and self.ema:
            raise UserError("--ema: an average holds no moving average; give one of --average and --ema")


def steps_on_disk(folder: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending, good or not."""
    return sorted(step for path in newest(folder / CHECKPOINTS) if (step := step_of(path)) is not None)


def best_steps(folder: Path, recipe: Recipe, metric: str, ema: bool) -> list[int]:
    """The steps on disk by the metric that the run measured there, best first; those without one are left out.

    Raises UserError where none was measured, or what was measured is not the weights that are asked for.
    """
    if recipe.ema.evaluate and not ema:
        raise UserError(
            "--best: this run measured its moving average (ema.evaluate), not the trained weights: name steps, or --ema"
        )
    held = steps_on_disk(folder)
    found = best(held, scores_of(read_rows(folder), metric), metric)
    if not found:
        raise UserError(
            f"--best: {folder}: `{metric}` was measured at none of the steps on disk ({_listed(held)}): choose a "
            "--step, or another metric in checkpoint.metric"
        )
    return found


def chosen(folder: Path, recipe: Recipe, choice: Choice) -> Weights:
    """The weights of a choice, every byte verified before anything loads.

    Raises UserError for what is not there, CheckpointError for what is spoilt. Only the default falls back to an older
    checkpoint, with a warning.
    """
    kind = EMA if choice.ema else PARAMETER
    if choice.average is not None:
        path = folder / AVERAGES / choice.average
        if not AVERAGE_NAME.fullmatch(choice.average) or not path.is_dir():
            names = sorted(p.name for p in (folder / AVERAGES).glob("[!.]*/"))
            raise UserError(f"--average: {choice.average!r}: not among {_listed(names)} of {path.parent}")
        return Weights(Reader(path, verify(path)), kind)
    step = choice.step
    if choice.best:
        step = best_steps(folder, recipe, recipe.checkpoint.metric, choice.ema)[0]
    if step is None:
        return Weights(open_checkpoint(folder / CHECKPOINTS), kind)
    held = steps_on_disk(folder)
    if step not in held:
        raise UserError(f"--step: {step}: has no checkpoint; there are {_listed(held)}")
    return Weights(open_checkpoint(folder / CHECKPOINTS / step_name(step)), kind)


def origin(weights: Weights) -> str:
    """Where weights are from, in words: for records."""
    average = weights.state.get("average")
    if average:
        return f"average {average['name']} of steps {_listed(average['steps'])}"
    return f"step-{weights.step:08d}" + (", moving average" if weights.kind == EMA else "")


@dataclass
class Opened:
    """A run's parts without its training, and the weights chosen of it."""

    recipe: Recipe  # of an average, with the rank of its adapter
    weights: Weights
    tokenizer: Any
    world: World

    def trainee(self) -> Trainee:
        """The untrained model in the arithmetic of training: trainable parameters are low-precision copies."""
        trainee = build_trainee(self.recipe, self.tokenizer.pad_token_id, masters=False)
        for parameter in trainee.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[self.recipe.model.dtype])
        trainee.device_type = self.world.device.type
        trainee.to(self.world.device)
        verify_trainee(trainee, self.recipe)
        return trainee

    def network(self) -> torch.nn.Module:
        """The trained network alone, for one user that frees it."""
        trainee = self.trainee()
        fill(trainee, self.weights)
        return trainee.network


@contextmanager
def opened(folder: Path, overrides: list[str], choice: Choice) -> Iterator[Opened]:
    """The parts of a run's folder in one process; nothing heavy is loaded yet.

    Raises UserError where the base model is not the run's: an adapter over another base would load without a word and
    mean nothing.
    """
    recipe, world = recorded(folder, overrides)
    weights = chosen(folder, recipe, choice)
    check_base(recipe, weights)
    tuning = weights.state.get("average", {}).get("tuning")
    if tuning:
        recipe = recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update=tuning)})
    tokenizer = load_tokenizer(recipe.model)
    with connected(world):
        yield Opened(recipe, weights, tokenizer, world)


def check_base(recipe: Recipe, weights: Weights) -> None:
    """Raise UserError where the base model's files are not those that the weights were trained on."""
    if weights.state.get("base_digest") != base_digest(recipe.model):
        raise UserError(
            f"model.path: {recipe.model.path}: is not the base model that this run was trained on; restore it"
        )


def recorded(folder: Path, overrides: list[str]) -> tuple[Recipe, World]:
    """The recipe of a run's folder, and this one process. Raises UserError where there is none, or under a launcher."""
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"run: {folder}: has no recipe.yaml; give the folder of a run")
    check_run_folder(folder, "run")
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    world = environment_world()
    if world.size > 1:
        raise UserError(f"run: {folder}: this verb works in one process; start it without torchrun")
    return recipe, world


def evaluate_run(folder: Path, overrides: list[str], choice: Choice) -> list[str]:
    """Run the suites of a run on the chosen weights; one line a suite.

    Overrides may change `evaluation` and `sources` only; with any, the base model is measured anew too, since a verdict
    pairs the same examples. Where the run evaluates its moving average (`ema.evaluate`), so does this.
    """
    for item in overrides:
        if not item.startswith(("evaluation.", "sources.")):
            raise UserError(f"override: {item!r}: only evaluation and sources can change after training")
    recipe, _ = recorded(folder, overrides)
    variant = f"{AVERAGES}/{choice.average}" if choice.average else ""
    if recipe.ema.evaluate and not choice.average:
        choice = Choice(choice.step, choice.best, None, True)
    elif choice.ema:
        variant = EMA
    with opened(folder, overrides, choice) as run:
        evaluator = Evaluator(
            run.recipe, prepare(run.recipe, tokenizer=run.tokenizer), run.tokenizer, run.world, folder
        )
        evaluator.check()
        suites, trainee = run.recipe.evaluation.suites, run.trainee()
        if overrides and run.recipe.evaluation.baseline == "base-model":
            evaluator.run(trainee, None, "base", suites)
        fill(trainee, run.weights)
        results = evaluator.run(trainee, run.weights.step, "run", suites, variant)
    lines = []
    for name, result in results.items():
        lines.append(f"{name}: {json.dumps(result['metrics'])}")
        lines += [f"  {verdict['summary']}" for verdict in result.get("verdicts", [])]
    return lines


def export_run(folder: Path, out: Path, adapter: bool, choice: Choice) -> dict[str, Any]:
    """Write the chosen weights as a Hugging Face folder; returns the parity report."""
    with opened(folder, [], choice) as run:
        weights = run.weights
        return export(
            run.network, weights, run.tokenizer, out, adapter=adapter, recipe=run.recipe, step=weights.step,
            origin=origin(weights),
        )  # fmt: skip


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values)) or "none"
