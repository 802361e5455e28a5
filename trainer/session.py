"""From a recipe to a Run that is ready to step, and the closing of it whatever happens."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.check import check_metrics, check_paths
from trainer.checkpoint.lease import check_free, held
from trainer.config import Recipe, load_recipe
from trainer.config.changes import Change, changes, check_changes
from trainer.config.deepspeed import zero_stage
from trainer.data.plan import Plan
from trainer.data.prepare import Prepared, prepare
from trainer.data.tokenizer import load_tokenizer, tokenizer_digest
from trainer.engine import check_engine, engine_kind
from trainer.engine.base import Engine
from trainer.evaluation.suites import Evaluator
from trainer.heartbeat import phase
from trainer.launched import RESTART
from trainer.model.build import build_trainee, build_unread, packs, parameter_counts
from trainer.model.files import base_digest
from trainer.model.load import DTYPES
from trainer.model.probes import verify_trainee
from trainer.model.root import Trainee
from trainer.optim import scaled_lr
from trainer.run import Run, check_facts, check_output, write_recipe
from trainer.tracking import Tracker, open_run, read_run
from trainer.world import World, connected, environment_world

log = logging.getLogger(__name__)

RUNTIME_KEYS = ("tracking", "checkpoint", "evaluation", "guard", "engine")  # no part of a recipe's digest


def preflight(recipe: Recipe) -> None:
    """Everything that can be known to be wrong before data are read or a model is loaded. Raises UserError."""
    check_output(Path(recipe.output))
    if environment_world().is_main:  # the other ranks may come when the main one holds the lease already
        check_free(Path(recipe.output))
    check_paths(recipe)
    check_metrics(recipe)


@dataclass(frozen=True)
class Standing:
    """What the run's folder holds already: nothing, this run, or this run under a recipe that has changed since."""

    record: Mapping[str, Any] = field(default_factory=dict)  # the run's own
    changes: tuple[Change, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return self.record.get("status") == "complete"

    @property
    def nothing_to_do(self) -> bool:
        """Whether the run is complete and nothing asks for more of it."""
        return self.complete and all(change.verdict == "free" for change in self.changes)


def standing(recipe: Recipe, *, fresh: bool = False, allow_data_change: bool = False) -> Standing:
    """What the run's folder holds. Raises UserError where it is a run that this recipe must not go on with."""
    folder = Path(recipe.output)
    if fresh or not (folder / "run.json").exists():
        return Standing()
    found: list[Change] = []
    if (folder / "recipe.yaml").exists():
        found = changes(load_recipe(folder / "recipe.yaml"), recipe)
        check_changes(found, recipe.output, allow_data_change)
    return Standing(read_run(folder), tuple(found))


@contextmanager
def open_session(
    recipe: Recipe, *, fresh: bool = False, console: bool = True, allow_data_change: bool = False
) -> Iterator[Run]:
    """Prepare data, join the other ranks, build, resume; on the way out record how it ended.

    Data are prepared before the process group exists, so that no rank waits inside a collective for a long
    tokenisation.
    """
    preflight(recipe)
    check_engine(recipe, environment_world().size)
    before = standing(recipe, fresh=fresh, allow_data_change=allow_data_change)
    folder, world = Path(recipe.output), environment_world()
    phase("data")
    tokenizer = load_tokenizer(recipe.model)
    sources = prepare(recipe, tokenizer=tokenizer)
    evaluator = Evaluator(recipe, sources, tokenizer, world, folder)
    evaluator.check()
    if before.record:
        check_facts(recipe, before.record, run_facts(recipe, tokenizer, sources), allow_data_change)
    kind = engine_kind(recipe.engine, world.size)
    phase("load")
    with connected(world, alone=kind == "deepspeed"), held(folder, world, fresh=fresh) as lease:
        trainee = load_trainee(recipe, tokenizer.pad_token_id, kind)
        facts = run_facts(recipe, tokenizer, sources)
        total, trainable = parameter_counts(trainee)
        packed = [packs(trainee, stage.batch.packing) for stage in recipe.stages]
        if world.is_main:
            write_recipe(folder, recipe)
            counts = {name: source.counts for name, source in sources.items()}
            open_run(
                folder,
                name=recipe.name,
                engine=kind,
                world_size=world.size,
                parameters={"total": total, "trainable": trainable},
                data=counts,
                packed=packed,
                changes=recorded_changes(folder, before, allow_data_change),
                attention=trainee.config._attn_implementation,
                loading="sharded" if trainee.unread else "whole",
                **facts,
            )
        world.barrier()
        engine = build_engine(recipe, trainee, kind, world)
        verify_trainee(trainee, recipe)
        tracker = build_tracker(recipe, sources, console=console, main=world.is_main, guard=lease.check)
        pad = tokenizer.pad_token_id
        run = Run(
            recipe, world, folder, engine, sources, evaluator, tracker, packed, pad, facts, allow_data_change, lease
        )
        with _recorded(run):
            run.stop.install()
            if reason := os.environ.get(RESTART):
                run.tracker.event(run.step, "restart", reason)
            if run.resume() and before.changes:
                run.tracker.event(run.step, "recipe_changed", "; ".join(str(change) for change in before.changes))
            yield run


@contextmanager
def _recorded(run: Run) -> Iterator[None]:
    """Close a run's saver and record, whatever happens; the record tells how it ended."""
    status = "failed"
    try:
        yield
        status = run.status
    except BaseException as error:
        run.tracker.event(run.step, "failed", str(error) or type(error).__name__)
        raise
    finally:
        run.saver.close()
        run.tracker.close(status)


def recorded_changes(folder: Path, before: Standing, allow_data_change: bool) -> list[dict[str, Any]]:
    """The history of a run's recipe: what was recorded, and what differs this time, by whose leave."""
    history = list(read_run(folder).get("changes", [])) if (folder / "run.json").exists() else []
    if before.changes or allow_data_change:
        differing = {change.key: [change.old, change.new] for change in before.changes}
        history.append({"time": round(time.time(), 3), "allow_data_change": allow_data_change, "keys": differing})
    return history


def run_facts(recipe: Recipe, tokenizer: Any, sources: Prepared) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed: base model, data, recipe."""
    dump = recipe.model_dump(mode="json")
    for key in (*RUNTIME_KEYS, "output"):
        dump.pop(key)
    return {
        "recipe_digest": hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest(),
        "base_digest": base_digest(recipe.model),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "fingerprints": {name: source.fingerprint for name, source in sources.items()},
    }


def load_trainee(recipe: Recipe, pad_id: int, kind: str) -> Trainee:
    """The model as its engine takes it: whole, or with weights still in their files."""
    if kind == "fsdp2" or (kind == "deepspeed" and zero_stage(recipe.engine.config) == 3):
        return build_unread(recipe, pad_id)
    return build_trainee(recipe, pad_id)


def build_engine(recipe: Recipe, trainee: Any, kind: str, world: World) -> Engine:
    """The engine that the recipe names, with the first stage's optimizer."""
    first = recipe.stages[0]
    lr = scaled_lr(first.optimizer, first.batch)
    if kind == "fsdp2":
        from trainer.engine.fsdp2 import FSDP2Engine  # 2 s of torch.distributed imports: only where it is used

        return FSDP2Engine(trainee, first.optimizer, lr, recipe.engine, DTYPES[recipe.model.dtype], world)
    if kind == "deepspeed":
        from trainer.engine.deepspeed import DeepSpeedEngine  # optional, 2 s to import: only where it is named

        return DeepSpeedEngine(trainee, first.optimizer, lr, recipe.engine, DTYPES[recipe.model.dtype], world)
    from trainer.engine.single import SingleEngine

    return SingleEngine(trainee, first.optimizer, lr, world, DTYPES[recipe.model.dtype])


def build_tracker(
    recipe: Recipe, sources: Prepared, *, console: bool, main: bool, guard: Callable[[], None]
) -> Tracker:
    """The record of a run; `guard` raises where the folder is another run's by now."""
    return Tracker(
        Path(recipe.output),
        sum(steps_of(recipe, sources)),
        wandb=recipe.tracking.wandb,
        project=recipe.tracking.project,
        config=recipe.model_dump(mode="json"),
        console=console,
        main=main,
        ledger=recipe.tracking.ledger,
        guard=guard,
    )


def steps_of(recipe: Recipe, sources: Prepared) -> list[int]:
    """Optimizer steps of each stage."""
    stages = enumerate(recipe.stages)
    return [Plan(stage, sources.stage(stage), recipe.seed, index).total_steps for index, stage in stages]
