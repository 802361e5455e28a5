"""Every engine, full and LoRA, dropout on: stopped in mid-epoch, killed inside an accumulation, stopped at the end of
an epoch, and yet bit for bit the run that was never stopped: losses, ledger, parameters, moments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fault_cases import digests
from test_same_numbers import METHODS, run_here
from tiny import next_port, run_ranks

from trainer.checkpoint.manifest import newest
from trainer.config import build_recipe
from trainer.session import open_session
from trainer.tracking import read_rows
from trainer.train import train

ENGINES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "fsdp2": {"kind": "fsdp2"},
    "zero1": {"kind": "deepspeed", "config": "zero1"},
    "zero2": {"kind": "deepspeed", "config": "zero2"},
    "zero3": {"kind": "deepspeed", "config": "zero3"},
}
MID_EPOCH, INSIDE, EPOCH_END = 4, 8, 10  # of 10 steps an epoch; a checkpoint each 3 steps
STEPS = 14


class Gone(Exception):
    """What stands for a process that ends in the middle of a step."""


def recipe_for(folder: Path, model: Path, data: Path, engine: str, method: str) -> dict[str, Any]:
    extra = METHODS[method]
    return {
        "name": folder.name,
        "output": str(folder),
        "model": {"path": str(model), "dtype": "float32", "max_length": 96, "attention_dropout": 0.1},
        "tuning": extra["tuning"] | ({"dropout": 0.1} if method == "lora" else {}),
        "engine": ENGINES[engine],
        "sources": {"chats": {"path": str(data), "format": "messages"}},
        "optimizer": {"lr": 0.003, "weight_decay": 0.01},
        "batch": {"examples": 6, "micro_tokens": 96},  # packed: two or three micro-batches a rank
        "until": {"steps": STEPS, "epochs": None},
        "tracking": {"ledger": True},
        "checkpoint": {"every": 3},
        "ema": {"decay": 0.9},
    }


def until(recipe: dict[str, Any], step: int, inside: bool = False) -> None:
    """Go on to a step and be told to stop; with `inside` end before that step's last micro-batch."""
    try:
        with open_session(build_recipe(recipe), console=False) as run:
            due, backward = run.save_if_due, run.engine.backward

            def stop_there() -> None:
                due()
                if run.step == step:
                    run.stop.event.set()

            def break_off(loss: Any, *, last: bool) -> None:
                if run.step + 1 == step and last:
                    raise Gone
                backward(loss, last=last)

            if inside:
                run.engine.backward = break_off  # type: ignore[method-assign]
            else:
                run.save_if_due = stop_there  # type: ignore[method-assign]
            run.status = train(run)
    except Gone:
        return
    assert run.status == "preempted"


def stop_and_go(rank: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    os.environ.setdefault("TEST_PORTS", "")
    for stopped, whole in pairs:
        for step, inside in ((MID_EPOCH, False), (INSIDE, True), (EPOCH_END, False)):
            until(stopped, step, inside)
            next_port()
        assert run_here(stopped) == "complete"
        next_port()
        assert run_here(whole) == "complete"
        next_port()


def check(folder: Path) -> None:
    found, expected = (read_rows(folder / name) for name in ("stopped", "whole"))
    for key in ("loss", "grad_norm", "nll"):
        values = [[row[key] for row in rows if row["kind"] == "step"] for rows in (found, expected)]
        assert len(values[1]) == STEPS
        assert values[0] == values[1], key
    ledgers = []
    for name in ("stopped", "whole"):
        rows = [json.loads(line) for line in (folder / name / "ledger.jsonl").read_text().splitlines()]
        ledgers.append({row["step"]: row["ids"] for row in rows})
    assert ledgers[0] == ledgers[1]
    ends = [digests(newest(folder / name / "checkpoints")[0]) for name in ("stopped", "whole")]
    assert ends[0] == ends[1]
    assert {key.split("/")[0] for key in ends[0]} == {"counters", "param", "exp_avg", "exp_avg_sq", "ema"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_stopped_run_is_the_run(engine: str, tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    pairs = [
        tuple(recipe_for(tmp_path / method / name, tiny_folder, chats, engine, method) for name in ("stopped", "whole"))
        for method in ("full", "lora")
    ]
    if engine == "single":
        stop_and_go(0, pairs)  # type: ignore[arg-type]
    else:
        run_ranks(2, stop_and_go, pairs)
    for method in ("full", "lora"):
        check(tmp_path / method)
