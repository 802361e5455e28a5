"""`tunesmith average`: which of a run's checkpoints, their mean, its record."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import CheckpointError, open_checkpoint
from trainer.checkpoint.average import Average, Step, averaged_tuning, check_ranks, greedy_soup, write_average
from trainer.checkpoint.manifest import step_name
from trainer.checkpoint.weights import Weights, fill
from trainer.config import Recipe, Suite, UserError
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.evaluation.suites import Evaluator
from trainer.evaluation.watch import direction_of, find_metric
from trainer.model.root import Trainee
from trainer.revisit import AVERAGE_NAME, AVERAGES, CHECKPOINTS, Opened, best_steps, check_base, recorded, steps_on_disk
from trainer.tracking import read_rows
from trainer.tracking.run_record import replace_file
from trainer.world import World, connected

log = logging.getLogger(__name__)

Tell = Callable[[str], None]

_KEPT = ("base_digest", "tokenizer_digest", "recipe_digest", "fingerprints")  # of the members' state


@dataclass(frozen=True)
class Pick:
    """Which checkpoints to average: the newest k, the best k, named ones, or those that a greedy soup keeps."""

    last: int | None = None
    best: int | None = None
    steps: tuple[int, ...] | None = None
    greedy: bool = False
    metric: str | None = None

    def __post_init__(self) -> None:
        ways = {"--last": self.last, "--best": self.best, "--steps": self.steps}
        given = [name for name, value in ways.items() if value is not None]
        if self.greedy:
            given = [name for name in given if name != "--steps"] + ["--greedy"]
        if len(given) != 1:
            raise UserError(
                f"average: {' and '.join(given) or 'no rule'}: give one of --last, --best, --steps, --greedy"
            )
        if min(n for n in (self.last, self.best, 1) if n is not None) < 1:
            raise UserError(f"{given[0]}: how many checkpoints: from 1 on")
        if self.metric is not None and not (self.best or self.greedy):
            raise UserError(f"--metric: {self.metric!r}: only read with --best and --greedy")

    @property
    def name(self) -> str:
        """The name of the average where none is given."""
        if self.greedy:
            return "greedy"
        if self.last:
            return f"last-{self.last}"
        return f"best-{self.best}" if self.best else "steps-" + "-".join(map(str, sorted(self.steps or ())))


def parse_steps(text: str | None) -> tuple[int, ...] | None:
    """`10,20,30` as numbers. Raises UserError for what is none."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--steps: {text!r}: not steps; write 10,20,30") from None


def average_run(folder: Path, pick: Pick, name: str | None = None, tell: Tell = print) -> Path:
    """Average a run's checkpoints into `RUN/averages/<name>`, with a record beside it; returns the folder.

    Members are verified. `--last` and `--best` pass over a spoilt one with a warning and take the next; a named one
    must be good. Raises UserError where there are too few, or the metric was not measured.
    """
    name = name or pick.name
    if not AVERAGE_NAME.fullmatch(name):
        raise UserError(f"--name: {name!r}: letters, digits, dots, dashes and underscores, at most 64")
    recipe, world = recorded(folder, [])
    members = _members(folder, recipe, pick)
    check_base(recipe, members[-1])
    check_ranks(members[0].shapes, recipe.tuning)
    table: list[Step] = []
    if pick.greedy:
        with connected(world):
            table = _greedy(folder, recipe, world, members, pick.metric or recipe.checkpoint.metric, tell)
        kept = {row.step for row in table if row.kept}
        members = [member for member in members if member.step in kept]
    state = {key: members[-1].state[key] for key in _KEPT if key in members[-1].state}
    tuning = averaged_tuning(recipe.tuning, len(members))
    steps = [member.step for member in members]
    about: dict[str, Any] = {
        "name": name,
        "rule": pick.name,
        "steps": steps,
        "share": 1 / len(steps),
        "metric": (pick.metric or recipe.checkpoint.metric) if pick.best or pick.greedy else None,
        "metrics": _measured(folder, steps),
        "tuning": {"rank": tuning.rank, "alpha": tuning.alpha} if tuning.method == "lora" else None,
        "greedy": [_finite(asdict(row)) for row in table],
    }
    path = write_average(folder / AVERAGES / name, Average(members), steps[-1], state | {"average": about})
    replace_file(path.with_name(f"{name}.json"), json.dumps(about, indent=2, allow_nan=False) + "\n")
    tell(f"{path}: mean of steps {', '.join(map(str, steps))}")
    return path


