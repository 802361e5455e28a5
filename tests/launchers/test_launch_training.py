"""`tunesmith launch` with real training: what dies, hangs or is stopped goes on bit for bit."""

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
from launch_cases import ROOT, events, is_alive, wait_for
from ruamel.yaml import YAML
from test_same_numbers import CUTS, outcome, recipe_for

from trainer.fault import FAIL_POINT
from trainer.tracking import read_rows, read_run

STEPS = 20
PATIENT = 110.0  # seconds; a start takes ten on a busy machine


def write_recipe(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    recipe = recipe_for(folder, model, data, "full", CUTS["packed-micro"], **changes)
    recipe["model"] |= {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    recipe["checkpoint"] = {"every": 3}
    path = folder.with_suffix(".yaml")
    with path.open("w") as file:
        YAML(typ="safe").dump(recipe, file)
    return path


def launch(
    recipe: Path, *options: str, fault: str = "", nproc: int = 2, runner: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """A launch at work; what it says is in `RECIPE.out`. With `runner` plain training under that command."""
    verb = ["train"] if runner else ["launch", f"--nproc={nproc}"]
    command = [*(runner or (sys.executable,)), "-m", "trainer", *verb, str(recipe), "--quiet", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", FAIL_POINT: fault, "PYTHONPATH": str(ROOT)}
    with recipe.with_suffix(".out").open("a") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def pids(folder: Path, attempt: int) -> list[int]:
    return wait_for(
        lambda: next((row["pids"] for row in events(folder, "attempt") if row["number"] == attempt), None), PATIENT
    )


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def reached(folder: Path, step: int) -> bool:
    journal = folder / "metrics.jsonl"
    return journal.exists() and f'"step": {step},' in journal.read_text()


def identical(folder: Path, calm: Path) -> None:
    found, expected = outcome(folder), outcome(calm)
    assert len(expected.losses) == STEPS
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    for name, value in expected.parameters.items():
        assert torch.equal(found.parameters[name], value), name
    assert ledger(folder) == ledger(calm)


def ledger(folder: Path) -> dict[int, list[str]]:
    """Examples by step; of a step that was made twice the last counts."""
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return {row["step"]: row["ids"] for row in rows}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chats: Path) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    process = launch(write_recipe(folder, tiny_folder, chats))
    assert process.wait(PATIENT) == 0
    assert read_run(folder)["status"] == "complete"
    assert len(events(folder, "attempt")) == 1
    return folder


@pytest.mark.timeout(400)
def test_killed_then_stopped_then_completed_bit_for_bit(
    calm: Path, tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    folder = tmp_path / "run"
    recipe = write_recipe(folder, tiny_folder, chats)
    process = launch(recipe, fault="step:step=7:rank=1:attempt=1:kill;step:step=12:rank=0:attempt=2:stop")
    ranks = pids(folder, 2)
    wait_for(lambda: state(ranks[0]) == "T", PATIENT)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    os.kill(ranks[0], signal.SIGCONT)
    assert process.wait(PATIENT) == 75
    assert read_run(folder)["status"] == "preempted"
    assert (folder / "checkpoints" / "step-00000012").exists()  # no step is lost
    assert not any(is_alive(pid) for pid in (*ranks, *pids(folder, 1)))
    assert launch(recipe).wait(PATIENT) == 0
    identical(folder, calm)
    happened = [row["name"] for row in read_rows(folder) if row["kind"] == "event"]
    assert happened.count("restart") == 1
    assert happened.count("resume") == 2
    assert happened.count("preempted") == 1
    assert launch(recipe, nproc=1).wait(PATIENT) == 0  # complete already
    assert "nothing to do" in (folder / "logs" / "attempt-04" / "rank-00000.log").read_text()


def test_a_bad_recipe_and_bad_data_are_refused_once(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    recipe = write_recipe(tmp_path / "run", tiny_folder, chats)
    process = launch(recipe, "optimizer.lr=much")
    assert process.wait(PATIENT) == 2
    assert not (tmp_path / "run").exists()  # told before anything was started
    assert "optimizer.lr" in recipe.with_suffix(".out").read_text()
    chats_here = tmp_path / "chats.jsonl"
    chats_here.write_text(chats.read_text() + '{"messages": 7}\n')
    process = launch(recipe, f"sources.chats.path={chats_here}", nproc=1)
    assert process.wait(PATIENT) == 2
    assert len(events(tmp_path / "run", "attempt")) == 1
    last = recipe.with_suffix(".out").read_text().splitlines()[-1]
    assert last.startswith("tunesmith: error: ")
    assert "chats.jsonl:61" in last


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("action", ["hang", "hold", "stop"])
def test_a_hung_rank_is_found_and_the_run_is_the_same(
    action: str, calm: Path, tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    folder = tmp_path / "run"
    recipe = write_recipe(folder, tiny_folder, chats)
    process = launch(recipe, "--hang-seconds=6", fault=f"step:step=7:rank=1:attempt=1:{action}")
    assert process.wait(PATIENT) == 0
    ended = events(folder, "ended")[0]
    assert ended["outcome"]["rank"] == 1
    assert ended["outcome"]["reason"].startswith("rank 1 hung: silent for ")
    assert "in step 7" in ended["outcome"]["reason"]
    logs = folder / "logs" / "attempt-01"
    assert f"in _{action}" in (logs / "stacks-rank-00001.txt").read_text()
    assert "in _reduce" in (logs / "stacks-rank-00000.txt").read_text()
    identical(folder, calm)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_poison_step_ends_the_run_and_can_be_passed_over(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    folder = tmp_path / "run"
    recipe = write_recipe(folder, tiny_folder, chats)
    fault = "step:step=7:rank=1:raise"
    process = launch(recipe, fault=fault)
    assert process.wait(PATIENT) == 1
    assert len(events(folder, "attempt")) == 2
    last = recipe.with_suffix(".out").read_text().splitlines()[-1]
    (ids,) = (rank["place"]["ids"] for rank in events(folder, "ended")[0]["ranks"] if rank["rank"] == 1)
    assert len(ids) == 6
    assert f"failed 2 times at step 7 without getting beyond it; its examples: {', '.join(ids)}" in last
    assert "guard.skip_steps=[7]" in last
    assert launch(recipe, "guard.skip_steps=[7]", fault=fault).wait(PATIENT) == 0
    assert read_run(folder)["status"] == "complete"
    assert ledger(folder)[7] == []


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5, 4.0, 6.0])
def test_a_signal_while_real_ranks_start(seconds: float, tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    folder = tmp_path / "run"
    process = launch(write_recipe(folder, tiny_folder, chats))
    ranks = pids(folder, 1)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 75
    assert not any(is_alive(pid) for pid in ranks)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_process_is_supervised_as_well(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    folder = tmp_path / "run"
    process = launch(write_recipe(folder, tiny_folder, chats), nproc=1, fault="step:step=7:attempt=1:kill")
    assert process.wait(PATIENT) == 0
    assert [row["step"] for row in read_rows(folder) if row["kind"] == "step"] == list(range(1, STEPS + 1))
    assert "rank 0 was ended by SIGKILL at step 7" in events(folder, "attempt")[1]["reason"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_fresh_moves_the_old_run_once_and_keeps_the_logs(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    folder = tmp_path / "run"
    recipe = write_recipe(folder, tiny_folder, chats)
    assert launch(recipe).wait(PATIENT) == 0
    first = read_run(folder)["id"]
    assert launch(recipe, "--fresh", fault="step:step=7:rank=1:attempt=2:kill").wait(PATIENT) == 0
    (aside,) = tmp_path.glob("run.before-*")
    assert read_run(aside)["id"] == first
    assert read_run(folder)["id"] != first
    assert sorted(path.name for path in (folder / "logs").glob("attempt-*")) == ["attempt-02", "attempt-03"]
    assert (aside / "logs" / "attempt-01").exists()
    assert "rank-00000.log" in {path.name for path in (folder / "logs" / "attempt-02").iterdir()}


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_under_plain_torchrun_signals_save_and_its_death_leaves_no_orphan(
    calm: Path, tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    folder = tmp_path / "run"
    recipe = write_recipe(folder, tiny_folder, chats)
    process = launch(recipe, runner=TORCHRUN, fault="step:step=7:rank=0:stop")
    wait_for(lambda: reached(folder, 6), PATIENT)
    ranks = children(process.pid)
    process.send_signal(signal.SIGUSR1)  # torchrun dies of it
    assert process.wait(30) == -signal.SIGUSR1
    os.kill(next(pid for pid in ranks if state(pid) == "T"), signal.SIGCONT)
    wait_for(lambda: not any(is_alive(pid) for pid in ranks), 30)
    assert read_run(folder)["status"] == "preempted"  # its ranks took its death for a SIGTERM
    assert (folder / "checkpoints" / "step-00000007").exists()
    process = launch(recipe, runner=TORCHRUN, fault="step:step=12:rank=0:stop")
    wait_for(lambda: reached(folder, 11), PATIENT)
    ranks = children(process.pid)
    process.kill()
    process.wait(30)
    os.kill(next(pid for pid in ranks if state(pid) == "T"), signal.SIGCONT)
    wait_for(lambda: not any(is_alive(pid) for pid in ranks), 30)
    assert launch(recipe).wait(PATIENT) == 0
    identical(folder, calm)
