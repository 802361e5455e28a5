"""A run: its folder, its parts built from a recipe, and what it keeps between steps."""

from __future__ import annotations

import logging
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.adversarial import NoAdversary
from trainer.checkpoint import load, newest
from trainer.checkpoint.lease import NO_LEASE, NoLease
from trainer.checkpoint.retention import scores_of
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.space import check_start
from trainer.checkpoint.store import Store
from trainer.config import Recipe, RunError, Stage, UserError, dump_recipe
from trainer.config.changes import FLAG
from trainer.config.owner import check_writable
from trainer.continual import NoAnchor
from trainer.data.loader import Loader
from trainer.data.plan import Plan
from trainer.data.prepare import Prepared
from trainer.ema import EMA, NoEMA
from trainer.engine.base import Engine
from trainer.evaluation.suites import Evaluator, due_suites
from trainer.evaluation.watch import Watcher, direction_of, find_metric
from trainer.guard import NoSpikeWatch, SpikeWatch, differing_copies
from trainer.heartbeat import section
from trainer.objectives import build_objective
from trainer.optim import Plateau, lr_factor, scaled_lr
from trainer.signals import StopSignal
from trainer.tracking import Tracker, read_rows
from trainer.tracking.run_folder import check_run_folder
from trainer.tracking.run_record import replace_file
from trainer.world import World

log = logging.getLogger(__name__)

