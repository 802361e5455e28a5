"""A run: its folder, its parts built from a recipe, and what it keeps between steps."""

from __future__ import annotations

import json
import logging
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.adversarial import NoAdversary
from trainer.checkpoint import load, newest, save
from trainer.config import Recipe, Stage, UserError, dump_recipe
from trainer.continual import NoAnchor
from trainer.data.loader import Loader
from trainer.data.plan import Plan
from trainer.data.prepare import Prepared
from trainer.engine.base import Engine
from trainer.evaluation.suites import Evaluator, due_suites
from trainer.evaluation.watch import Watcher, direction_of, find_metric
from trainer.objectives import build_objective
from trainer.optim import Plateau, lr_factor, scaled_lr
from trainer.tracking import Tracker
from trainer.world import StopSignal, World

log = logging.getLogger(__name__)


class Run:
    """The parts of a run and its position. Built by `trainer.session.open_session`; stepped by `trainer.train`."""

    adversary = NoAdversary()
    anchor = NoAnchor()

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        folder: Path,
        engine: Engine,
        sources: Prepared,
        evaluator: Evaluator,
        tracker: Tracker,
        packed: list[bool],
        pad_id: int,
        facts: dict[str, Any],
    ) -> None:
        self.recipe, self.world, self.folder, self.engine = recipe, world, folder, engine
        self.sources, self.evaluator, self.tracker = sources, evaluator, tracker
        self.packed, self.pad_id, self.facts = packed, pad_id, facts
        self.stop = StopSignal()
        self.status = "failed"  # until the walk has returned
        self.step = 0
        self.skipped_in_row = 0
        self.last_lr_factor = 0.0
        self.last_saved = -1
        self.last_evaluated = -1
        self.stage_index = -1
        self.next_stage()

    # -- stages

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.recipe.stages[min(self.stage_index, len(self.recipe.stages) - 1)]

    def next_stage(self) -> None:
        """Enter the next stage: its data, objective, fresh optimizer and schedule."""
        self.stage_index += 1
        self.stage_step = 0
        self.stopped_early = False
        if self.stage_index >= len(self.recipe.stages):
            return
        stage = self.stage
        self.loader = self.make_loader(self.stage_index)
        self.objective = build_objective(stage.objective)
        self.peak_lr = scaled_lr(stage.optimizer, stage.batch)
        self.engine.configure(stage.optimizer, self.peak_lr)
        stopping = stage.until.early_stopping
        self.watcher = Watcher.from_settings(stopping) if stopping else None
        self.plateau = Plateau(stage.schedule, direction_of(stage.schedule.metric) == "higher")
        rule = stage.optimizer.scale_lr
        if rule.rule != "none":
            detail = f"{rule.rule} rule: {stage.optimizer.lr:g} at {rule.reference_batch} -> {self.peak_lr:g}"
            self.tracker.event(self.step, "lr_scaled", detail)
        self.tracker.event(self.step, "stage", f"{stage.name}: {self.loader.total_steps} steps")

    def make_loader(self, index: int) -> Loader:
        """The loader of a stage at its start."""
        stage = self.recipe.stages[index]
        return Loader(
            Plan(stage, self.sources.stage(stage), self.recipe.seed, index),
            rank=self.world.rank,
            size=self.world.size,
            packed=self.packed[index],
            pad_id=self.pad_id,
            classification=self.recipe.model.kind == "classification",
        )

    def lr_factor(self) -> float:
        """Factor of the peak learning rate for the coming step."""
        schedule = lr_factor(self.stage.schedule, self.stage_step, self.loader.total_steps)
        self.last_lr_factor = schedule * self.plateau.factor
        return self.last_lr_factor

    # -- evaluation

    def evaluate_baseline(self) -> None:
        """Measure the base model once, before the first step: the run's own weights are still those of the base."""
        if self.recipe.evaluation.baseline == "none" or self.step > 0 or not self.recipe.evaluation.suites:
            return
        names = ", ".join(suite.name for suite in self.recipe.evaluation.suites)
        self.tracker.event(self.step, "baseline", f"evaluating the base model: {names}")
        self.evaluator.run(self.engine.model, None, "base", self.recipe.evaluation.suites)

    def evaluate_if_due(self) -> None:
        """Run the suites that are due at this step; early stopping and plateau see their metrics."""
        due = due_suites(self.recipe.evaluation, self.step, final=False)
        if due:
            self.evaluate(due)

    def evaluate(self, suites: list[Any], watch: bool = True) -> None:
        """Evaluate the current weights on suites, record, and let the watchers see the metrics."""
        results = self.evaluator.run(self.engine.model, self.step, "run", suites)
        metrics = {name: result["metrics"] for name, result in results.items()}
        for name, values in metrics.items():
            self.tracker.eval({"step": self.step, "stage": self.stage.name, "suite": name, "metrics": values})
        if len(suites) == len(self.recipe.evaluation.suites):
            self.last_evaluated = self.step
        if watch:
            self._watch(metrics)

    def _watch(self, metrics: dict[str, dict[str, float]]) -> None:
        schedule = self.stage.schedule
        if schedule.name == "plateau":
            value = find_metric(metrics, schedule.metric)
            if value is not None and self.plateau.observe(value):
                self.tracker.event(self.step, "plateau", f"learning rate factor {self.plateau.factor:g}")
        if self.watcher and self.watcher.observe(metrics):
            self.stopped_early = True
            self.tracker.event(self.step, "early_stop", f"stage {self.stage.name}: no gain in {self.watcher.metric}")

    # -- checkpoints

    def save_if_due(self) -> None:
        """Save at the recipe's interval."""
        every = self.recipe.checkpoint.every
        if every and self.step % every == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this step, once."""
        if self.last_saved == self.step:
            return
        started = time.perf_counter()
        self.tracker.sync()
        folder, keep = self.folder / "checkpoints", self.recipe.checkpoint.keep
        path = save(folder, self.step, self.engine, self.world, self.state(), keep)
        self.last_saved = self.step
        self.tracker.event(
            self.step, "checkpoint", {"path": path.name, "seconds": round(time.perf_counter() - started, 3)}
        )

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        return {
            "step": self.step,
            "stage": self.stage_index,
            "stage_step": self.stage_step,
            "stopped_early": self.stopped_early,
            "skipped_in_row": self.skipped_in_row,
            "last_evaluated": self.last_evaluated,
            "loader": self.loader.state(),
            "plateau": self.plateau.state(),
            "watcher": self.watcher.state() if self.watcher else None,
            **self.facts,
        }

    def resume(self) -> bool:
        """Go on from the newest good checkpoint, if there is one; returns whether there was.

        Raises UserError where every checkpoint is bad: a run never starts from zero in silence.
        """
        folder = self.folder / "checkpoints"
        if not newest(folder):
            return False
        loaded = load(folder, self.engine, self.world, prepare=self._position)
        for reason in loaded.refused:
            self.tracker.event(self.step, "checkpoint_refused", reason)
        self.tracker.event(self.step, "resume", f"from {loaded.path.name}")
        return True

    def _position(self, state: Mapping[str, Any]) -> None:
        """Bring everything but the tensors to a saved position; called between verification and loading."""
        for key in ("base_digest", "fingerprints"):
            if state.get(key) != self.facts.get(key):
                raise UserError(
                    f"resume: {key} of the checkpoint is another: {_difference(state.get(key), self.facts.get(key))}"
                )
        self.stage_index = min(state["stage"], len(self.recipe.stages)) - 1
        self.next_stage()
        self.step, self.stage_step = state["step"], state["stage_step"]
        self.stopped_early, self.skipped_in_row = state["stopped_early"], state["skipped_in_row"]
        self.last_evaluated = state["last_evaluated"]
        self.last_saved = self.step
        if self.stage_index < len(self.recipe.stages):
            self.loader.load(state["loader"])
            self.plateau.load(state["plateau"])
            if self.watcher and state["watcher"]:
                self.watcher.load(state["watcher"])

    # -- records

    def write_ledger(self, step: int) -> None:
        """Append the ids of the step's examples, where the recipe asks for it."""
        if self.recipe.tracking.ledger and self.world.is_main:
            with (self.folder / "ledger.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "stage": self.stage.name, "ids": self.loader.step_ids()}) + "\n")


def finish(run: Run) -> None:
    """The end of the last stage: final checkpoint, final evaluation."""
    run.save()
    if run.last_evaluated != run.step and run.recipe.evaluation.suites:
        run.evaluate(run.recipe.evaluation.suites, watch=False)


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_output(folder: Path) -> None:
    """Raise UserError where the run's folder could not be written; makes nothing."""
    ancestor = folder.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        if not ancestor.is_dir():
            raise NotADirectoryError(20, "not a directory")
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise UserError(
            f"output: {folder}: {ancestor} cannot be written ({error.strerror}); choose another `output`"
        ) from error


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """The resolved recipe, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".recipe.yaml.{os.getpid()}"
    staging.write_text(dump_recipe(recipe), encoding="utf-8")
    staging.replace(folder / "recipe.yaml")


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return f"{', '.join(changed)} changed; restore the data or start a new `output`"
    return f"{str(old)[:12]} became {str(new)[:12]}; restore it or start a new `output`"
