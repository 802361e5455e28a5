"""Ranks in reserve: started while the run goes well, called in when an attempt has failed."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from launchers.local import Launch, Ranks, log_path, rank_environment, start_ranks
from trainer.launched import ATTEMPT, HEARTBEAT, LOGS, LOGS_FOLDER, RESTART


class Reserve:
    """The next attempt's processes, waiting with everything imported."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        nowhere = Path(os.devnull)
        environments = [rank_environment(launch, rank, 0, nowhere, nowhere, "") for rank in range(launch.nproc)]
        waiting = launch.folder / LOGS_FOLDER / "reserve.log"  # what they say before they are called
        waiting.unlink(missing_ok=True)
        pipes = [os.pipe() for _ in range(launch.nproc)]
        try:
            outputs = [waiting] * launch.nproc
            processes = start_ranks(launch, environments, outputs, [reader for reader, _ in pipes])
        except BaseException:
            for _, writer in pipes:
                os.close(writer)
            raise
        finally:
            for reader, _ in pipes:
                os.close(reader)
        self._ranks = Ranks(processes, waiting.parent, nowhere)
        self._writers = [writer for _, writer in pipes]

    @property
    def ready(self) -> bool:
        """Whether all of them live; they may still be importing, which is then already begun."""
        self._ranks.poll()
        return len(self._ranks.alive) == self.launch.nproc

    def call(self, attempt: int, logs: Path, pulses: Path, reason: str) -> Ranks:
        """The ranks of an attempt."""
        environment = {ATTEMPT: str(attempt), LOGS: str(logs), HEARTBEAT: str(pulses), RESTART: reason}
        for rank, writer in enumerate(self._writers):
            log = log_path(logs, rank)
            log.touch()
            call = json.dumps({"log": str(log), "environment": environment}) + "\n"
            with contextlib.suppress(BrokenPipeError):  # it has died since: the first look at the ranks finds that
                os.write(writer, call.encode())
            os.close(writer)
        self._writers = []
        return Ranks(self._ranks.processes, logs, pulses)

    def dismiss(self) -> None:
        """Send them home."""
        for writer in self._writers:
            os.close(writer)
        self._writers = []
        self._ranks.kill()
