"""Saving inside a run: failures are told and counted, the best stays, a second run in the folder touches nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainer import fault
from trainer.checkpoint import image, newest, verify
from trainer.checkpoint.lease import LEASES
from trainer.config import RunError, UserError, build_recipe
from trainer.fault import FAIL_POINT
from trainer.session import open_session
from trainer.tracking import read_rows, read_run
from trainer.train import train


@pytest.fixture(autouse=True)
def no_passings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test may have passed the same points in this process."""
    monkeypatch.setattr(fault, "_passed", {})


def recipe_for(folder: Path, model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Eight steps with a checkpoint after every second."""
    return {
        "name": folder.name,
        "output": str(folder),
        "model": {"path": str(model), "dtype": "float32", "max_length": 96},
        "tuning": {"method": "lora", "rank": 4},
        "sources": {"chats": {"path": str(data), "format": "messages"}},
        "optimizer": {"lr": 0.003},
        "batch": {"examples": 4},
        "until": {"steps": 8, "epochs": None},
        "checkpoint": {"every": 2, "keep": 2},
    } | changes


def run_through(recipe: dict[str, Any]) -> None:
    with open_session(build_recipe(recipe), console=False) as run:
        run.status = train(run)


def told(folder: Path, name: str) -> list[tuple[int, Any]]:
    return [(row["step"], row["detail"]) for row in read_rows(folder) if row["kind"] == "event" and row["name"] == name]


def steps(folder: Path) -> list[int]:
    return [verify(path).step for path in newest(folder / "checkpoints")]


def test_checkpoints_in_the_background_are_all_there_and_told(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    folder = tmp_path / "run"
    run_through(recipe_for(folder, tiny_folder, chats))
    assert steps(folder) == [8, 6]
    assert [step for step, _ in told(folder, "checkpoint")] == [2, 4, 6, 8]
    assert verify(newest(folder / "checkpoints")[0]).generation == 1
    assert (folder / LEASES / "00000001").read_text().splitlines()[1].strip() == "released"
    run_through(recipe_for(folder, tiny_folder, chats, until={"steps": 10, "epochs": None}))
    assert steps(folder) == [10, 8]
    assert verify(newest(folder / "checkpoints")[0]).generation == 2


def test_a_slow_copy_is_of_one_state(tmp_path: Path, tiny_folder: Path, chats: Path, monkeypatch) -> None:
    """Forward and backward go on beside the copy; the update, the next stage and the average's evaluation wait."""
    copying, delays = image._copy, []

    def slow(*arguments: Any) -> None:
        delays.append(time.sleep(0.15))
        copying(*arguments)

    monkeypatch.setattr(image, "_copy", slow)
    stages = [{"name": name, "until": {"steps": 4, "epochs": None}} for name in ("one", "two")]
    changes = {
        "tuning": {"method": "full"},
        "stages": stages,
        "ema": {"decay": 0.9, "evaluate": True},
        "sources": {name: {"path": str(chats), "format": "messages"} for name in ("chats", "held")},
        "evaluation": {"every": 3, "suites": [{"name": "held", "source": "held"}], "baseline": "none"},
    }
    for name, asynchronous in (("later", True), ("now", False)):
        checkpoint = {"every": 1, "keep": 9, "asynchronous": asynchronous}
        run_through(recipe_for(tmp_path / name, tiny_folder, chats, checkpoint=checkpoint, **changes))
    assert len(delays) == 8
    for step in range(1, 9):
        paths = [tmp_path / name / "checkpoints" / f"step-{step:08d}" for name in ("later", "now")]
        files = [{file.name: file.read_bytes() for file in path.glob("*.safetensors")} for path in paths]
        assert files[0] == files[1] and files[0]
    losses = [[row["loss"] for row in read_rows(tmp_path / n) if row["kind"] == "step"] for n in ("later", "now")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_save_that_fails_is_told_and_the_run_goes_on(
    tmp_path: Path, tiny_folder: Path, chats: Path, monkeypatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv(FAIL_POINT, "shard:nth=2:full")
    run_through(recipe_for(folder, tiny_folder, chats))
    assert steps(folder) == [8, 6]
    [(step, detail)] = told(folder, "checkpoint_failed")
    assert step == 4 and detail["in_row"] == 1 and "No space left on device" in detail["error"]
    assert read_run(folder)["status"] == "complete"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_at_the_limit_of_failures_in_a_row_the_run_stops(
    tmp_path: Path, tiny_folder: Path, chats: Path, monkeypatch, asynchronous: bool
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv(FAIL_POINT, "staged:step=4:broken;staged:step=6:broken")
    settings = {"every": 2, "failure_limit": 2, "asynchronous": asynchronous}
    with pytest.raises(RunError, match=r"step 6: checkpoints fail, 2 in a row: .*Input/output error") as error:
        run_through(recipe_for(folder, tiny_folder, chats, checkpoint=settings))
    assert error.value.exit_code == 1
    assert steps(folder) == [2]
    assert [step for step, _ in told(folder, "checkpoint_failed")] == [4, 6]
    last = max(row["step"] for row in read_rows(folder) if row["kind"] == "step")
    assert last == 6 if not asynchronous else last in (6, 7, 8)
    assert read_run(folder)["status"] == "failed"
    monkeypatch.delenv(FAIL_POINT)
    run_through(recipe_for(folder, tiny_folder, chats))  # the cause is gone: the same command goes on
    assert steps(folder) == [8, 6]


def test_the_last_checkpoint_must_be_saved(tmp_path: Path, tiny_folder: Path, chats: Path, monkeypatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv(FAIL_POINT, "shard:full")  # the first passing only
    run_through(recipe_for(folder, tiny_folder, chats, checkpoint={}))
    assert steps(folder) == [8] and len(told(folder, "checkpoint_failed")) == 1
    monkeypatch.setenv(FAIL_POINT, "manifest:full;manifest:full")
    with pytest.raises(RunError, match=r"step 8: checkpoints fail, the last one"):
        run_through(recipe_for(tmp_path / "other", tiny_folder, chats, checkpoint={}))
    assert newest(tmp_path / "other" / "checkpoints") == []


def test_the_best_by_a_metric_stays(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    folder = tmp_path / "run"
    suites = [{"name": "held", "source": "held"}]
    paths = {"chats": chats, "held": tmp_path / "held.jsonl"}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "~~~~"}]  # what training unlearns
    paths["held"].write_text(json.dumps({"messages": turns}) + "\n")
    run_through(
        recipe_for(
            folder,
            tiny_folder,
            chats,
            sources={name: {"path": str(path), "format": "messages"} for name, path in paths.items()},
            evaluation={"every": 2, "suites": suites, "baseline": "none"},
            checkpoint={"every": 2, "keep": 1, "keep_best": 1, "metric": "held/loss"},
            optimizer={"lr": 0.03},
        )
    )
    losses = {row["step"]: row["metrics"]["loss"] for row in read_rows(folder) if row["kind"] == "eval"}
    best = min(losses, key=lambda step: (losses[step], step))
    assert sorted(losses) == [2, 4, 6, 8] and best != 8, losses
    assert steps(folder) == [8, best]


def test_a_second_run_in_the_folder_is_told_and_touches_nothing(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    folder = tmp_path / "run"
    recipe = recipe_for(folder, tiny_folder, chats)
    with open_session(build_recipe(recipe), console=False) as run:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and LEASES not in path.parts}
        for fresh in (False, True):
            with (
                pytest.raises(UserError, match=r"another run is working in it \(process \d+ on "),
                open_session(build_recipe(recipe), console=False, fresh=fresh),
            ):
                raise AssertionError("two runs in one folder")
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and LEASES not in path.parts}
        assert after == before and sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        run.status = train(run)
    assert read_run(folder)["status"] == "complete"


def test_a_run_whose_folder_was_taken_over_stops_and_leaves_the_record_alone(
    tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    folder = tmp_path / "run"
    with (
        pytest.raises(RunError, match="another run has taken the folder over"),
        open_session(build_recipe(recipe_for(folder, tiny_folder, chats)), console=False) as run,
    ):
        original = run.save_if_due

        def taken() -> None:
            original()
            if run.step == 3:
                run.saver.wait()
                (folder / LEASES / "00000001").unlink()
                (folder / LEASES / "00000002").write_text(json.dumps({"host": "elsewhere"}) + "\n")
                run.lease._beaten -= 60  # type: ignore[attr-defined]  # as if this process had been stopped meanwhile

        run.save_if_due = taken  # type: ignore[method-assign]
        run.status = train(run)
    assert max(row["step"] for row in read_rows(folder) if row["kind"] == "step") == 3
    assert steps(folder) == [2] and read_run(folder)["status"] == "running"
