"""From a recipe to a Run that is ready to step, and the closing of it whatever happens."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.check import check_metrics, check_paths
from trainer.config import Recipe, UserError, load_recipe
from trainer.data.plan import Plan
from trainer.data.prepare import Prepared, prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.engine import engine_kind
from trainer.engine.base import Engine
from trainer.evaluation.suites import Evaluator
from trainer.model.build import build_trainee, packs, parameter_counts
from trainer.model.load import DTYPES, base_digest
from trainer.optim import scaled_lr
from trainer.run import Run, check_output, write_recipe
from trainer.tracking import Tracker, open_run, read_run
from trainer.world import World, connected, environment_world

log = logging.getLogger(__name__)

WHOLE_STATE = {  # what cannot work on shards
    "muon": "orthogonalises whole matrices, fsdp2 shards them",
    "adamw8bit": "keeps blockwise state that a checkpoint cannot cut into ranges under fsdp2",
}
RUNTIME_KEYS = ("tracking", "checkpoint", "evaluation")  # what may change between a run and its resumption


def preflight(recipe: Recipe) -> None:
    """Everything that can be known to be wrong before data are read or a model is loaded. Raises UserError."""
    check_output(Path(recipe.output))
    check_paths(recipe)
    check_metrics(recipe)


def is_finished(recipe: Recipe, fresh: bool) -> bool:
    """Whether the run's folder holds this very run, complete; raises UserError where it holds another recipe's run."""
    folder = Path(recipe.output)
    if fresh or not (folder / "run.json").exists():
        return False
    if (folder / "recipe.yaml").exists():
        same_recipe(load_recipe(folder / "recipe.yaml"), recipe)
    return read_run(folder).get("status") == "complete"


def same_recipe(old: Recipe, new: Recipe) -> None:
    """Raise UserError naming the keys in which a run's recipe differs from the one given to resume it."""
    first, second = (flatten(r.model_dump(mode="json")) for r in (old, new))
    changed = sorted(
        key
        for key in first.keys() | second.keys()
        if first.get(key) != second.get(key) and key.split(".")[0] not in (*RUNTIME_KEYS, "output")
    )
    if changed:
        shown = "; ".join(f"{key}: {first.get(key)!r} -> {second.get(key)!r}" for key in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(
            f"output: {new.output}: holds a run of another recipe ({shown}{more}); choose another `output` or --fresh"
        )


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    if isinstance(data, dict):
        items: Any = data.items()
    elif isinstance(data, list):
        items = enumerate(data)
    else:
        return {prefix.removesuffix("."): data}
    return {key: value for name, item in items for key, value in flatten(item, f"{prefix}{name}.").items()}


@contextmanager
def open_session(recipe: Recipe, *, fresh: bool = False, console: bool = True) -> Iterator[Run]:
    """Prepare data, join the other ranks, build, resume; on the way out record how it ended.

    Data are prepared before the process group exists, so that no rank waits inside a collective for a long
    tokenisation.
    """
    preflight(recipe)
    folder, world = Path(recipe.output), environment_world()
    tokenizer = load_tokenizer(recipe.model)
    sources = prepare(recipe, tokenizer=tokenizer)
    evaluator = Evaluator(recipe, sources, tokenizer, world, folder)
    evaluator.check()
    with connected(world):
        if fresh and world.is_main and folder.exists():
            shutil.move(folder, folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))
        world.barrier()
        kind = engine_kind(recipe.engine, world.size)
        trainee = build_trainee(recipe, tokenizer.pad_token_id)
        facts = run_facts(recipe, trainee, sources)
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
                attention=trainee.config._attn_implementation,
                **facts,
            )
        world.barrier()
        engine = build_engine(recipe, trainee, kind, world)
        tracker = Tracker(
            folder,
            sum(steps_of(recipe, sources)),
            wandb=recipe.tracking.wandb,
            project=recipe.tracking.project,
            config=recipe.model_dump(mode="json"),
            console=console,
            main=world.is_main,
        )
        status = "failed"
        run = Run(recipe, world, folder, engine, sources, evaluator, tracker, packed, tokenizer.pad_token_id, facts)
        try:
            run.stop.install()
            run.resume()
            yield run
            status = run.status
        except BaseException as error:
            tracker.event(run.step, "failed", str(error) or type(error).__name__)
            raise
        finally:
            tracker.close(status)


def run_facts(recipe: Recipe, trainee: Any, sources: Prepared) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed: base model, data, recipe."""
    dump = recipe.model_dump(mode="json")
    for key in (*RUNTIME_KEYS, "output"):
        dump.pop(key)
    return {
        "recipe_digest": hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest(),
        "base_digest": base_digest(trainee),
        "fingerprints": {name: source.fingerprint for name, source in sources.items()},
    }


def build_engine(recipe: Recipe, trainee: Any, kind: str, world: World) -> Engine:
    """The engine that the recipe names, with the first stage's optimizer."""
    first = recipe.stages[0]
    lr = scaled_lr(first.optimizer, first.batch)
    if kind == "fsdp2":
        from trainer.engine.fsdp2 import FSDP2Engine  # 2 s of torch.distributed imports: only where it is used

        if world.size == 1:
            raise UserError("engine.kind: fsdp2: needs several processes; start with torchrun, or use `auto`")
        for stage in recipe.stages:
            if stage.optimizer.name in WHOLE_STATE:
                raise UserError(
                    f"optimizer.name: {stage.optimizer.name}: {WHOLE_STATE[stage.optimizer.name]}; use adamw or lion"
                )
        return FSDP2Engine(trainee, first.optimizer, lr, recipe.engine, DTYPES[recipe.model.dtype], world)
    if recipe.engine.cpu_offload or not recipe.engine.reshard_after_forward:
        raise UserError("engine: cpu_offload and reshard_after_forward: only read by fsdp2; start several processes")
    if world.size > 1:
        raise UserError(f"engine.kind: single: started on {world.size} processes; use `auto` or `fsdp2`")
    from trainer.engine.single import SingleEngine

    return SingleEngine(trainee, first.optimizer, lr, world, DTYPES[recipe.model.dtype])


def steps_of(recipe: Recipe, sources: Prepared) -> list[int]:
    """Optimizer steps of each stage."""
    stages = enumerate(recipe.stages)
    return [Plan(stage, sources.stage(stage), recipe.seed, index).total_steps for index, stage in stages]
