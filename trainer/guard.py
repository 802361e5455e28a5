"""What watches the numbers of a run: steps without a finite gradient, loss spikes, copies that differ between ranks."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trainer.config.schema import Spike
from trainer.engine.base import Engine, flat
from trainer.world import World

FEWEST = 8  # losses before anything is called a spike
IN_A_ROW = 3  # spikes after which the loss is taken for a new level: a change of data, no accident
MAD_TO_DEVIATION = 1.4826  # of a normal distribution (Rousseeuw & Croux 1993, sec. 1)
LEAST_SPREAD = 0.01  # of the median: losses that hardly differ would make every move a spike


class SpikeWatch:
    """Calls a loss a spike that lies more than `deviations` robust deviations above the median of the last `window`.

    Median and median absolute deviation, so that a spike neither hides nor poisons the yardstick; spikes do not enter
    the window. The losses are those of whole global steps, so every rank judges alike.
    """

    def __init__(self, settings: Spike) -> None:
        self.policy, self.deviations = settings.policy, settings.deviations
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.in_a_row = 0

    @property
    def forbids(self) -> bool:
        """Whether a spike's update is left out."""
        return self.policy in ("skip", "rollback")

    def judge(self, loss: float) -> bool:
        """Take the loss of one step; True where it is a spike. One that is not finite is the gradient's to refuse."""
        if not math.isfinite(loss):
            return False
        if len(self.losses) >= FEWEST and loss > self.limit():
            self.in_a_row += 1
            if self.in_a_row < IN_A_ROW:
                return True
            self.losses.clear()  # a new level
        self.in_a_row = 0
        self.losses.append(loss)
        return False

    def limit(self) -> float:
        """The highest loss that is no spike."""
        return spike_limit(self.losses, self.deviations)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self.losses), "in_a_row": self.in_a_row}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.in_a_row = int(state["in_a_row"])


class NoSpikeWatch(SpikeWatch):
    """The absent watch: calls nothing a spike."""

    def __init__(self) -> None:
        super().__init__(Spike())

    def judge(self, loss: float) -> bool:
        """No loss is a spike."""
        return False


def spike_limit(losses: Iterable[float], deviations: float) -> float:
    """median + deviations * 1.4826 * MAD, the spread no less than a hundredth of the median."""
    values = list(losses)
    middle = median(values)
    spread = MAD_TO_DEVIATION * median(abs(value - middle) for value in values)
    return middle + deviations * max(spread, LEAST_SPREAD * abs(middle))


def differing_copies(engine: Engine, world: World) -> dict[str, list[int]]:
    """{parameter: the ranks whose copy of it differs}; empty where all agree. Every rank calls it, and gets the same.

    The truth is the master that an owner's optimizer steps, where one exists apart from the copies (ZeRO); else what
    most ranks hold. Of two copies without a master nobody can say which is right, and both are named.
    """
    held = {replica.name: (replica.ranks, replica.tensor) for replica in engine.replicas()}
    rows = world.gather({name: [list(ranks), digest(tensor)] for name, (ranks, tensor) in held.items()})
    suspects: list[str] = []
    for name in sorted({name for row in rows for name in row}):
        groups: dict[tuple[int, ...], set[str]] = {}
        for ranks, found in (row[name] for row in rows if name in row):
            groups.setdefault(tuple(ranks), set()).add(found)
        if any(len(digests) > 1 for digests in groups.values()):
            suspects.append(name)
    if not suspects:
        return {}
    wrong = world.gather(_against_masters(engine, world, {name: held[name][1] for name in suspects if name in held}))
    odd = {}
    for name in suspects:
        ranks = [rank for rank, names in enumerate(wrong) if name in names]
        odd[name] = ranks or odd_ones({rank: row[name][1] for rank, row in enumerate(rows) if name in row})
    return odd


def _against_masters(engine: Engine, world: World, copies: Mapping[str, Tensor]) -> list[str]:
    """The suspect parameters in which this rank's copy differs from their owners' masters."""
    own = [
        [piece.name, piece.start, piece.numel, digest(slot.value(piece).to(copies[piece.name].dtype))]
        for slot in engine.slots()
        for piece in slot.pieces
        if piece.name in copies and not _shares(slot.owner, copies[piece.name])
    ]
    wrong = set()
    for name, start, numel, truth in (item for row in world.gather(own) for item in row):
        if name in copies and digest(flat(copies[name])[start : start + numel]) != truth:
            wrong.add(name)
    return sorted(wrong)


def _shares(owner: Tensor, copy: Tensor) -> bool:
    """Whether the optimizer steps the copy itself: then there is no master beside it."""
    return flat(owner).untyped_storage().data_ptr() == flat(copy).untyped_storage().data_ptr()


def digest(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's values."""
    raw = flat(tensor).cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def odd_ones(digests: Mapping[int, str]) -> list[int]:
    """The ranks whose digest is not the majority's; all of them where there is no majority."""
    (most, count), *_ = Counter(digests.values()).most_common(1)
    if count * 2 <= len(digests):
        return sorted(digests)
    return sorted(rank for rank, found in digests.items() if found != most)
