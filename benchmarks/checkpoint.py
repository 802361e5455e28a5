"""The checkpoint store beside torch.distributed.checkpoint: the same sharded state, in one run, in turn.

    python benchmarks/checkpoint.py [--sizes 200 2000] [--rounds 5] [--ranks 2] [--folder DIR]

A module under FSDP2 on `--ranks` processes (gloo), fp32, with AdamW's two moments: `--sizes` MB in all. One engine
over its DTensors serves the store, `get_state_dict` and `set_state_dict` serve DCP, so both save and load the very
same tensors. In each round every operation runs once, and the order is turned from round to round; a round before
them is thrown away. A time is that of the slowest rank between two barriers.

    save              the store's synchronous save: hashed, fsynced, agreed, published
    save_async        until training goes on; `save_async_copied` until it could update at once, were there no forward
                      and backward before the next update; `save_async_total` until it is durable
    load, load_cold   verified, from a warm page cache and from a cold one (the files' pages given up before)
    load_unverified   the same without comparing digests
    dcp_save          get_state_dict and dcp.save, as they come: files synced, nothing hashed
    dcp_async         get_state_dict and dcp.async_save until it returns; `dcp_async_cached` keeps its host copy
    dcp_load, dcp_load_cold   dcp.load and set_state_dict

Rows (medians) are appended to benchmarks/results/checkpoint.csv; the last lines are `name: value`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.checkpoint import load, newest, save
from trainer.checkpoint.manifest import read_manifest, verify
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.restore import _restore
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.store import Store
from trainer.config.schema import Checkpoint
from trainer.engine.base import Piece, Slot
from trainer.world import World, connected, environment_world

HERE = Path(__file__).resolve().parent
WIDTH = 1024
BYTES = 12  # of an element: the value and two moments in fp32
COLUMNS = [
    *("when", "size_mb", "ranks", "operation", "median_s", "least_s", "most_s", "rounds"),
    *("device", "cores", "threads", "filesystem", "versions", "load"),
]


def main() -> None:
    """Parse the arguments, run the sizes one after another, print the headlines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 2000], help="MB of state in all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "checkpoint.csv")
    arguments = parser.parse_args()
    headlines: dict[str, float] = {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=arguments.folder) as name:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            processes.spawn(measure, (arguments.ranks, port, size, arguments.rounds, name), nprocs=arguments.ranks)
            times = json.loads(Path(name, "times.json").read_text())
            write_rows(arguments, size, times, Path(name))
        headlines |= {f"{operation}_{size}mb_s": statistics.median(values) for operation, values in times.items()}
        middle = {operation: statistics.median(values) for operation, values in times.items()}
        headlines[f"blocking_share_{size}mb"] = middle["save_async"] / middle["save"]
        headlines[f"save_over_dcp_{size}mb"] = ratio(times, "save", "dcp_save")
        headlines[f"load_over_dcp_{size}mb"] = ratio(times, "load", "dcp_load")
        headlines[f"verify_s_per_gb_core_{size}mb"] = middle["verify"] / (size / 1000)
    for name, value in headlines.items():
        print(f"{name}: {value:.4g}")


def ratio(times: dict[str, list[float]], first: str, second: str) -> float:
    """The median over the rounds of one time by the other."""
    return statistics.median(a / b for a, b in zip(times[first], times[second], strict=True))


