"""Walk a run's stages. THE STEP is `train_step`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer import heartbeat
from trainer.adversarial import Pass
from trainer.config import RunError
from trainer.data.batch import Batch, target_counts
from trainer.fault import fail_point
from trainer.objectives import Terms, per_target
from trainer.run import Run, finish, memory_bytes
from trainer.world import World, seed_step

log = logging.getLogger(__name__)


@dataclass
class StepReport:
    """What one optimizer step did. Observers get it finished and can change nothing."""

    step: int
    counts: dict[str, float]  # targets per task over all ranks
    grad_norm: float = math.nan
    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # of this rank's clean passes
    tokens: int = 0  # real tokens of this rank
    totals: dict[str, float] = field(default_factory=dict)  # the sums and tokens over all ranks
    spike: bool = False  # the loss rose beyond the recipe's limit
    applied: bool = True  # whether the update was to be made

    def add(self, terms: dict[str, Terms], attempt: Pass, batch: Batch) -> None:
        """Take one pass's detached sums; perturbed passes do not count as the loss."""
        if not attempt.clean:
            return
        self.tokens += batch.tokens
        for task, term in terms.items():
            for name, value in term._asdict().items():
                key = f"{task}/{name}"
                self.sums[key] = self.sums.get(key, 0.0) + value.detach().double()

    def close(self, world: World) -> None:
        """Sum over ranks, once; from here on the numbers are those of the global step, the same on every rank."""
        local = {f"{task}/{name}": 0.0 for task in self.counts for name in Terms._fields}
        local |= {key: float(value) for key, value in self.sums.items()}
        self.totals = world.sum({**local, "tokens": float(self.tokens)})

    def mean(self, name: str) -> float:
        """A summed term (loss, nll, correct) over all tasks, divided by all targets."""
        total = sum(self.totals[f"{task}/{name}"] for task in self.counts)
        return total / max(sum(self.counts.values()), 1e-12)

    @property
    def loss(self) -> float:
        """The mean loss per target of the global step."""
        return self.mean("loss")

    @property
    def skipped(self) -> bool:
        """Whether the update was left out: the gradient was not finite, or the loss a spike."""
        return not (self.applied and math.isfinite(self.grad_norm))


def train_step(run: Run) -> StepReport:
    """One optimizer step. Whatever can change a weight is named here."""
    seed_step(run.recipe.seed, run.step, run.world.rank)  # dropout: a function of seed, step and rank alone
    batches = run.loader.next_step()  # this rank's micro-batches of the global batch
    heartbeat.step(run.step + 1, run.loader.step_ids)  # whoever watches can name the examples, whatever they do
    fail_point("step", step=run.step + 1)
    counts = run.world.sum(target_counts(batches))  # targets per task over all ranks
    report = StepReport(run.step + 1, counts)

    for batch, last_batch in flag_last(batches):
        batch = batch.to(run.world.device)
        for attempt in run.adversary.passes(run.engine.model.embeddings, batch):  # one clean pass; or clean, perturbed
            terms = run.objective(run.engine.model, batch)  # {task: summed loss}
            loss = per_target({task: term.loss for task, term in terms.items()}, counts)  # the only division
            run.engine.backward(attempt.share * loss, last=last_batch and attempt.last)
            report.add(terms, attempt, batch)

    report.close(run.world)  # the sums of the whole step
    report.spike = run.spikes.judge(report.loss)
    report.applied = not (report.spike and run.spikes.forbids)
    run.saver.copied()  # a save in flight has copied what changes now
    report.grad_norm = run.engine.step(run.lr_factor(), pull=run.anchor.pull, apply=report.applied)
    run.anchor.observe(run.engine.slots())  # SI measures the move
    run.ema.observe(run.engine.slots())
    run.step += 1
    run.stage_step += 1
    return report


def flag_last(batches: list[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each micro-batch with whether it is the step's last."""
    for index, batch in enumerate(batches):
        heartbeat.beat()
        yield batch, index == len(batches) - 1


def train(run: Run) -> str:
    """Walk the stages to the end or to a stop signal; returns the status: complete or preempted."""
    heartbeat.phase("step")
    run.evaluate_baseline()
    while True:
        status = walk_stage(run)
        if status == "preempted":
            run.save()
            return status
        if run.stage_index + 1 == len(run.recipe.stages):
            break  # the position stays inside the last stage: a later run with a longer one goes on there
        run.next_stage()
    finish(run)
    return "complete"


def walk_stage(run: Run) -> str:
    """Step until the stage's data, steps or patience end: `done`; or a signal stops all ranks: `preempted`."""
    started = time.perf_counter()
    while not run.loader.done and not run.stopped_early:
        signs = run.world.sum({"stop": float(run.stop.raised), "unsaved": float(run.saver.failed)})
        if signs["unsaved"]:
            run.saver.raise_failure()
        if signs["stop"]:
            run.tracker.event(run.step, "preempted", f"signal {run.stop.name or 'on another rank'}")
            return "preempted"
        if run.step + 1 in run.recipe.guard.skip_steps:
            run.pass_over()
            heartbeat.step_done(run.step)
            continue
        report = train_step(run)
        ended = time.perf_counter()
        record(run, report, ended - started)
        guard(run, report)
        if report.spike:
            run.tracker.event(run.step, "spike", f"loss {report.loss:.4g}; examples {run.shown_ids()}")
            if run.spikes.policy == "rollback" and run.roll_back():
                continue
        run.check_replicas_if_due()
        run.evaluate_if_due()
        run.save_if_due()
        heartbeat.step_done(run.step)
        started = time.perf_counter()
    return "done"


def record(run: Run, report: StepReport, seconds: float) -> None:
    """Write the finished step as a `step` row."""
    total, tokens = report.totals, int(report.totals["tokens"])
    row: dict[str, Any] = {
        "step": report.step,
        "stage": run.stage.name,
        "loss": report.loss,
        "losses": {task: total[f"{task}/loss"] / count for task, count in report.counts.items() if count},
        "nll": report.mean("nll"),
        "accuracy": report.mean("correct"),
        "grad_norm": report.grad_norm,
        "lr": run.peak_lr * run.last_lr_factor,
        "examples": len(run.loader.step_ids()),
        "tokens": tokens,
        "targets": sum(report.counts.values()),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "memory_bytes": int(run.world.max(memory_bytes(run.world.device))),
        "penalty": run.anchor.penalties(),
        "skipped": report.skipped,
        "spike": report.spike,
    }
    if report.step % run.recipe.tracking.every == 0 or report.skipped:
        run.tracker.step(row)
    run.write_ledger(report.step)


def guard(run: Run, report: StepReport) -> None:
    """Count skipped steps in a row; at the limit stop with the ids of the examples.

    Raises RunError on every rank in the same step, since the gradient norm is the same on all.
    """
    if math.isfinite(report.grad_norm):
        run.skipped_in_row = 0
        return
    run.skipped_in_row += 1
    shown = run.shown_ids()
    run.tracker.event(report.step, "skip", f"gradient norm {report.grad_norm}; examples {shown}")
    limit = run.recipe.guard.nonfinite_limit
    if run.skipped_in_row >= limit:
        raise RunError(
            f"step {report.step}: {limit} steps in a row without a finite gradient; last examples: {shown}; "
            "lower optimizer.lr, or look at these examples"
        )
