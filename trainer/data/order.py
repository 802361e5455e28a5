"""Which example comes next: epochs shuffled by counter-based randomness, sources mixed by largest deficit.

Everything here is a function of seed and position alone, never of ranks or of what ran before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Protocol

import numpy as np


class Order(Protocol):
    """A stream of (source, example) draws that can be entered at any position.

    A curriculum or a replay buffer is another Order: it may choose otherwise, as long as the choice depends on
    ``drawn`` (and its own constants) alone, so that a resumed run and any number of ranks see the same stream.
    """

    names: tuple[str, ...]

    def block(self, drawn: Mapping[str, int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next ``count`` draws after ``drawn`` (draws per source so far).

        Returns (source (count,) int32 as index into `names`, example (count,) int64 within that source).
        """
        ...

    def total(self, epochs: float) -> int:
        """How many draws make up so many epochs."""
        ...


@lru_cache(maxsize=8)
def permutation(seed: int, stage: int, source: str, epoch: int, size: int) -> np.ndarray:
    """(size,) int64: the order of one source in one epoch.

    Sorted by raw Philox words (Salmon et al. 2011), whose stream NumPy promises to keep; `Generator.permutation` has
    no such promise.
    """
    words = hashlib.sha256(f"{seed}/{stage}/{source}/{epoch}".encode()).digest()
    key = np.frombuffer(words[:16], dtype="<u8")
    order = np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
    order.setflags(write=False)
    return order


class MixtureOrder:
    """Sources in fixed proportion in every stretch of the stream, each shuffled anew in each of its epochs."""

    def __init__(self, sizes: Mapping[str, int], mixture: Mapping[str, float], seed: int, stage: int) -> None:
        self.names = tuple(sorted(mixture))
        self.sizes = {name: sizes[name] for name in self.names}
        self.seed, self.stage = seed, stage
        # Weights as written in decimal, brought to whole numbers: proportions are exact and ties are real ties.
        parts = [Fraction(str(mixture[name])) for name in self.names]
        scale = lcm(*(part.denominator for part in parts))
        self.shares = [int(part * scale) for part in parts]

    def total(self, epochs: float) -> int:
        """Draws in ``epochs`` passes over the source with the largest weight (ties: the first by name)."""
        largest = max(range(len(self.names)), key=lambda index: (self.shares[index], -index))
        passes = Fraction(str(epochs)) * self.sizes[self.names[largest]] * sum(self.shares)
        return max(1, round(passes / self.shares[largest]))

    def block(self, drawn: Mapping[str, int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Order`."""
        sources = self._sources(drawn, count)
        examples = np.empty(count, np.int64)
        for index, name in enumerate(self.names):
            here = np.flatnonzero(sources == index)
            examples[here] = self._examples(name, drawn.get(name, 0), len(here))
        return sources, examples

    def _sources(self, drawn: Mapping[str, int], count: int) -> np.ndarray:
        """Each draw goes to the source furthest behind its share (largest deficit; ties: the first by name)."""
        if len(self.names) == 1:
            return np.zeros(count, np.int32)
        whole = sum(self.shares)
        so_far = [drawn.get(name, 0) for name in self.names]
        position = sum(so_far)
        deficits = [share * position - taken * whole for share, taken in zip(self.shares, so_far, strict=True)]
        sources = np.empty(count, np.int32)
        for place in range(count):
            deficits = [deficit + share for deficit, share in zip(deficits, self.shares, strict=True)]
            chosen = deficits.index(max(deficits))
            deficits[chosen] -= whole
            sources[place] = chosen
        return sources

    def _examples(self, name: str, start: int, count: int) -> np.ndarray:
        size, pieces = self.sizes[name], []
        while count > 0:
            epoch, offset = divmod(start, size)
            piece = permutation(self.seed, self.stage, name, epoch, size)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
