"""The training side of the W&B feed: starts the process that forwards ``metrics.jsonl``, and never waits for it.

Nothing of wandb is imported here. The process (``wandb_process``) reads the journal as any reader does, so a slow
network, a failing login or a crash of wandb cannot reach the training loop.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trainer
from trainer.tracking.redact import is_secret_key, known_secrets, redact
from trainer.tracking.run_record import replace_file

MODES = ("off", "offline", "online")
LOG_NAME = "wandb.log"
STATE_NAME = "wandb/feed.json"  # written by the process: mode, reason, sync command, bytes of the journal consumed
CONFIG_NAME = "wandb/config.json"
_LOOK_EVERY = 0.5  # seconds between two looks at the state file
# wandb posts its own error telemetry to the server, offline too, and waits up to 10 s for a dead one at its end.
_CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false"}


def start(
    folder: Path,
    mode: str,
    project: str,
    run_name: str,
    run_id: str,
    config: Mapping[str, Any] | None = None,
) -> Feed | None:
    """Start forwarding the run in ``folder`` to W&B; None where ``mode`` is "off".

    ``config`` (the resolved recipe) is handed over with its secrets redacted. Returns at once (measured: some
    milliseconds); what became of the connection is told later by ``Feed.news``.
    Raises ValueError on an unknown mode and OSError where the folder cannot be written.
    """
    if mode not in MODES:
        raise ValueError(f"wandb mode {mode!r}: one of {', '.join(MODES)}")
    if mode == "off":
        return None
    folder = folder.resolve()
    (folder / STATE_NAME).parent.mkdir(parents=True, exist_ok=True)
    replace_file(folder / CONFIG_NAME, json.dumps(redact(dict(config or {}), known_secrets(os.environ)), default=str))
    # -P: nothing is imported from the folder that the run happens to be started in
    command = [sys.executable, "-P", "-m", "trainer.tracking.wandb_process", str(folder)]
    command += ["--mode", mode, "--project", project, "--name", run_name, "--id", run_id]
    package_parent = str(Path(trainer.__file__).resolve().parents[1])
    python_path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    private = os.open(folder / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(private, "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**_own_environment(), **_CHILD_ENVIRONMENT, "PYTHONPATH": python_path},
            start_new_session=True,  # Ctrl-C and launchers' signals are for the run; the feed ends when the run does
        )
    return Feed(folder, process)


def _own_environment() -> dict[str, str]:
    """The environment without the secrets of others: wandb needs its own alone."""
    return {name: value for name, value in os.environ.items() if name.startswith("WANDB_") or not is_secret_key(name)}


class Feed:
    """A running forwarder. Every method but ``finish`` returns at once."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.process = process
        self._told: tuple[Any, ...] = ()
        self._gone = False
        self._looked_at = float("-inf")

    def state(self) -> dict[str, Any]:
        """What the process last said of itself (mode, reason, sync, consumed); empty before it speaks."""
        try:
            state = json.loads((self.folder / STATE_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return state if state.get("process") == self.process.pid else {}

    def news(self, at_once: bool = False) -> list[str]:
        """What happened since the last call, a sentence each: the mode settled on, why, and how to sync later.

        Looks at most twice a second unless ``at_once``.
        """
        if not at_once and time.monotonic() - self._looked_at < _LOOK_EVERY:
            return []
        self._looked_at = time.monotonic()
        told = []
        state = self.state()
        now = (state.get("mode"), state.get("reason"))
        if state and now != self._told:
            self._told = now
            told.append(_sentence(state))
        if self.process.poll() not in (None, 0) and not self._gone:
            self._gone = True
            told.append(f"stopped (exit {self.process.returncode}): see {LOG_NAME}; the run goes on")
        return told

    def finish(self, timeout: float = 30.0) -> list[str]:
        """Let the process forward the rest and end; stop it after ``timeout`` seconds. Returns the last news.

        An upload cut short loses nothing: the data lie in the run's wandb folder and the sync command is told.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"finish\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before; news() tells how
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the process and wandb's service
            self.process.wait()
            self._gone = True
            command = self.state().get("sync") or f"wandb sync {self.folder / 'wandb'}"
            return [*self.news(at_once=True), f"upload not finished after {timeout:g} s: later run: {command}"]
        return self.news(at_once=True)


def _sentence(state: Mapping[str, Any]) -> str:
    if state.get("reason"):
        later = f"; later run: {state['sync']}" if state.get("sync") else ""
        return f"{state['mode']}: {state['reason']}{later}"
    return f"{state['mode']}: {state.get('url') or state.get('sync') or ''}".rstrip(": ")
