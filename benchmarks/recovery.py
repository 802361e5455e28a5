"""From kill -9 of a rank to training again: `tunesmith launch`, the same with ranks in reserve, and plain torchrun.

    python benchmarks/recovery.py [--trials 50] [--modes launch standby torchrun] [--block 10] [--folder DIR]

A run of two ranks (FSDP2 over gloo, a model of some 30 thousand parameters, a checkpoint every five steps) is never let
finish: as soon as it has made steps again, a rank is killed, turn about. A trial's time is from the kill to the end of
the first step after it, by the journal's own clock. A trial that takes over `--patience` seconds is lost; the run is
then started anew. Modes take turns in blocks of `--block` trials, so that a busy machine is busy for all of them.

A row for each mode is appended to benchmarks/results/recovery.csv; the last lines are `name: value`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from ruamel.yaml import YAML  # noqa: E402
from tiny import byte_tokenizer, tiny_llama, write_chats  # noqa: E402

from trainer.tracking.journal import scan_rows  # noqa: E402

COLUMNS = (
    "when", "mode", "trials", "recovered", "median_s", "p95_s", "least_s", "most_s", "device", "cores", "ranks",
    "load", "versions",
)  # fmt: skip
MODES = {
    "launch": ["-m", "trainer", "launch", "--nproc=2", "--max-restarts=1000", "--quiet"],
    "standby": ["-m", "trainer", "launch", "--nproc=2", "--max-restarts=1000", "--quiet", "--standby"],
    "torchrun": [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1000"),
        *("-m", "trainer", "train", "--quiet"),
    ],
}


class Victim:
    """A run of one mode; started when it is needed, stopped between blocks so that the others have the machine."""

    def __init__(self, mode: str, root: Path) -> None:
        self.mode, self.folder = mode, root / mode
        self.recipe = root / f"{mode}.yaml"
        recipe = {
            "name": mode,
            "output": str(self.folder),
            "model": {"path": str(root / "model"), "dtype": "float32", "max_length": 96},
            "tuning": {"method": "full"},
            "sources": {"chats": {"path": str(root / "chats.jsonl"), "format": "messages"}},
            "objective": {"name": "supervised"},
            "optimizer": {"lr": 0.001},
            "schedule": {"name": "constant"},
            "batch": {"examples": 6, "micro_tokens": 96},
            "until": {"steps": 1_000_000, "epochs": None},
            "checkpoint": {"every": 5},
        }
        with self.recipe.open("w") as file:
            YAML(typ="safe").dump(recipe, file)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it trains."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TUNESMITH_CACHE": str(self.folder.parent / "cache")}
        command = [sys.executable, *MODES[self.mode], str(self.recipe)]
        with (self.folder.parent / f"{self.mode}.out").open("ab") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.settle(time.time())

    def settle(self, since: float) -> None:
        """Return once steps are made, and the reserve (where there is one) has nothing more to import."""
        if self.first_step(since, 600) is None:
            raise SystemExit(f"{self.mode}: does not train: see {self.folder.parent / (self.mode + '.out')}")
        time.sleep(1.5)  # some more steps, so that the kill falls anywhere in one
        quiet = 0
        while self.mode == "standby" and quiet < 3:
            before = [busy(pid) for pid in self.reserve()]
            time.sleep(0.5)
            after = [busy(pid) for pid in self.reserve()]
            quiet = quiet + 1 if len(after) == 2 and after == before else 0

    def first_step(self, since: float, patience: float) -> float | None:
        """When the first step after a moment ended; None if none did in time."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            times = [row["time"] for row in scan_rows(self.folder)[0] if row["kind"] == "step" and row["time"] > since]
            if times:
                return float(min(times))
            time.sleep(0.1)
        return None

    def ranks(self) -> list[int]:
        """The pids of the ranks at work, rank 0 first."""
        assert self.process is not None
        if self.mode == "torchrun":
            return children(self.process.pid)
        lines = (self.folder / "logs" / "supervisor.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["event"] == "attempt"][-1]["pids"]

    def reserve(self) -> list[int]:
        """The pids in reserve."""
        assert self.process is not None
        return sorted(set(children(self.process.pid)) - set(self.ranks()))

    def trial(self, rank: int, patience: float) -> float | None:
        """Seconds from the kill of a rank to the end of the next step; None if that is not seen."""
        victim = self.ranks()[rank]
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        # the other rank may end its step in this moment: a step counts once the victim's successor is there
        end = time.monotonic() + patience
        while time.monotonic() < end and victim in self.ranks():
            time.sleep(0.05)
        back = self.first_step(max(killed, self.restarted(killed)), patience)
        if back is None:
            self.kill()
            return None
        return back - killed

    def restarted(self, killed: float) -> float:
        """When the restart was recorded: rows before that are of the attempt that died."""
        deaths = [row["time"] for row in scan_rows(self.folder)[0] if row.get("name") == "failed"]
        return max([time_ for time_ in deaths if time_ >= killed], default=killed)

    def stop(self) -> None:
        """Save and leave."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
        self.process = None

    def kill(self) -> None:
        """End it whatever state it is in."""
        if self.process is None:
            return
        for pid in [*children(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def children(pid: int) -> list[int]:
    """The child processes, oldest first."""
    try:
        return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except FileNotFoundError:
        return []


def busy(pid: int) -> float:
    """Processor ticks that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return -1
    return int(fields[11]) + int(fields[12])


def main() -> None:
    """Run the modes in turn, write their rows, print the headlines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--patience", type=float, default=90.0)
    parser.add_argument("--folder", type=Path, default=None, help="where to run; default: the temporary folder")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "recovery.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recovery-", dir=arguments.folder) as name:
        root = Path(name)
        tiny_llama().save_pretrained(root / "model")
        byte_tokenizer().save_pretrained(root / "model")
        write_chats(root / "chats.jsonl", 60)
        victims = [Victim(mode, root) for mode in arguments.modes]
        found: dict[str, list[float | None]] = {mode: [] for mode in arguments.modes}
        loads = [os.getloadavg()[0]]
        while any(len(times) < arguments.trials for times in found.values()):
            for victim in victims:
                block(
                    victim,
                    found[victim.mode],
                    min(arguments.trials, len(found[victim.mode]) + arguments.block),
                    arguments,
                )
                loads.append(os.getloadavg()[0])
        write_rows(arguments, found, statistics.median(loads))


def block(victim: Victim, times: list[float | None], upto: int, arguments: argparse.Namespace) -> None:
    """Trials of one mode, until it has so many."""
    try:
        while len(times) < upto:
            if victim.process is None:
                victim.start()
            seconds = victim.trial(len(times) % 2, arguments.patience)
            times.append(seconds)
            print(f"{victim.mode} {len(times)}: {'lost' if seconds is None else f'{seconds:.2f} s'}", flush=True)
            if seconds is not None and len(times) < upto:
                victim.settle(time.time())
    finally:
        victim.stop()


def write_rows(arguments: argparse.Namespace, found: dict[str, list[float | None]], load: float) -> None:
    """A row for each mode, and the headlines."""
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    fresh = not arguments.results.exists()
    versions = " ".join(f"{name}={importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    with arguments.results.open("a", newline="", encoding="utf-8") as sink:
        writer = csv.DictWriter(sink, COLUMNS)
        if fresh:
            writer.writeheader()
        for mode, times in found.items():
            good = sorted(seconds for seconds in times if seconds is not None)
            row = {
                "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "mode": mode,
                "trials": len(times),
                "recovered": len(good),
                "device": processor(),
                "cores": os.cpu_count(),
                "ranks": 2,
                "load": round(load, 1),
                "versions": f"{versions} python={platform.python_version()}",
            }
            if good:
                p95 = good[math.ceil(0.95 * len(good)) - 1]
                figures = {"median_s": statistics.median(good), "p95_s": p95, "least_s": good[0], "most_s": good[-1]}
                row |= {name: round(value, 2) for name, value in figures.items()}
            writer.writerow(row)
            print(f"{mode}_recovered: {len(good)} of {len(times)}")
            if good:
                print(f"{mode}_median_s: {row['median_s']}")
                print(f"{mode}_p95_s: {row['p95_s']}")


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
