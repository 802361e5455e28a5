"""Whole runs in real processes, and the oracle: whatever happened to a run, it ends as the calm one did."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from trainer.checkpoint.manifest import newest, verify
from trainer.checkpoint.reader import Reader
from trainer.launched import LOGS
from trainer.tracking import read_rows, read_run
from trainer.tracking.ledger import read_ledger

STEPS = 24
EVERY = 3  # steps between checkpoints
STRAY = re.compile(r"\.(staging|removing|replaced)-|\.tmp$")


def recipe_for(folder: Path, model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run with dropout, accumulation, packing and the ledger on: everything that an oracle can tell apart."""
    return {
        "name": folder.name,
        "output": str(folder),
        "model": {"path": str(model), "dtype": "float32", "max_length": 96, "attention_dropout": 0.1},
        "tuning": {"method": "full"},
        "sources": {"chats": {"path": str(data), "format": "messages"}},
        "optimizer": {"lr": 0.003, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup": 2},
        "batch": {"examples": 6, "micro_tokens": 96},
        "until": {"steps": STEPS, "epochs": None},
        "tracking": {"ledger": True},
        "checkpoint": {"every": EVERY},
    } | changes


def write_recipe(recipe: Mapping[str, Any], path: Path) -> Path:
    """The recipe as a file that the command line reads."""
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(dict(recipe), file)
    return path


@dataclass
class Ended:
    """How a command ended."""

    code: int
    output: str
    seconds: float


@dataclass
class Command:
    """`tunesmith ...` in a process group of its own, its output in a file."""

    words: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def start(self) -> Command:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | self.environment
        self.started = time.monotonic()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer", *self.words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return self

    def end(self, seconds: float = 110) -> Ended:
        assert self.process is not None
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()[-4000:]}") from None
        return Ended(code, self.text(), time.monotonic() - self.started)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill_all(self) -> None:
        """For a test that failed: nothing is left running."""
        for pid in descendants(self.process.pid if self.process else 0):
            _kill(pid)
        if self.process is not None:
            _kill(self.process.pid)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def launch(recipe: Path, *words: str, ranks: int = 2, log: Path, **environment: str) -> Command:
    """`tunesmith launch RECIPE --nproc N`, started."""
    return Command(["launch", str(recipe), "--nproc", str(ranks), *words], log, environment).start()


def train_alone(recipe: Path, *words: str, log: Path, **environment: str) -> Command:
    """`tunesmith train RECIPE` in one process, started."""
    return Command(["train", str(recipe), "--quiet", *words], log, environment).start()


def descendants(pid: int) -> list[int]:
    """The processes below one, as /proc tells, youngest last."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def ranks_of(folder: Path) -> dict[int, int]:
    """{rank: process} of the live ranks that `tunesmith launch` started for a run's folder, by their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            items = (entry / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        variables = dict(item.split(b"=", 1) for item in items if b"=" in item)
        if variables.get(LOGS.encode(), b"").startswith(f"{folder}/".encode()):
            found[int(variables[b"RANK"])] = int(entry.name)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "condition") -> Any:
    """Poll until true; the value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {seconds} s")


def last_step(folder: Path) -> int:
    """The newest step in the journal, 0 where there is none."""
    if not (folder / "metrics.jsonl").exists():
        return 0
    found = re.findall(r'"kind": "step".*?"step": (\d+)', (folder / "metrics.jsonl").read_text(errors="replace"))
    return int(found[-1]) if found else 0


@dataclass(frozen=True)
class Outcome:
    """What two runs of the same recipe must agree in, bit for bit."""

    losses: tuple[float, ...]
    ledger: tuple[tuple[int, tuple[str, ...]], ...]
    tensors: dict[str, str]  # SHA-256 of each logical tensor of the last checkpoint


def outcome(folder: Path) -> Outcome:
    """Losses by step, the ledger's last row of each step, digests of parameters and moments at the end."""
    rows = [row for row in read_rows(folder) if row["kind"] == "step"]
    ledger = {step: tuple(row["ids"]) for step, row in read_ledger(folder).items()}
    return Outcome(
        tuple(row["loss"] for row in rows), tuple(sorted(ledger.items())), digests(newest(folder / "checkpoints")[0])
    )


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of every logical tensor of a verified checkpoint, and of its counters."""
    manifest = verify(path)
    found = {"counters": hashlib.sha256(json.dumps(manifest.counters, sort_keys=True).encode()).hexdigest()}
    with Reader(path, manifest) as reader:
        for tensor in manifest.tensors:
            out = torch.full((math.prod(tensor.shape),), math.nan)
            reader.read(tensor.kind, tensor.name, 0, out)
            assert torch.isfinite(out).all()
            found[f"{tensor.kind}/{tensor.name}"] = hashlib.sha256(out.numpy().tobytes()).hexdigest()
    return found


def same_end(folder: Path, reference: Outcome) -> None:
    """The standing oracle: complete, the calm run's numbers, nothing left outside the layout."""
    assert read_run(folder)["status"] == "complete"
    found = outcome(folder)
    assert len(found.losses) == STEPS
    assert found.losses == reference.losses
    assert found.ledger == reference.ledger
    assert found.tensors == reference.tensors
    left = [str(path) for path in (folder / "checkpoints").rglob("*") if STRAY.search(path.name)]
    assert left == []
