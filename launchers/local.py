"""The ranks of one attempt on this machine: started with torchrun's environment, signalled, killed, waited for.

They are this process's own children, not torchrun's: their exit codes and signals are then known exactly, a signal
reaches them without torchrun's 30 seconds to SIGKILL, and a start saves the 1.4 s in which torchrun imports torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launchers.environment import SWITCH, cpu_environment
from launchers.machine import cores, listening_socket
from trainer.launched import ATTEMPT, HEARTBEAT, LOGS, LOGS_FOLDER, RESERVE, RESTART, STORE, SUPERVISOR

TRAINER = (sys.executable, "-m", "trainer")
LOOPBACK = "lo"


@dataclass(frozen=True)
class Launch:
    """What `tunesmith launch` was asked for."""

    folder: Path  # the run's
    arguments: tuple[str, ...]  # of each rank's command
    nproc: int = 1
    max_restarts: int = 10
    hang_seconds: float = 60.0  # 0: nobody looks for hangs
    standby: bool = False  # keep ranks in reserve for the next attempt
    fresh: bool = False  # move an old run in this folder aside first
    program: tuple[str, ...] = TRAINER


@dataclass(frozen=True)
class Exit:
    """How a rank ended: its exit code, or minus the signal that killed it."""

    rank: int
    code: int
    time: float = field(default_factory=time.monotonic)


def rank_environment(launch: Launch, rank: int, attempt: int, logs: Path, pulses: Path, reason: str) -> dict[str, str]:
    """What a rank finds in its environment beside the user's own: torchrun's names, threads, and ours."""
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(launch.nproc),
        "LOCAL_WORLD_SIZE": str(launch.nproc),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        ATTEMPT: str(attempt),
        HEARTBEAT: str(pulses),
        LOGS: str(logs),
        SUPERVISOR: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",  # the log of a rank that is killed shall hold its last words
    }
    if reason:
        own[RESTART] = reason
    # the ranks share the cores; without this each takes all of them, and they crowd each other out
    defaults = {"OMP_NUM_THREADS": str(max(1, cores() // launch.nproc)), "GLOO_SOCKET_IFNAME": LOOPBACK}
    variables = {**defaults, **os.environ, **cpu_environment(), **own, SWITCH: "set"}
    if os.environ.get(SWITCH) == "off":
        variables[SWITCH] = "off"
    for foreign in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        variables.pop(foreign, None)  # of a torchrun around this command
    return variables


def start_ranks(
    launch: Launch,
    environments: Sequence[Mapping[str, str]],
    outputs: Sequence[Path],
    pipes: Sequence[int] = (),
) -> list[subprocess.Popen[bytes]]:
    """A process for each rank, each with its environment and output, and the reading end of its pipe where there is
    one. Each leads a session of its own, so that Ctrl-C reaches the supervisor alone."""
    processes: list[subprocess.Popen[bytes]] = []
    with listening_socket() as store:
        meeting = {"MASTER_PORT": str(store.getsockname()[1])}
        try:
            for rank, environment in enumerate(environments):
                own, passed = dict(meeting), list(pipes[rank : rank + 1])
                if rank == 0 and launch.nproc > 1:
                    own[STORE] = str(store.fileno())
                    passed.append(store.fileno())
                if pipes:
                    own[RESERVE] = str(pipes[rank])
                with outputs[rank].open("ab") as output:
                    process = subprocess.Popen(
                        [*launch.program, *launch.arguments],
                        env={**environment, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=passed,
                    )
                processes.append(process)
        except BaseException:
            for process in processes:
                process.kill()
            raise
    return processes


class Ranks:
    """The processes of one attempt."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], logs: Path, pulses: Path) -> None:
        self.processes, self.logs, self.pulses = processes, logs, pulses
        self.exits: dict[int, Exit] = {}

    def poll(self) -> list[Exit]:
        """The ranks that have ended since the last call."""
        fresh = []
        for rank, process in enumerate(self.processes):
            if rank not in self.exits and (code := process.poll()) is not None:
                self.exits[rank] = Exit(rank, code)
                fresh.append(self.exits[rank])
        return fresh

    @property
    def alive(self) -> list[int]:
        """Ranks that have not been seen to end."""
        return [rank for rank in range(len(self.processes)) if rank not in self.exits]

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return self.processes[rank].pid

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        """Send a signal to ranks, default all that live."""
        for rank in self.alive if ranks is None else ranks:
            self.processes[rank].send_signal(number)

    def kill(self, ranks: list[int] | None = None, seconds: float = 10.0) -> list[int]:
        """Kill ranks (default all that live) with the processes they started, and wait for them; returns those that
        are still there: blocked in the kernel, out of any signal's reach."""
        doomed = self.alive if ranks is None else ranks
        for rank in doomed:
            if self.processes[rank].poll() is None:
                os.killpg(self.pid(rank), signal.SIGKILL)
        end = time.monotonic() + seconds
        for rank in doomed:
            try:
                self.processes[rank].wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        self.poll()
        return [rank for rank in doomed if rank not in self.exits]


def log_path(logs: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return logs / f"rank-{rank:05d}.log"


def new_attempt(folder: Path) -> tuple[int, Path]:
    """The number and the new, empty folder `logs/attempt-NN` of the run's next attempt, counted over its whole life."""
    logs = folder / LOGS_FOLDER
    logs.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name[8:]) for path in logs.glob("attempt-*") if path.name[8:].isdigit()]
    attempt = max(taken, default=0)
    while True:
        attempt += 1
        path = logs / f"attempt-{attempt:02d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue  # another launch of the same folder was quicker; the run's lease decides between the two
        return attempt, path