ROLLBACKS = 3


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
        allow_data_change: bool = False,
        lease: NoLease = NO_LEASE,
    ) -> None:
        self.recipe, self.world, self.folder, self.engine = recipe, world, folder, engine
        self.sources, self.evaluator, self.tracker = sources, evaluator, tracker
        self.packed, self.pad_id, self.facts = packed, pad_id, facts
        self.allow_data_change, self.lease = allow_data_change, lease
        store = Store(folder / "checkpoints", lease, recipe.checkpoint, tracker.sync)
        self.saver = Saver(store, world, tracker.event)
        self.stop = StopSignal()
        self.status = "failed"  # until the walk has returned
        self.step = 0
        self.skipped_in_row = 0
        self.rollbacks, self.rolled_to = 0, -1  # in a row, to the same checkpoint
        average = recipe.ema
        self.ema: NoEMA = NoEMA() if average.decay is None else EMA(engine, average.decay, average.evaluate)
        self.last_lr_factor = 0.0
        self.last_evaluated = -1
        self.stage_index = -1
        self.next_stage()

    # -- stages

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.recipe.stages[self.stage_index]

    def next_stage(self) -> None:
        """Enter the next stage: its data, objective, fresh optimizer and schedule."""
        self.stage_index += 1
        self.stage_step = 0
        self.stopped_early = False
        stage = self.stage
        self.loader = self.make_loader(self.stage_index)
        self.objective = build_objective(stage.objective)
        self.peak_lr = scaled_lr(stage.optimizer, stage.batch)
        self.saver.copied()
        self.engine.configure(stage.optimizer, self.peak_lr)
        stopping = stage.until.early_stopping
        self.watcher = Watcher.from_settings(stopping) if stopping else None
        self.plateau = Plateau(stage.schedule, direction_of(stage.schedule.metric) == "higher")
        spike = self.recipe.guard.spike
        self.spikes: SpikeWatch = NoSpikeWatch() if spike.policy == "off" else SpikeWatch(spike)  # a stage's own level
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
        self.saver.copied()  # the average may take the weights' place
        with self.ema.evaluated():
            results = self.evaluator.run(self.engine.model, self.step, "run", suites)
        metrics = {name: result["metrics"] for name, result in results.items()}
        for name, values in metrics.items():
            self.tracker.eval({"step": self.step, "stage": self.stage.name, "suite": name, "metrics": values})
        if len(suites) == len(self.recipe.evaluation.suites):
            self.last_evaluated = self.step
        self.saver.score(self.step, find_metric(metrics, self.recipe.checkpoint.metric))
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
        """Save at the recipe's interval, and tell of a save in the background that has succeeded."""
        self.saver.poll()
        every = self.recipe.checkpoint.every
        if not every:
            return
        self.saver.reserve(self.engine, self.ema.shadows)
        if self.step % every == 0:
            with section("checkpoint"):
                self.saver.save(self.step, self.engine, self.state(), self.ema.shadows)

    @section("checkpoint")
    def save(self) -> None:
        """Return once a checkpoint of this step is durable."""
        self.saver.save_last(self.step, self.engine, self.state(), self.ema.shadows)

    @property
    def last_saved(self) -> int:
        """The step of the newest checkpoint known to be durable; -1: none."""
        return self.saver.published

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        return {
            "step": self.step,
            "stage": self.stage_index,
            "stage_step": self.stage_step,
            "stopped_early": self.stopped_early,
            "skipped_in_row": self.skipped_in_row,
            "spikes": self.spikes.state(),
            "ema": self.ema.state(),
            "last_evaluated": self.last_evaluated,
            "loader": self.loader.state(),
            "plateau": self.plateau.state(),
            "watcher": self.watcher.state() if self.watcher else None,
            **self.facts,
        }

    def resume(self) -> bool:
        """Go on from the newest good checkpoint, if there is one; returns whether there was.

        Raises UserError where no checkpoint would fit on the disk, or where every one there is bad: a run never starts
        from zero in silence.
        """
        optimizers = [stage.optimizer for stage in self.recipe.stages]
        store = self.saver.store
        check_start(store.folder, store.settings.keep, self.engine, self.world, optimizers, self.ema.shadows)
        if not newest(store.folder):
            return False
        if self.recipe.checkpoint.keep_best and self.world.is_main:
            self.saver.scores = scores_of(read_rows(self.folder), self.recipe.checkpoint.metric)
        self.tracker.event(self.step, "resume", f"from {self._restore()}")
        return True

    def roll_back(self) -> bool:
        """After a spike: the weights of the newest good checkpoint, at the place in the data where the run stands.

        The steps between keep their numbers and count as untrained. False where this stage has no checkpoint yet: then
        the spike's update alone was left out. Raises RunError after ROLLBACKS in a row without a checkpoint between.
        """
        self.saver.wait()
        if self.last_saved <= self.step - self.stage_step:
            return False
        spiked, place, ids = self.step, self.loader.state(), self.shown_ids()
        self.rollbacks = self.rollbacks + 1 if self.last_saved == self.rolled_to else 1
        self.rolled_to = self.last_saved
        if self.rollbacks > ROLLBACKS:
            raise RunError(
                f"step {spiked}: {ROLLBACKS} rollbacks without a checkpoint between; last examples: {ids}; "
                "lower optimizer.lr, or look at these examples"
            )
        name = self._restore()
        saved = self.step
        self.loader.load(place)
        self.stage_step += spiked - saved
        for step in range(saved + 1, spiked + 1):
            self.write_ledger(step, untrained="rollback")
        self.step = spiked
        self.tracker.event(spiked, "rollback", f"to {name}, past steps {saved + 1} to {spiked}; last examples {ids}")
        return True

    @section("checkpoint")
    def _restore(self) -> str:
        """Weights, moments, average and position of the newest good checkpoint; returns its name."""
        averaged: list[bool] = []

        def position(state: Mapping[str, Any]) -> None:
            self._position(state)
            averaged.append(bool(state.get("ema")))

        loaded = load(
            self.folder / "checkpoints",
            self.engine,
            self.world,
            prepare=position,
            shadows=lambda: self.ema.shadows if averaged[-1] else {},
        )
        if not averaged[-1]:
            self.ema.follow()
        for reason in loaded.refused:
            self.tracker.event(self.step, "checkpoint_refused", reason)
        return loaded.path.name

    def _position(self, state: Mapping[str, Any]) -> None:
        """Bring everything but the tensors to a saved position; called between verification and loading."""
        check_facts(self.recipe, state, self.facts, self.allow_data_change)
        self.stage_index = min(state["stage"], len(self.recipe.stages) - 1) - 1
        self.next_stage()
        self.step, self.stage_step = state["step"], state["stage_step"]
        self.stopped_early, self.skipped_in_row = state["stopped_early"], state["skipped_in_row"]
        self.last_evaluated = state["last_evaluated"]
        self.saver.published = self.step
        self.loader.load(state["loader"], missing_ok=self.allow_data_change)
        self.plateau.load(state["plateau"])
        if self.watcher and state["watcher"]:
            self.watcher.load(state["watcher"])
        if state.get("spikes"):
            self.spikes.load(state["spikes"])
        self.ema.load(state.get("ema"))

    # -- steps that change nothing, copies that differ

    def check_replicas_if_due(self) -> None:
        """Compare what ranks hold in copies, at the recipe's interval and before each save. Raises RunError."""
        every, saving = self.recipe.guard.replica_check, self.recipe.checkpoint.every
        if not every or (self.step % every and not (saving and self.step % saving == 0)):
            return
        if odd := differing_copies(self.engine, self.world):
            name, ranks = next(iter(odd.items()))
            who = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
            raise RunError(
                f"step {self.step}: {who}: {len(odd)} parameters differ from the other ranks' copies, first {name}: "
                "start again to go on from the last checkpoint, and have the device of that rank tested"
            )

    def pass_over(self) -> None:
        """Draw the next step's examples and go past them untrained, as the recipe asks (`guard.skip_steps`)."""
        self.loader.next_step()
        self.step += 1
        self.stage_step += 1
        self.tracker.event(self.step, "passed_over", f"examples {self.shown_ids()}")
        self.write_ledger(self.step, untrained="guard.skip_steps")

    def shown_ids(self, most: int = 8) -> str:
        """The ids of the last step's examples, the first few of them."""
        ids = self.loader.step_ids()
        return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")

    # -- records

    def write_ledger(self, step: int, untrained: str | None = None) -> None:
        """Record the ids of the step's examples, where the recipe asks for it; the last row of a step counts."""
        row: dict[str, Any] = {"step": step, "stage": self.stage.name, "ids": self.loader.step_ids()}
        self.tracker.ledger({**row, "ids": [], "untrained": untrained} if untrained else row)


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
    """Raise UserError where the run's folder could not be written, or leads elsewhere; makes nothing."""
    check_run_folder(folder)
    check_writable(folder, "output")


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """The resolved recipe, whole or not at all, whatever the disk does next."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "recipe.yaml", dump_recipe(recipe))


FACTS = {  # what a checkpoint must agree with, and what it is of
    "base_digest": "model.path: the base model",
    "tokenizer_digest": "model.path: the tokenizer",
    "fingerprints": "sources: the data",
}


def check_facts(recipe: Recipe, old: Mapping[str, Any], new: Mapping[str, Any], allow_data_change: bool) -> None:
    """Raise UserError where a run's base model, tokenizer or training data are not those it was trained on."""
    for key, what in FACTS.items():
        before, now = old.get(key), new.get(key)
        if before == now or before is None or now is None:
            continue
        if key == "fingerprints":
            trained = sorted({name for stage in recipe.stages for name in stage.mixture})
            names = [name for name in trained if before.get(name, now[name]) != now[name]]
            if names and not allow_data_change:
                raise UserError(
                    f"{what} of {', '.join(names)} changed since the run began; restore it, start a new `output`, "
                    f"or go on with it by {FLAG}"
                )
            continue
        raise UserError(
            f"{what} is not the one of this run ({before[:12]} became {now[:12]}); restore it, or start a new `output`"
        )
