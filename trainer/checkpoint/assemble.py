"""The tensors of an exported model, each made from its frozen value and what was learned, when its turn comes."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.checkpoint.base import Base, Layout
from trainer.checkpoint.merge import Learned, change, learned
from trainer.checkpoint.tensor_files import Planned
from trainer.checkpoint.weights import Source
from trainer.config.errors import UserError


class Assembly:
    """What a merged model consists of: which tensors, and how each comes about.

    A weight with a low-rank change is base + s B A in fp32, rounded to the exported dtype once. Tensors that are tied
    in the model stay one, unless an adapter changed one name of them alone: then they are two, and `unties`.
    """

    def __init__(self, layout: Layout, source: Source, scale: float, dtype: torch.dtype) -> None:
        """Raises UserError where something learned belongs to no tensor of the model."""
        self.layout, self.source, self.scale, self.dtype = layout, source, scale, dtype
        self.learned = _under_every_name(learned(source.shapes), layout)
        self.split = {name for name in layout.tied if self._apart(name)}
        self.names = [*layout.tensors, *sorted(self.split)]
        touched = self.learned.whole.keys() | self.learned.low_rank.keys()
        if unknown := touched - layout.tensors.keys() - layout.tied.keys():
            raise UserError(f"model.path: has no {min(unknown)}, which this run trained: restore the run's base model")

    @property
    def unties(self) -> bool:
        """Whether tensors that were one became two."""
        return bool(self.split)

    @property
    def needed(self) -> list[str]:
        """The tensors whose frozen value is asked for."""
        return sorted({self._kept(name) for name in self.names if name not in self.learned.whole})

    @property
    def planned(self) -> list[Planned]:
        """Every tensor to write, before any is made."""
        return [Planned(name, self._dtype(name), self.layout.tensors[self._kept(name)].shape) for name in self.names]

    def make(self, name: str, base: Base) -> Tensor:
        """One tensor as it is written; frozen values come from `base`."""
        if name in self.learned.whole:
            return self.source.read(self.learned.whole[name]).to(self._dtype(name))
        value = base.read(self._kept(name))
        if name in self.learned.low_rank:
            factors = self.learned.low_rank[name]
            transposed = factors.embedding or self.layout.tensors[self._kept(name)].transposed
            down, up = self.source.read(factors.down).float(), self.source.read(factors.up).float()
            value = change(down, up, self.scale, transposed).add_(value.float())
        return value.to(self._dtype(name))

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.layout.tensors[self._kept(name)].dtype
        return self.dtype if dtype.is_floating_point else dtype

    def _kept(self, name: str) -> str:
        return self.layout.tied.get(name, name)

    def _apart(self, name: str) -> bool:
        """Whether a tied name and the kept one are no longer the same."""
        mine, kept = ((self.learned.whole.get(n), self.learned.low_rank.get(n)) for n in (name, self.layout.tied[name]))
        return mine != kept


def _under_every_name(found: Learned, layout: Layout) -> Learned:
    """A parameter of the model itself, trained under one of its tied names, as what all of them become."""
    if found.adapted:
        return found
    whole = dict(found.whole)
    for name, parameter in found.whole.items():
        kept = layout.tied.get(name, name)
        whole |= {other: parameter for other in (kept, *layout.tied) if layout.tied.get(other, other) == kept}
    return Learned(whole, found.low_rank, found.adapted)
