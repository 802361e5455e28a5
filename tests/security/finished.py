"""A real run with everything on, in processes of its own and with secrets in its environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

CANARIES = {
    "WANDB_API_KEY": "canary01" + "a1" * 16,  # 40 characters, as W&B wants them
    "HF_TOKEN": "hf_canary02qwertzuiopasdfghjk",
    "HUGGING_FACE_HUB_TOKEN": "canary03-hub/with+odd=characters",
    "AWS_SECRET_ACCESS_KEY": "canary04/Secret+Access=Key0123456789",
    "AWS_ACCESS_KEY_ID": "AKIACANARY05ABCDEFGH",
    "AWS_SESSION_TOKEN": "canary06-session-token-value",
    "OPENAI_API_KEY": "sk-canary07abcdefghijklmnop",
    "GITHUB_TOKEN": "ghp_canary08abcdefghijklmnopqrstuvwx",
    "PGPASSWORD": "canary09-password",
    "AZURE_CLIENT_SECRET": 'canary10"quoted\\secret',
    "MY_SERVICE_CREDENTIALS": "canary11-credentials-value",
    "HTTPS_PROXY": "http://somebody:canary12pw@127.0.0.1:9",
}
MARKS = [f"canary{number:02d}" for number in range(1, 13)]


@dataclass
class FinishedRun:
    """The folders that a run has written into, and all that its processes said or were called."""

    folder: Path
    cache: Path
    said: str = ""
    called: set[bytes] = field(default_factory=set)


def environment(cache: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    own = {"TUNESMITH_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return {**kept, **own, **CANARIES, "NO_PROXY": "*", "TUNESMITH_LOG": "DEBUG"}


def write_recipe(path: Path, model: Path, chats: Path, **more: Any) -> Path:
    recipe = {
        "name": "tiny",
        "output": str(path.parent / "run"),
        "model": {"path": str(model), "dtype": "float32", "max_length": 128},
        "sources": {
            "train": {"path": str(chats), "format": "messages"},
            "held": {"path": str(chats.with_name("held.jsonl")), "format": "messages"},
        },
        "until": {"steps": 4},
        "batch": {"examples": 4, "micro_tokens": 512},
        "evaluation": {"resamples": 100, "suites": [
            {"name": "loss", "source": "held", "limit": 4},
            {"name": "answers", "source": "held", "kind": "generate", "metrics": ["exact_match"], "limit": 2,
             "max_new_tokens": 4},
        ]},
        "checkpoint": {"every": 2},
        "tracking": {"wandb": "offline", "ledger": True},
        **more,
    }  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(recipe, file)
    return path


def tunesmith(run: FinishedRun, *arguments: str) -> int:
    """Run a verb under an open umask; note what it and its children are called, and what they say."""
    log = run.folder.parent / "output.txt"
    with log.open("ab") as output:
        command = [sys.executable, "-m", "trainer", *arguments]
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(run.cache), cwd=log.parent, umask=0
        )
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            run.called |= command_lines(process.pid)
            time.sleep(0.2)
        if process.poll() is None:
            process.kill()
    run.said = log.read_text(errors="replace")
    return process.wait()


def command_lines(pid: int) -> set[bytes]:
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if int(place.name) == pid or parent == pid:
                found.add((place / "cmdline").read_bytes())
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    return found