class Sharded:
    """What the store needs of an engine, over FSDP2's DTensors and an ordinary optimizer."""

    def __init__(self, size: int, world: World) -> None:
        layers = max(1, round(size * 1e6 / BYTES / WIDTH**2))
        torch.manual_seed(world.rank)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        mesh = init_device_mesh("cpu", (world.size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.model, self.world = model, world
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def slots(self) -> Iterator[Slot]:
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            rows = -(-parameter.shape[0] // self.world.size)
            piece = Piece(name, self.world.rank * rows * WIDTH, local.numel(), 0, tuple(parameter.shape))
            yield Slot(parameter, (piece,), self.optimizer.state[parameter])

    def writes(self, slot: Slot) -> bool:
        return True

    def prepare_state(self) -> None:
        """It is there."""

    def after_load(self) -> None:
        """Nothing is copied."""


def measure(rank: int, ranks: int, port: int, size: int, rounds: int, folder: str) -> None:
    """All operations of one size, on one rank; rank 0 leaves the times in `times.json`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    root, times = Path(folder), dict[str, list[float]]()
    with connected(environment_world()) as world:
        bench = Bench(Sharded(size, world), world, root)
        names = list(bench.operations)
        for number in range(rounds + 1):
            shift = number * 3 % len(names)
            for name in names[shift:] + names[:shift]:
                for operation, seconds in bench.operations[name]().items():
                    if number:
                        times.setdefault(operation, []).append(seconds)
            bench.clear()
            if world.is_main:
                print(f"{size} MB, round {number}", flush=True)
        bench.saver.close()
        if world.is_main:
            (root / "times.json").write_text(json.dumps(times))


class Bench:
    """The operations; each gives the times that it measured, the slowest rank's."""

    def __init__(self, engine: Any, world: World, root: Path) -> None:
        self.engine, self.world, self.root = engine, world, root
        self.step = 0
        self.group = dist.new_group(backend="gloo")
        self.saver = Saver(Store(root / "async", settings=Checkpoint(keep=1)), world, lambda *event: None)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))  # as DCP's own, but kept
        self.operations: dict[str, Callable[[], dict[str, float]]] = {
            "store": self.store,
            "async": self.asynchronous,
            "dcp": self.dcp,
            "dcp_async": self.dcp_async,
            "dcp_async_cached": self.dcp_async_cached,
        }

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds of the slowest rank, from a common start to its own end."""
        gc.collect()
        self.world.barrier()
        started = time.perf_counter()
        work()
        return self.world.max(time.perf_counter() - started)

    def store(self) -> dict[str, float]:
        """A synchronous save, and what reads it."""
        self.step += 1
        folder, times = self.root / "sync", {}
        times["save"] = self.timed(lambda: save(folder, self.step, self.engine, self.world, {}, 9))
        path = newest(folder)[0]
        for name, cold in (("load_cold", True), ("load", False)):
            self.forget(path, cold)
            times[name] = self.timed(lambda: load(folder, self.engine, self.world))
        times["load_unverified"] = self.timed(lambda: self.unverified(path))
        times["verify"] = self.timed(lambda: self.verify(path))
        return times

    def unverified(self, path: Path) -> None:
        with Reader(path, read_manifest(path)) as reader:
            _restore(reader, self.engine, self.world)

    def verify(self, path: Path) -> None:
        """On one core: one rank, one thread."""
        if self.world.is_main:
            before = os.environ["LOCAL_WORLD_SIZE"]
            os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())
            verify(path)
            os.environ["LOCAL_WORLD_SIZE"] = before

    def asynchronous(self) -> dict[str, float]:
        """An asynchronous save: what training waits for, and until it is durable."""
        self.step += 1
        times: dict[str, float] = {}
        gc.collect()
        self.world.barrier()
        started = time.perf_counter()
        self.saver.save(self.step, self.engine, {})
        times["save_async"] = time.perf_counter() - started
        self.saver.copied()
        times["save_async_copied"] = time.perf_counter() - started
        self.saver.wait()
        times["save_async_total"] = time.perf_counter() - started
        return {name: self.world.max(times[name]) for name in sorted(times)}

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.engine.model, self.engine.optimizer)
        return {"model": model, "optimizer": optimizer}

    def dcp(self) -> dict[str, float]:
        """DCP's save and load."""
        path, times = self.root / "dcp", {}
        times["dcp_save"] = self.timed(lambda: dcp.save(self.state(), checkpoint_id=path))
        for name, cold in (("dcp_load_cold", True), ("dcp_load", False)):
            self.forget(path, cold)
            times[name] = self.timed(lambda: self.dcp_restore(path))
        return times

    def dcp_restore(self, path: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.engine.model,
            self.engine.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def dcp_async(self) -> dict[str, float]:
        """DCP's asynchronous save as it comes."""
        path, pending = self.root / "dcp-async", list[Any]()
        work = lambda: pending.append(dcp.async_save(self.state(), checkpoint_id=path, process_group=self.group))  # noqa: E731
        blocking = self.timed(work)
        finished(pending[0])
        return {"dcp_async": blocking}

    def dcp_async_cached(self) -> dict[str, float]:
        """DCP's asynchronous save with the host copy that it keeps."""
        pending = list[Any]()
        work = lambda: pending.append(  # noqa: E731
            dcp.async_save(
                self.state(), checkpoint_id=self.root / "cached", process_group=self.group, async_stager=self.stager
            )
        )
        blocking = self.timed(work)
        finished(pending[0])
        return {"dcp_async_cached": blocking}

    def forget(self, path: Path, cold: bool) -> None:
        """Give up the page cache of a folder's files, or fill it."""
        self.world.barrier()
        if self.world.is_main:
            for file in (file for file in path.iterdir() if file.is_file()):
                with file.open("rb") as opened:
                    if cold:
                        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    else:
                        while opened.read(1 << 24):
                            pass
        self.world.barrier()

    def clear(self) -> None:
        """Free the disk: no operation is to pay for removing what another wrote."""
        self.world.barrier()
        if self.world.is_main:
            for name in ("sync", "dcp", "dcp-async", "cached"):
                shutil.rmtree(self.root / name, ignore_errors=True)
        self.world.barrier()


def finished(response: Any) -> None:
    """Wait for what async_save returned: a future, or an object with an upload's future."""
    getattr(response, "upload_completion", response).result()


def write_rows(arguments: argparse.Namespace, size: int, times: dict[str, list[float]], folder: Path) -> None:
    """Append one row for each operation."""
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    fresh = not arguments.results.exists()
    common = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "size_mb": size,
        "ranks": arguments.ranks,
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "filesystem": filesystem(folder),
        "versions": f"torch={torch.__version__} python={platform.python_version()}",
        "load": round(os.getloadavg()[0], 2),
    }
    with arguments.results.open("a", newline="", encoding="utf-8") as sink:
        writer = csv.DictWriter(sink, COLUMNS)
        if fresh:
            writer.writeheader()
        for operation, values in times.items():
            measured = {"median_s": statistics.median(values), "least_s": min(values), "most_s": max(values)}
            row = common | {"operation": operation, "rounds": len(values)}
            writer.writerow(row | {name: round(value, 4) for name, value in measured.items()})


def processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def filesystem(folder: Path) -> str:
    """The type of the filesystem that holds a folder."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(point), kind) for _, point, kind, *_ in mounts if folder.resolve().is_relative_to(point)]
    return max(inside)[1] if inside else ""


if __name__ == "__main__":
    main()