def _members(folder: Path, recipe: Recipe, pick: Pick) -> list[Weights]:
    """The candidates by ascending step, verified."""
    held = steps_on_disk(folder)
    if pick.steps is not None:
        if missing := sorted(set(pick.steps) - set(held)):
            there = ", ".join(map(str, held)) or "none"
            raise UserError(f"--steps: {missing[0]}: has no checkpoint; there are {there}")
        if len(set(pick.steps)) < len(pick.steps):
            raise UserError(f"--steps: {', '.join(map(str, pick.steps))}: names a step twice")
        return [_open(folder, step) for step in sorted(pick.steps)]
    order = held[::-1]
    if pick.best:
        order = best_steps(folder, recipe, pick.metric or recipe.checkpoint.metric, ema=False)
    wanted = pick.last or pick.best or len(order)
    found = _good(folder, order, wanted)
    if not found or (not pick.greedy and len(found) < wanted):
        raise UserError(f"average: {folder / CHECKPOINTS}: {len(found)} good checkpoints, {wanted} asked for")
    return sorted(found, key=lambda weights: weights.step)


def _good(folder: Path, order: Iterable[int], wanted: int) -> list[Weights]:
    found: list[Weights] = []
    for step in order:
        if len(found) == wanted:
            break
        try:
            found.append(_open(folder, step))
        except CheckpointError as error:
            log.warning("left out of the average: %s", error)
    return found


def _open(folder: Path, step: int) -> Weights:
    return Weights(open_checkpoint(folder / CHECKPOINTS / step_name(step)))


def _greedy(folder: Path, recipe: Recipe, world: World, members: list[Weights], metric: str, tell: Tell) -> list[Step]:
    """The greedy soup's table. All k candidates and k - 1 soups are measured here: other ranks would sum otherwise."""
    if not recipe.evaluation.suites:
        raise UserError("--greedy: the recipe has no evaluation.suites to measure with; use --last or --steps")
    higher = direction_of(metric) == "higher"
    wide = recipe.model_copy(update={"tuning": averaged_tuning(recipe.tuning, len(members))})
    tokenizer = load_tokenizer(recipe.model)
    run = Opened(wide, members[-1], tokenizer, world)
    evaluator = Evaluator(recipe, prepare(recipe, tokenizer=tokenizer), tokenizer, run.world, folder)
    evaluator.check()
    trainee = run.trainee()
    by_step = {member.step: member for member in members}
    yardstick = _Yardstick(evaluator, trainee, metric)

    def together(steps: list[int]) -> float:
        fill(trainee, Average([by_step[step] for step in sorted(steps)], width=len(members)))
        return yardstick.measure()

    alone = {step: together([step]) for step in by_step}
    table = greedy_soup(alone, together, higher)
    tell(soup_table(table, metric))
    return table


class _Yardstick:
    """A metric of the run's suites on the model as it is; after the first time only the suite that gives it runs."""

    def __init__(self, evaluator: Evaluator, trainee: Trainee, metric: str) -> None:
        self.evaluator, self.trainee, self.metric = evaluator, trainee, metric
        suites = evaluator.recipe.evaluation.suites
        wanted = metric.rpartition("/")[0]
        self.suites: list[Suite] = [suite for suite in suites if wanted in ("", suite.name)]

    def measure(self) -> float:
        """The metric's value. Raises UserError where no suite gives it."""
        for suite in self.suites:
            value = find_metric({suite.name: self.evaluator.measure(self.trainee, suite)["metrics"]}, self.metric)
            if value is not None:
                self.suites = [suite]
                return value
        raise UserError(f"--metric: {self.metric!r}: no suite of the recipe gives it")


def soup_table(rows: list[Step], metric: str) -> str:
    """The greedy soup's table as plain text, in the order in which candidates were tried."""
    lines = [f"{'step':>8} {'alone':>12} {'soup':>12}  {metric}"]
    lines += [f"{r.step:>8} {r.alone:>12.6g} {r.soup:>12.6g}  {'kept' if r.kept else 'left out'}" for r in rows]
    return "\n".join(lines)


def _measured(folder: Path, steps: list[int]) -> dict[str, dict[str, Any]]:
    """{step: {suite: metrics}} of the members, as the journal has them."""
    found: dict[str, dict[str, Any]] = {}
    for row in read_rows(folder):
        if row.get("kind") == "eval" and row.get("step") in steps:
            found.setdefault(str(row["step"]), {})[row["suite"]] = _finite(row["metrics"])
    return found


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
