"""A soak under random faults: a run of two ranks meets one every minute or so, and nobody helps.

    python benchmarks/chaos.py [--minutes 15] [--mean-seconds 60] [--seed 17] [--engine fsdp2] [--folder FOLDER]

First the calm run, alone: its duration, its final parameters. Then the same recipe by `tunesmith launch`, on a file
system of its own (tmpfs, needs root), with faults drawn from the seed at exponential intervals, each of a random kind
and victim. A loop that starts the same command again when it ended with 1 or 75 stands for the cluster's scheduler.
Ended is it with 0 only.

Printed last: faults by kind, restarts, the effective training time ratio (seconds of the steps that count, each step
once, over the wall time of the disturbed run), recovery times (fault
to the next new step, over the faults that ended processes), and whether losses, ledger, parameters and moments equal
the calm run's bit for bit. A row goes to benchmarks/results/chaos.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "faults")]  # the same oracle as the tests

from fault_cases import Command, launch, outcome, ranks_of, recipe_for, write_recipe  # noqa: E402
from tiny import byte_tokenizer, tiny_llama, write_chats  # noqa: E402

from trainer.checkpoint.manifest import newest  # noqa: E402
from trainer.tracking import read_rows, read_run  # noqa: E402

COLUMNS = (
    "when", "device", "engine", "ranks", "seed", "steps", "every", "mean_seconds", "faults", "kinds", "restarts",
    "starts", "chaos_seconds", "ratio", "recovery_p50", "recovery_p95", "equal", "by_kind", "versions",
)  # fmt: skip
PROBE_STEPS = 60


class Victim:
    """The disturbed run: what a fault can reach of it."""

    def __init__(self, folder: Path, disk: Path, draw: random.Random) -> None:
        self.folder, self.disk, self.draw = folder, disk, draw
        self.command: Command | None = None

    def rank(self) -> int | None:
        """The process of a random rank."""
        ranks = ranks_of(self.folder)
        return self.draw.choice(sorted(ranks.values())) if ranks else None

    def signal_rank(self, number: int) -> bool:
        pid = self.rank()
        if pid is not None:
            os.kill(pid, number)
        return pid is not None

    def signal_supervisor(self, number: int) -> bool:
        assert self.command is not None and self.command.process is not None
        if self.command.process.poll() is not None:
            return False
        self.command.process.send_signal(number)
        return True

    def kill_all(self) -> bool:
        ranks = ranks_of(self.folder)
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)
        return bool(ranks)

    def damage(self, how: str) -> bool:
        """Harm the newest checkpoint, then kill a rank, so that somebody has to read it."""
        found = newest(self.folder / "checkpoints")
        if len(found) < 2:
            return False
        files = sorted(found[0].iterdir())
        file = self.draw.choice([path for path in files if path.is_file()])
        try:
            data = bytearray(file.read_bytes())
            if how == "flip":
                data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
                file.write_bytes(data)
            elif how == "cut":
                os.truncate(file, self.draw.randrange(len(data)))
            else:
                file.unlink()
        except (FileNotFoundError, ValueError):
            return False  # rotated away meanwhile
        return self.signal_rank(signal.SIGKILL)

    def fill_disk(self) -> bool:
        """No room for some seconds."""
        filler = self.disk / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 65536)
        except OSError:
            time.sleep(self.draw.uniform(1, 4))
        finally:
            filler.unlink(missing_ok=True)
        return True

    def forbid_large_files(self) -> bool:
        """Real write errors in one rank's saves, for some seconds."""
        pid = self.rank()
        if pid is None:
            return False
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            time.sleep(self.draw.uniform(0.5, 2))
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except ProcessLookupError:
            pass
        return True

    def pause(self) -> bool:
        """A rank that stands still for a while, and goes on: no reason to restart."""
        pid = self.rank()
        if pid is None:
            return False
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.draw.uniform(0.5, 3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return True


def kinds(victim: Victim) -> dict[str, Callable[[], bool]]:
    """Every kind of fault; each tells whether it found a victim."""
    return {
        "kill -9 one rank": lambda: victim.signal_rank(signal.SIGKILL),
        "kill -9 all ranks": victim.kill_all,
        "kill -9 the supervisor": lambda: victim.signal_supervisor(signal.SIGKILL),
        "abort one rank": lambda: victim.signal_rank(signal.SIGABRT),
        "segmentation fault": lambda: victim.signal_rank(signal.SIGSEGV),
        "hang one rank": lambda: victim.signal_rank(signal.SIGSTOP),
        "pause one rank": victim.pause,
        "SIGTERM": lambda: victim.signal_supervisor(signal.SIGTERM),
        "SIGUSR1": lambda: victim.signal_supervisor(signal.SIGUSR1),
        "flip a bit": lambda: victim.damage("flip"),
        "cut a file": lambda: victim.damage("cut"),
        "lose a file": lambda: victim.damage("lose"),
        "full disk": victim.fill_disk,
        "write error": victim.forbid_large_files,
    }


ENDS_PROCESSES = ("kill", "abort", "segmentation", "hang", "SIG", "flip", "cut", "lose")


def step_times(folder: Path) -> list[tuple[int, float]]:
    """(step, time of its row) in the order of writing, redone steps included."""
    found = []
    for line in (folder / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == "step":
            found.append((row["step"], row["time"]))
    return found


def calm(recipe: dict[str, Any], root: Path) -> float:
    """The undisturbed run; its wall time."""
    path = write_recipe(recipe, root / f"{Path(recipe['output']).name}.yaml")
    ended = launch(path, log=root / "calm.log").end(3600)
    if ended.code:
        raise SystemExit(f"the calm run ended with {ended.code}:\n{ended.output[-2000:]}")
    return ended.seconds


def soak(recipe: dict[str, Any], root: Path, disk: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The disturbed run, to its end."""
    draw = random.Random(arguments.seed)
    folder = Path(recipe["output"])
    path = write_recipe(recipe, root / "chaos.yaml")
    victim = Victim(folder, disk, draw)
    every_kind = kinds(victim)
    bag: list[str] = []
    done: list[tuple[str, float]] = []
    starts, began = 0, time.time()
    due = began + draw.expovariate(1 / arguments.mean_seconds)
    while True:
        if victim.command is None or victim.command.process is None or victim.command.process.poll() is not None:
            if victim.command is not None and victim.command.process is not None:
                if victim.command.process.returncode == 0:
                    break
                print(f"ended with {victim.command.process.returncode}: started again", flush=True)
            starts += 1
            words = ("--max-restarts", "1000", "--hang-seconds", str(arguments.hang_seconds))
            victim.command = launch(path, *words, log=root / f"chaos-{starts}.log")
        if time.time() >= due:
            bag = bag or draw.sample(sorted(every_kind), len(every_kind))  # all kinds before one comes again
            kind = bag.pop()
            if every_kind[kind]():
                done.append((kind, time.time()))
                print(f"{time.time() - began:7.1f} s: {kind}", flush=True)
                due = time.time() + draw.expovariate(1 / arguments.mean_seconds)
            else:
                bag.insert(0, kind)  # nobody there to harm just now
                due = time.time() + 1.0
        if time.time() - began > 4 * arguments.minutes * 60 + 600:
            raise SystemExit("the disturbed run does not come to an end")
        time.sleep(0.2)
    return {"faults": done, "starts": starts, "seconds": time.time() - began}


def recoveries(faults: list[tuple[str, float]], rows: list[tuple[int, float]]) -> list[float]:
    """Seconds from each fault that ended processes to the next row of a step never made before."""
    found = []
    for kind, when in faults:
        if not kind.startswith(ENDS_PROCESSES):
            continue
        reached = max((step for step, at in rows if at <= when), default=0)
        later = [at for step, at in rows if at > when and step > reached]
        if later:
            found.append(later[0] - when)
    return found


def quantile(values: list[float], share: float) -> float:
    """The value below which that share lies; nan where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def productive(folder: Path) -> float:
    """Seconds of the steps that count, each once."""
    return sum(row["seconds"] for row in read_rows(folder) if row["kind"] == "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--mean-seconds", type=float, default=60.0)
    parser.add_argument("--hang-seconds", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--engine", default="fsdp2", choices=["fsdp2", "deepspeed"])
    parser.add_argument(
        "--folder", type=Path, help="keeps model, data and calm run for another soak; default: none kept"
    )
    parser.add_argument("--steps", type=int, help="instead of --minutes, which are turned into steps by a probe")
    parser.add_argument("--calm-only", action="store_true", help="make the calm run in --folder and end")
    parser.add_argument("--every-seconds", type=float, default=5.0, help="between checkpoints, about")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        root = (arguments.folder or Path(name)).absolute()
        disk = root / "disk"
        disk.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], check=True)
        try:
            found = run_both(arguments, root, disk)
            if not arguments.calm_only:
                report(arguments, *found)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)


def run_both(arguments: argparse.Namespace, root: Path, disk: Path) -> tuple[dict[str, Any], Path, Path]:
    """A probe for the time of a step, the calm run, the disturbed run."""
    model, data = root / "model", root / "chats.jsonl"
    if not data.exists():
        tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        write_chats(data, 400)
    engine = {"kind": arguments.engine} | ({"config": "zero2"} if arguments.engine == "deepspeed" else {})

    def recipe(folder: Path, steps: int, every: int) -> dict[str, Any]:
        until = {"steps": steps, "epochs": None}
        batch = {"examples": 48, "micro_tokens": 384}
        saving = {"every": every, "failure_limit": 50}
        return recipe_for(folder, model, data, until=until, batch=batch, checkpoint=saving, engine=engine)

    if not (root / "probe" / "run.json").exists():
        calm(recipe(root / "probe", PROBE_STEPS, 20), root)
    seconds = statistics.median(row["seconds"] for row in read_rows(root / "probe") if row["kind"] == "step")
    steps = arguments.steps or int(arguments.minutes * 60 / seconds)
    every = max(1, int(arguments.every_seconds / seconds))
    print(f"step {seconds:.3f} s: {steps} steps, a checkpoint each {every}", flush=True)
    calm_seconds = calm(recipe(root / f"calm-{arguments.engine}", steps, every), root)
    print(f"calm run: {calm_seconds:.0f} s", flush=True)
    if arguments.calm_only:
        return {}, root, root
    found = soak(recipe(disk / "chaos", steps, every), root, disk, arguments)
    found |= {"steps": steps, "every": every}
    return found, root / f"calm-{arguments.engine}", disk / "chaos"


def report(arguments: argparse.Namespace, found: dict[str, Any], straight: Path, disturbed: Path) -> None:
    """Compare, print, and append the row."""
    first, second = outcome(straight), outcome(disturbed)
    equal = {"losses": first.losses == second.losses, "ledger": first.ledger == second.ledger}
    equal["tensors"] = first.tensors == second.tensors
    times = recoveries(found["faults"], step_times(disturbed))
    by_kind = Counter(kind for kind, _ in found["faults"])
    ratio = productive(disturbed) / found["seconds"]
    versions = " ".join(f"{name}={importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed"))
    row = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": read_run(straight)["hardware"]["cpu"] or platform.machine(),
        "engine": arguments.engine,
        "ranks": 2,
        "seed": arguments.seed,
        "steps": found["steps"],
        "every": found["every"],
        "mean_seconds": arguments.mean_seconds,
        "faults": len(found["faults"]),
        "kinds": len(by_kind),
        "restarts": read_run(disturbed)["restarts"],
        "starts": found["starts"],
        "chaos_seconds": round(found["seconds"]),
        "ratio": round(ratio, 3),
        "recovery_p50": round(quantile(times, 0.5), 1),
        "recovery_p95": round(quantile(times, 0.95), 1),
        "equal": all(equal.values()),
        "by_kind": "; ".join(f"{kind}: {count}" for kind, count in sorted(by_kind.items())),
        "versions": versions,
    }
    target = HERE / "results" / "chaos.csv"
    fresh = not target.exists()
    with target.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    for kind, count in sorted(by_kind.items()):
        print(f"faults, {kind}: {count}")
    for name in ("faults", "restarts", "starts", "chaos_seconds"):
        print(f"{name}: {row[name]}")
    print(f"effective training time ratio: {row['ratio']}")
    print(f"recovery p50 seconds: {row['recovery_p50']}")
    print(f"recovery p95 seconds: {row['recovery_p95']}")
    for name, same in equal.items():
        print(f"{name} equal the calm run's: {same}")


if __name__ == "__main__":
    main()
