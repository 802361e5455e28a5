"""What a model thinks of held-out targets: negative log-likelihood per example, and the classes it prefers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.data.batch import Batch
from trainer.heartbeat import beat
from trainer.model.root import Trainee, logit_softcap

CHUNK = 256  # positions whose logits exist at a time: 128 MiB in fp32 for a vocabulary of 131072


@dataclass
class Likelihoods:
    """Per example, in the order of evaluation: `nll` and `weight` summed over its targets, and the class preferred."""

    ids: list[str] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)  # nats, each target times its weight
    weight: list[float] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)  # the last target's argmax: a classifier has one target
    expected: list[int] = field(default_factory=list)


def read_targets(selected: Tensor, head: nn.Module, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood (targets,) fp32, argmax (targets,)) from hidden states (targets, width).

    The head is applied to `CHUNK` positions at a time, so that the logits of all targets never exist together; the
    normalisation is in fp32 whatever the dtype of the head.
    """
    losses, best = [targets.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0)]
    for start in range(0, len(targets), CHUNK):
        logits = head(selected[start : start + CHUNK]).float()  # (chunk, vocabulary)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        losses.append(functional.cross_entropy(logits, targets[start : start + CHUNK], reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(best)


@torch.no_grad()
def likelihoods(trainee: Trainee, batches: Iterable[Batch], device: torch.device) -> Likelihoods:
    """Likelihoods of this rank's batches. One forward a batch, empty ones too: sharded engines need equal numbers."""
    found = Likelihoods()
    softcap = None if trainee.classifies else logit_softcap(trainee.config)
    for batch in batches:
        beat()
        moved = batch.to(device)
        losses, best = trainee(moved, partial(read_targets, targets=moved.targets, softcap=softcap))
        examples = len(batch.example_ids)
        weights = moved.weights.double()
        sums = torch.zeros(examples, 2, dtype=torch.float64, device=device)  # (examples, nll and weight)
        sums.index_add_(0, moved.target_example, torch.stack([losses.double() * weights, weights], dim=1))
        classes = torch.zeros(examples, 2, dtype=torch.int64, device=device)  # (examples, predicted and expected)
        classes[moved.target_example] = torch.stack([best, moved.targets], dim=1)
        found.ids += batch.example_ids
        for row, (predicted, expected) in zip(sums.tolist(), classes.tolist(), strict=True):
            found.nll.append(row[0])
            found.weight.append(row[1])
            found.predicted.append(predicted)
            found.expected.append(expected)
    return found


def joined(parts: Sequence[Likelihoods], ids: Sequence[str]) -> Likelihoods:
    """The parts of all ranks as one, in the order of `ids`. Raises ValueError where they are of other examples."""
    place = {name: (part, index) for part in parts for index, name in enumerate(part.ids)}
    count = sum(len(part.ids) for part in parts)
    if not count == len(place) == len(ids):
        raise ValueError(f"{count} likelihoods of {len(place)} names for {len(ids)} examples")
    whole = Likelihoods(ids=list(ids))
    for part, index in (place[name] for name in ids):
        whole.nll.append(part.nll[index])
        whole.weight.append(part.weight[index])
        whole.predicted.append(part.predicted[index])
        whole.expected.append(part.expected[index])
    return whole


def corpus_loss(nll: list[float], weight: list[float]) -> float:
    """Mean negative log-likelihood per target in nats: the sum over all targets, by the sum of their weights."""
    return math.fsum(nll) / math.fsum(weight)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that exceeds a float."""
    return math.exp(loss) if loss < 709.0 else loss * math.inf
