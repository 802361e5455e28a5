"""Small real engines for the checkpoint's tests: one over whole parameters, one over slices of a flat partition."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint import load, save
from trainer.config.schema import Optimizer
from trainer.engine.base import Piece, Slot
from trainer.engine.single import SingleEngine
from trainer.fault import FAIL_POINT
from trainer.world import World

SHAPES: dict[str, tuple[int, ...]] = {
    "body.weight": (6, 5),
    "body.bias": (6,),
    "norm": (1,),
    "scale": (),
    "head": (3, 6),
}


class Net(nn.Module):
    """Matrices, vectors, one element, no dimension at all, and a parameter that the first steps do not use."""

    def __init__(self, width: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(width, 6)
        self.norm = nn.Parameter(torch.rand(1) + 0.5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor, use_head: bool) -> Tensor:
        hidden = torch.tanh(self.body(x)) * self.norm * self.scale
        return (hidden @ self.head.T).square().sum() if use_head else hidden.square().sum()


def single(seed: int = 0, optimizer: str = "adamw", width: int = 5, **options: Any) -> SingleEngine:
    """A new single-process engine over `Net`."""
    return SingleEngine(Net(width, seed), Optimizer(name=optimizer, lr=0.05, **options), 0.05, World())  # type: ignore[arg-type]


def train(engine: SingleEngine, steps: int, first: int = 0, head_from: int = 2) -> list[float]:
    """Optimizer steps on data drawn from the step's number; `head` gets gradients from step `head_from` on."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        loss = engine.model(torch.randn(4, engine.model.body.in_features, generator=generator), step >= head_from)
        engine.backward(loss, last=True)
        engine.step(1.0, pull=lambda slots: None)
        losses.append(loss.item())
    return losses


class FlatEngine:
    """All parameters in one flat partition, cut evenly over the ranks with padding at the tail, as ZeRO does it."""

    def __init__(self, world: World, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        self.world, self.shapes = world, shapes
        total = sum(math.prod(shape) for shape in shapes.values())
        part = math.ceil(total / world.size)
        low, high = world.rank * part, (world.rank + 1) * part
        pieces, offset = [], 0
        values = torch.randn(part * world.size, generator=torch.Generator().manual_seed(seed))
        for name, shape in shapes.items():
            numel = math.prod(shape)
            first, last = max(offset, low), min(offset + numel, high)
            if first < last:
                pieces.append(Piece(name, first - offset, last - first, first - low, shape))
            offset += numel
        self.pieces = tuple(pieces)
        self.master = nn.Parameter(values[low:high].clone())
        self.optimizer = torch.optim.AdamW([self.master], lr=0.05)
        self.loads = 0

    def train(self, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step * 1009 + self.world.rank)  # ranks may be threads
            self.master.grad = torch.randn(self.master.shape, generator=generator)
            self.optimizer.step()

    def slots(self) -> Iterator[Slot]:
        yield Slot(self.master, self.pieces, self.optimizer.state[self.master])

    def writes(self, slot: Slot) -> bool:
        return True

    def prepare_state(self) -> None:
        zeros = torch.zeros_like(self.master)
        self.optimizer.state[self.master] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def after_load(self) -> None:
        self.loads += 1


def logical(engines: list[Any]) -> dict[str, Any]:
    """Every logical tensor and counter of all ranks, assembled: `kind/name` -> SHA-256, `counters/name` -> dict."""
    tensors: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    for engine in engines:
        for slot in engine.slots():
            for piece in slot.pieces:
                scalars = {k: float(v) for k, v in slot.state.items() if not isinstance(v, Tensor) or v.dim() == 0}
                assert found.setdefault(f"counters/{piece.name}", scalars) == scalars
                kinds = {k: slot.moment(k, piece) for k, v in slot.state.items() if isinstance(v, Tensor) and v.dim()}
                for kind, view in {"param": slot.value(piece), **kinds}.items():
                    if view.dtype == torch.uint8 or view.numel() != piece.numel:
                        view = slot.state[kind].view(-1)  # type: ignore[union-attr]
                        tensors[f"{kind}/{piece.name}"] = view
                        continue
                    whole = tensors.setdefault(
                        f"{kind}/{piece.name}", torch.full((math.prod(piece.shape),), math.nan, dtype=view.dtype)
                    )
                    whole[piece.start : piece.start + piece.numel] = view
    for key, tensor in tensors.items():
        found[key] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


@dataclass(frozen=True)
class ThreadWorld(World):
    """Ranks as threads of one process: the same calls in the same order, or a broken barrier after 10 s."""

    shared: dict[int, str] = field(default_factory=dict)
    meet: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    beside: tuple[dict[int, str], threading.Barrier] | None = None  # for the threads of the ranks

    def apart(self) -> World:
        assert self.beside is not None
        return replace(self, shared=self.beside[0], meet=self.beside[1], beside=None)

    def _reduce(self, values: list[float], operation: Any) -> list[float]:
        rows = self.gather(values)
        combine: Callable[[Any], float] = {"MAX": max, "SUM": sum}[operation.name]
        return [combine(column) for column in zip(*rows, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = json.dumps(value)
        self.meet.wait(10)
        rows = [json.loads(self.shared[rank]) for rank in range(self.size)]
        self.meet.wait(10)
        return rows


def in_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    """`work(world)` on `size` ranks; each rank's result, or its exception."""
    shared: dict[int, str] = {}
    meet = threading.Barrier(size)
    beside: tuple[dict[int, str], threading.Barrier] = ({}, threading.Barrier(size))
    results: list[Any] = [None] * size

    def body(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank, size, shared=shared, meet=meet, beside=beside))
        except Exception as error:  # noqa: BLE001  returned to the test, which looks at it
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def ok(results: list[Any]) -> list[Any]:
    """The results, none of which may be an exception."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def checkpoints(folder: Path, *steps: int) -> SingleEngine:
    """An engine trained to the last step, with a checkpoint at each."""
    engine, done = single(), 0
    for step in steps:
        train(engine, step - done, done)
        save(folder, step, engine, World(), {"position": step})
        done = step
    return engine


def save_flat(folder: Path, step: int, world: World) -> Path:
    """A checkpoint of a flat engine after one step."""
    engine = FlatEngine(world, seed=step)
    engine.train(1)
    return save(folder, step, engine, world, {"position": step})


def resume_and_save(folder: Path, step: int) -> None:
    """Go on from the newest good checkpoint to `step` and save: what the tests kill halfway."""
    engine = single(seed=9)
    loaded = load(folder, engine, World())
    train(engine, step - loaded.step, loaded.step)
    save(folder, step, engine, World(), {"position": step}, keep=2)


def main(folders: list[str]) -> None:
    """For each folder, named after a fail point, `resume_and_save` in a child of its own; prints how it ended."""
    train(single(), 1)  # imports what an optimizer's first step imports, once for all children
    for folder in folders:
        child = os.fork()
        if child == 0:
            os.environ[FAIL_POINT] = Path(folder).name
            resume_and_save(Path(folder), 6)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
