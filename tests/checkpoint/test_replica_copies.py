"""Copies of one tensor on several ranks: one flipped bit is seen, and the rank that holds it named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checkpoint_cases import in_threads, ok
from torch import Tensor

from trainer.engine.base import Piece, Replica, Slot
from trainer.guard import differing_copies


@dataclass
class Copies:
    """What differing_copies asks of an engine: low-precision copies on every rank, masters cut over the ranks."""

    rank: int
    size: int
    copy: Tensor
    master: Tensor | None

    def replicas(self) -> Iterator[Replica]:
        yield Replica("w", self.copy, tuple(range(self.size)))

    def slots(self) -> Iterator[Slot]:
        if self.master is None:
            yield Slot(self.copy, (Piece("w", 0, self.copy.numel(), 0, tuple(self.copy.shape)),), {})
            return
        part = self.master.numel() // self.size
        mine = self.master[self.rank * part : (self.rank + 1) * part].clone()
        yield Slot(mine, (Piece("w", self.rank * part, part, 0, tuple(self.copy.shape)),), {})


@pytest.mark.parametrize(("masters", "size", "expected"), [(True, 2, [1]), (False, 2, [0, 1]), (False, 3, [1])])
def test_one_flipped_bit_names_its_rank(masters: bool, size: int, expected: list[int]) -> None:
    master = torch.randn(24, generator=torch.Generator().manual_seed(3))

    def check(world: Any, flip: bool) -> dict[str, list[int]]:
        copy = master.to(torch.bfloat16).view(4, 6).clone()
        if flip and world.rank == 1:
            copy.view(torch.int16)[0, 1] ^= 1  # in a range that rank 0 owns
        return differing_copies(Copies(world.rank, size, copy, master if masters else None), world)  # type: ignore[arg-type]

    assert ok(in_threads(size, lambda world: check(world, False))) == [{}] * size
    assert ok(in_threads(size, lambda world: check(world, True))) == [{"w": expected}] * size
