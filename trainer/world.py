"""The processes of a run: ranks, device, sums over ranks, seeds, the stop signal."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)


@dataclass
class StopSignal:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; read, agreed over ranks, at a step boundary."""

    name: str = ""
    event: threading.Event = field(default_factory=threading.Event)

    def install(self) -> StopSignal:
        """Catch the four signals; the handler only sets the flag."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._set)
        return self

    def _set(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        self.event.set()

    @property
    def raised(self) -> bool:
        return self.event.is_set()


@dataclass(frozen=True)
class World:
    """This process among its peers. In one process every collective is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values summed over ranks, key by key, in fp64. Every rank must give the same keys."""
        keys = sorted(values)
        return dict(zip(keys, self._reduce([float(values[key]) for key in keys], dist.ReduceOp.SUM), strict=True))

    def max(self, value: float) -> float:
        """The largest value of any rank."""
        return self._reduce([float(value)], dist.ReduceOp.MAX)[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on at least one rank."""
        return self.max(float(flag)) > 0

    def _reduce(self, values: list[float], operation: Any) -> list[float]:
        if self.size == 1 or not values:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every rank, in rank order, on every rank. JSON, not pickle: peers cannot run code here."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        rows = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded)
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def environment_world() -> World:
    """Rank, size and device as the launcher's environment says; opens no connection."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), local_rank, device)


@contextmanager
def connected(world: World) -> Any:
    """The process group for the time of a run: NCCL beside gloo on CUDA, gloo on the CPU.

    Under torchrun each restart gets its own key prefix in the agent's store: with the default, stale peer addresses
    of the last attempt hung 3 of 6 recoveries and cost a restart in 2 more.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        yield world
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world.size,
        is_master=not agent_store and world.rank == 0,
        timeout=TIMEOUT,
    )
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"try{attempt}", store), rank=world.rank, world_size=world.size, timeout=TIMEOUT
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one optimizer step of one rank.

    Dropout is then a function of (seed, step, rank) alone, so a resumed run repeats it without any saved generator
    state.
    """
    mixed = (seed * 1_000_003 + step) * 65_537 + rank
    torch.manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)
