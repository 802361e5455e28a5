"""The demo from end to end: data, model, training, evaluation, report, export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainer.config.resources import find
from trainer.demo.data import write_demo_data
from trainer.demo.model import demo_model


def demo(folder: Path, overrides: list[str]) -> int:
    """Run the demo's recipe with data and run in `folder`; returns the exit code of the first verb that failed, or
    0."""
    data, run = folder / "data", folder / "run"
    write_demo_data(data)
    settings = [
        f"output={run}",
        f"model.path={demo_model()}",
        f"sources.tickets.path={data / 'train.jsonl'}",
        f"sources.held-out.path={data / 'test.jsonl'}",
        f"sources.validation.path={data / 'validation.jsonl'}",
    ]
    command = [sys.executable, "-m", "trainer"]
    verbs = [["train", str(find("recipes", "demo.yaml")), *settings, *overrides], ["export", str(run)]]
    for verb in verbs:
        code = subprocess.run([*command, *verb], check=False).returncode
        if code:
            return code
    return 0
