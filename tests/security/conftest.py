"""One real run for several tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished import FinishedRun, tunesmith, write_recipe
from tiny import write_chats


@pytest.fixture(scope="session")
def finished_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Trained with evaluation by generation, a ledger and wandb offline; reported."""
    folder = tmp_path_factory.mktemp("finished")
    write_chats(folder / "train.jsonl", 24)
    write_chats(folder / "held.jsonl", 6, seed=1)
    recipe = write_recipe(folder / "recipe.yaml", tiny_folder, folder / "train.jsonl")
    run = FinishedRun(folder / "run", folder / "cache")
    assert tunesmith(run, "train", str(recipe)) == 0, run.said[-3000:]
    return run


@pytest.fixture(scope="session")
def exported_run(finished_run: FinishedRun) -> FinishedRun:
    """The same, exported as an adapter and merged; and a verb that fails, with its traceback."""
    for options in (["--adapter", "--out", str(finished_run.folder / "adapter")], []):
        assert tunesmith(finished_run, "export", str(finished_run.folder), *options) == 0, finished_run.said[-3000:]
    assert tunesmith(finished_run, "--debug", "report", str(finished_run.folder / "missing")) != 0
    return finished_run
