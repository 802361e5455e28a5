"""A rank without a model: beats, steps, saves and leaves like a real one, and starts in a fraction of a second.

`python light_rank.py FOLDER STEPS SECONDS_A_STEP`. Faults come by TUNESMITH_FAIL_POINT: points `start`, `step`, `save`,
`end`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from trainer import heartbeat
from trainer.fault import fail_point
from trainer.reserve import await_call, in_reserve
from trainer.signals import STOPPED, StoppedEarly, StopSignal, follow_launcher, stop_early


def saved(folder: Path) -> int:
    return max((int(path.parent.name[5:]) for path in folder.glob("checkpoints/step-*/manifest.json")), default=0)


@heartbeat.section("checkpoint")
def save(folder: Path, rank: int, step: int) -> None:
    fail_point("save", step=step)
    if rank == 0:
        target = folder / "checkpoints" / f"step-{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        (target / "manifest.json").write_text("{}")


def record(folder: Path, rank: int, status: str) -> None:
    if rank == 0:
        text = json.dumps({"status": status, "pid": os.getpid(), "attempt": os.environ["TUNESMITH_ATTEMPT"]})
        (folder / "run.json").write_text(text)


class Meeting:
    """What a process group does: all wait for all; a peer that died breaks the connection, one that hangs does not."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder / "meetings" / os.environ["TUNESMITH_ATTEMPT"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank, self.moment = rank, 0
        self.others = [other for other in range(int(os.environ["WORLD_SIZE"])) if other != rank]
        self.pids: dict[int, int] = {}

    def any(self, flag: bool = False) -> bool:
        """Whether the flag is true on any rank."""
        self.moment += 1
        with heartbeat.collective("all_reduce"):
            staging = self.folder / f".{self.rank}"
            staging.write_text(f"{os.getpid()} {int(flag)}")
            staging.replace(self.folder / f"{self.rank}-{self.moment}")
            for other in self.others:
                path = self.folder / f"{other}-{self.moment}"
                while not path.exists():
                    if other in self.pids and not path.exists() and state(self.pids[other]) in ("", "Z"):
                        raise ConnectionError("Connection closed by peer")
                    time.sleep(0.005)
                pid, theirs = path.read_text().split()
                self.pids[other] = int(pid)
                flag = flag or theirs == "1"
        return flag


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def main(folder: Path, steps: int, seconds: float) -> int:
    rank = int(os.environ["RANK"])
    heartbeat.phase("load")
    meeting = Meeting(folder, rank)
    fail_point("start")
    stop = StopSignal().install()
    record(folder, rank, "running")
    heartbeat.phase("step")
    for step in range(saved(folder) + 1, steps + 1):
        if meeting.any(stop.raised):
            save(folder, rank, step - 1)
            meeting.any()
            heartbeat.phase("finish")
            record(folder, rank, "preempted")
            print(f"rank {rank} saved step {step - 1} on {stop.name}")
            return STOPPED
        heartbeat.step(step, lambda step=step: [f"source:{step}", f"source:{step + 100}"])
        fail_point("step", step=step)
        time.sleep(seconds)
        meeting.any()
        if step % 5 == 0:
            save(folder, rank, step)
        heartbeat.step_done(step)
    meeting.any()
    heartbeat.phase("finish")
    record(folder, rank, "complete")
    fail_point("end")
    return 0


if __name__ == "__main__":
    stop_early()
    follow_launcher()
    if in_reserve():
        print(f"in reserve: pid {os.getpid()}", flush=True)
        await_call()
        print("called in")
    heartbeat.begin()
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: pid {os.getpid()}")
    try:
        code = main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    except StoppedEarly as early:
        print(early)
        code = early.exit_code
    except Exception as error:
        heartbeat.ended(f"{type(error).__name__}: {error}")
        raise
    sys.exit(code)
