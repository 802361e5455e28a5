"""A run that was stopped goes on bit for bit, in one process and under FSDP2 with the same number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from test_same_numbers import CUTS, Outcome, outcome, recipe_for, run_here
from tiny import next_port, run_ranks

from trainer.config import RunError, UserError, build_recipe
from trainer.session import Standing, open_session, standing
from trainer.tracking import read_rows, read_run
from trainer.train import train, train_step

STOP_AT = 7


def dropping(folder: Path, model: Path, data: Path, method: str) -> dict[str, Any]:
    """A recipe with dropout and two stages; step 7 lies inside the first, 13 inside the second."""
    recipe = recipe_for(folder, model, data, method, CUTS["packed-micro"])
    recipe["model"] |= {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    recipe["stages"] = [
        {"name": "one", "until": {"steps": 11, "epochs": None}},
        {"name": "two", "until": {"steps": 9, "epochs": None}, "optimizer": {"lr": 0.001}},
    ]
    return recipe


def run_until(recipe: dict[str, Any], step: int) -> str:
    """Walk to a step, then be told to stop, as by a signal."""
    with open_session(build_recipe(recipe), console=False) as run:
        original = run.save_if_due

        def stop_there() -> None:
            original()
            if run.step == step:
                run.stop.event.set()

        run.save_if_due = stop_there  # type: ignore[method-assign]
        run.status = train(run)
    return run.status


def interrupted(rank: int, recipe: dict[str, Any]) -> None:
    os.environ.setdefault("TEST_PORTS", "")  # in one process nobody meets
    assert run_until(recipe, STOP_AT) == "preempted"
    next_port()
    assert run_until(recipe, 13) == "preempted"
    next_port()
    assert run_here(recipe) == "complete"


def whole(rank: int, recipe: dict[str, Any]) -> None:
    assert run_here(recipe) == "complete"


def identical(found: Outcome, expected: Outcome) -> None:
    assert len(expected.losses) == 20
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    for name, value in expected.parameters.items():
        assert torch.equal(found.parameters[name], value), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_process_goes_on_bit_for_bit(method: str, tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    interrupted(0, dropping(tmp_path / "stopped", tiny_folder, chats, method))
    whole(0, dropping(tmp_path / "whole", tiny_folder, chats, method))
    identical(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))
    assert read_run(tmp_path / "stopped")["restarts"] == 2
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("stopped", "whole")]
    assert ledgers[0] == ledgers[1]


def both(rank: int, stopped: dict[str, Any], straight: dict[str, Any]) -> None:
    interrupted(rank, stopped)
    next_port()
    whole(rank, straight)


def test_two_ranks_go_on_bit_for_bit(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    names = ("stopped", "whole")
    run_ranks(2, both, *(dropping(tmp_path / name, tiny_folder, chats, "full") for name in names))
    identical(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))


def test_another_recipe_or_other_data_is_refused(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    recipe = recipe_for(
        tmp_path / "run", tiny_folder, chats, "lora", CUTS["packed"], until={"steps": 3, "epochs": None}
    )
    run_until(recipe, 2)
    other = build_recipe(recipe | {"optimizer": recipe["optimizer"] | {"lr": 0.5}})
    assert [str(change) for change in standing(other).changes] == ["stages.0.optimizer.lr: 0.003 -> 0.5"]
    other = build_recipe(recipe | {"tuning": {"method": "lora", "rank": 8}})
    with pytest.raises(UserError, match=r"tuning.rank: 4 -> 8.*tensors would not fit"):
        standing(other, allow_data_change=True)
    assert standing(other, fresh=True) == Standing()
    with pytest.raises(UserError, match=r"seed: 17 -> 18.*--allow-data-change"):
        standing(build_recipe(recipe | {"seed": 18}))
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(reversed(chats.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match=r"sources: the data of chats changed.*--allow-data-change"):
        run_here(recipe | {"sources": {"chats": {"path": str(changed), "format": "messages"}}})


def test_a_finished_run_given_more_steps_goes_on_as_if_it_had_always_had_them(
    tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    constant = {"schedule": {"name": "constant"}, "tuning": {"method": "lora", "rank": 4, "dropout": 0.1}}

    def recipe(folder: str, steps: int) -> dict[str, Any]:
        until = {"steps": steps, "epochs": None}
        return recipe_for(tmp_path / folder, tiny_folder, chats, "lora", CUTS["packed"], until=until, **constant)

    run_here(recipe("stopped", 7))
    assert standing(build_recipe(recipe("stopped", 7))).nothing_to_do
    assert not standing(build_recipe(recipe("stopped", 20))).nothing_to_do
    run_here(recipe("stopped", 20))
    run_here(recipe("whole", 20))
    identical(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))
    record = read_run(tmp_path / "stopped")
    assert record["changes"][0]["keys"] == {"stages.0.until.steps": [7, 20]}
    events = [row for row in read_rows(tmp_path / "stopped") if row["kind"] == "event"]
    assert any(row["name"] == "recipe_changed" and "until.steps: 7 -> 20" in row["detail"] for row in events)


def test_other_data_by_the_flag_and_recorded(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    recipe = recipe_for(tmp_path / "run", tiny_folder, chats, "lora", CUTS["packed"])
    run_until(recipe, 4)
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(reversed(chats.read_text().splitlines())) + "\n")
    recipe |= {"sources": {"chats": {"path": str(changed), "format": "messages"}}, "seed": 18}
    with pytest.raises(UserError, match=r"--allow-data-change"):
        run_here(recipe)
    with open_session(build_recipe(recipe), console=False, allow_data_change=True) as run:
        assert run.step == 4
        run.status = train(run)
    record = read_run(tmp_path / "run")
    assert record["changes"][-1]["allow_data_change"] and record["changes"][-1]["keys"]["seed"] == [17, 18]
    assert record["status"] == "complete"


def test_nonfinite_steps_are_skipped_counted_and_then_fatal(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    recipe = recipe_for(tmp_path / "run", tiny_folder, chats, "full", CUTS["packed"])
    with open_session(build_recipe(recipe), console=False) as run:
        embedding = run.engine.model.embeddings
        good = embedding.weight.detach().clone()
        train_step(run)
        embedding.weight.data.fill_(float("nan"))
        with pytest.raises(RunError, match=r"3 steps in a row without a finite gradient; last examples: chats:"):
            train(run)
        assert run.skipped_in_row == 3
        assert run.step == 4
        assert good.isfinite().all()
    rows = read_rows(tmp_path / "run")
    assert [row["skipped"] for row in rows if row["kind"] == "step"] == [True] * 3
    assert sum(row["kind"] == "event" and row["name"] == "skip" for row in rows) == 3
    assert read_run(tmp_path / "run")["status"] == "failed"


def test_a_signal_saves_and_exits_75_and_the_same_command_completes(
    tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    recipe = recipe_for(
        tmp_path / "run", tiny_folder, chats, "lora", CUTS["packed"], until={"steps": 400, "epochs": None}
    )
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML(typ="safe").dump(recipe, file)
    command = [sys.executable, "-m", "trainer", "train", str(tmp_path / "recipe.yaml"), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 90
    metrics = tmp_path / "run" / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(60) == 75
    assert read_run(tmp_path / "run")["status"] == "preempted"
    second = subprocess.run(command, env=environment, timeout=110, check=False)
    assert second.returncode == 0
    steps = [row["step"] for row in read_rows(tmp_path / "run") if row["kind"] == "step"]
    assert steps == list(range(1, 401))
    third = subprocess.run(command, env=environment, timeout=60, check=False, capture_output=True, text=True)
    assert third.returncode == 0
    assert "complete already" in third.stdout
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    ledger = [json.loads(line)["step"] for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert ledger == steps
