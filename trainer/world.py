"""The processes of a run: ranks, device, sums over ranks, seeds."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.heartbeat import collective
from trainer.launched import STORE

log = logging.getLogger(__name__)

# A dead peer ends a collective of gloo at once: its connection breaks. This is for a peer that lives and is silent
# where no supervisor looks for it: no less than the longest save or evaluation that one rank alone may be busy with.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among its peers. In one process every collective is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None  # of its collectives; None: the one that training uses

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def apart(self) -> World:
        """The same ranks over connections of their own, for a thread beside the training. Every rank calls it.

        A rank that dies breaks its connections; one that is slow is waited for, whatever the disk takes.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
        return replace(self, device=torch.device("cpu"), group=group)

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
        with collective("all_reduce"):
            dist.all_reduce(tensor, op=operation, group=self.group)
            return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every rank, in rank order, on every rank. JSON, not pickle: peers cannot run code here."""
        if self.size == 1:
            return [value]
        with collective("gather"):
            return self._gather(value)

    def _gather(self, value: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()], device=self.device), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        rows = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self.group)
        return [json.loads(row[: int(size)].cpu().numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with collective("barrier"):
                dist.barrier(group=self.group)


def environment_world() -> World:
    """Rank, size and device as the launcher's environment says; opens no connection."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), local_rank, device)


@contextmanager
def connected(world: World, *, alone: bool = False) -> Any:
    """The process group for the time of a run: NCCL beside gloo on CUDA, gloo on the CPU.

    One process has none, unless `alone` asks for a group of its own: DeepSpeed wants one.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1 and not alone:
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    store = dist.HashStore() if world.size == 1 else _rendezvous(world)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _rendezvous(world: World) -> dist.Store:
    """The store where the ranks meet, as the launcher's environment says.

    Under torchrun each restart gets its own key prefix in the agent's store: with the default, stale peer addresses
    of the last attempt hung 3 of 6 recoveries and cost a restart in 2 more.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world.size,
        is_master=not agent_store and world.rank == 0,
        timeout=TIMEOUT,
        master_listen_fd=int(os.environ[STORE]) if STORE in os.environ and world.rank == 0 else None,
    )
    return dist.PrefixStore(f"try{attempt}", store)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one optimizer step of one rank.

    Dropout is then a function of (seed, step, rank) alone, so a resumed run repeats it without any saved generator
    state.
    """
    mixed = (seed * 1_000_003 + step) * 65_537 + rank
    torch.manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)
