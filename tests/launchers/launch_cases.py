"""Launches of light ranks (`light_rank.py`) under the real supervisor, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# The patience that users get is minutes; what is measured here is what happens then.
DRIVER = """
import sys
from pathlib import Path
from launchers import supervisor, terminal
from launchers.local import Launch
from trainer.config.errors import RunError, UserError

supervisor.STARTING_STOP = supervisor.AFTER_ERROR = terminal.PARTING = 1.5
folder, nproc, hang, restarts, standby, *arguments = sys.argv[1:]
launch = Launch(Path(folder), (folder, *arguments), int(nproc), int(restarts), float(hang),
                standby=standby == "True", program=(sys.executable, {rank!r}))
try:
    sys.exit(supervisor.supervise(launch))
except (UserError, RunError) as error:
    print(f"error: {{error}}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def command(
    folder: Path, *, nproc: int = 2, steps: int = 20, seconds: float = 0.02, hang: float = 60, restarts: int = 10,
    standby: bool = False,
) -> list[str]:  # fmt: skip
    """What starts a supervisor over light ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (nproc, hang, restarts, standby, steps, seconds)
    driver = DRIVER.format(rank=str(HERE / "light_rank.py"))
    return [sys.executable, "-c", driver, str(folder), *map(str, numbers)]


def start(folder: Path, *, fault: str = "", **settings: Any) -> subprocess.Popen[str]:
    """A supervisor at work; its output is in `FOLDER.out`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TUNESMITH_FAIL_POINT": fault}
    with output_path(folder).open("a") as output:
        return subprocess.Popen(
            command(folder, **settings), env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )


def run(folder: Path, **settings: Any) -> int:
    """The exit code of a whole launch."""
    return start(folder, **settings).wait(60)


def output_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.out")


def output(folder: Path) -> str:
    return output_path(folder).read_text()


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of the supervisor's own record."""
    path = folder / "logs" / "supervisor.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["event"] == name]


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The condition's value as soon as it is true; AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain")


def rank_pids(folder: Path, attempt: int = 1) -> list[int]:
    """The pids of an attempt's ranks, once all have begun."""
    logs = folder / "logs" / f"attempt-{attempt:02d}"

    def told() -> list[int]:
        row = next((row for row in events(folder, "attempt") if row["number"] == attempt), None)
        pids = row["pids"] if row else []
        begun = [path for path in logs.glob("rank-*.log") if "pid" in path.read_text()]
        return pids if pids and len(begun) == len(pids) else []

    return wait_for(told)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
