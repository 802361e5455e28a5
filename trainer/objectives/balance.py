"""From summed losses per task to the one scalar of the backward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def per_target(terms: Mapping[str, Tensor], counts: Mapping[str, float]) -> Tensor:
    """The mean loss per target over all tasks: sum of all terms / sum of all counts. The step's only division.

    `counts` are summed over all ranks and micro-batches of the step, so that accumulation, packing and uneven ranks
    leave
    the gradient that of one large batch.
    """
    total = sum(counts.values())
    return torch.stack([term.float() for term in terms.values()]).sum() / max(total, 1e-12)
