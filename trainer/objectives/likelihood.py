"""Likelihood of the targets: next tokens of language models, classes of classifiers."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.config.schema import Objective
from trainer.data.batch import Batch
from trainer.kernels import linear_cross_entropy
from trainer.model.root import Trainee, logit_softcap


class Terms(NamedTuple):
    """Sums over this micro-batch's targets of one task; `nll` and `correct` are detached, for the record."""

    loss: Tensor  # weighted, smoothed: what is minimised
    nll: Tensor  # weighted, unsmoothed
    correct: Tensor  # targets that the argmax gets right


def read_likelihood(
    selected: Tensor,
    head: nn.Module,
    batch: Batch,
    smoothing: float,
    softcap: float | None,
    class_weights: Tensor | None,
) -> dict[str, Terms]:
    """{task: sums} from the selected hidden states (targets, width); logits are made a chunk at a time.

    loss = sum_i w_i [(1 - s) nll_i + s mean_v(-log p_iv)], the smoothing of Szegedy et al. 2016 (sec. 7). With class
    weights w_i is multiplied by the weight of target i's class.
    """
    weights = batch.weights if class_weights is None else batch.weights * class_weights[batch.targets]
    terms = {}
    for index, task in enumerate(batch.tasks):
        mine = weights if len(batch.tasks) == 1 else weights * (batch.target_task == index)
        terms[task] = Terms(*head_cross_entropy(selected, head, batch.targets, mine, smoothing, softcap))
    return terms


def head_cross_entropy(
    selected: Tensor, head: nn.Module, targets: Tensor, weights: Tensor, smoothing: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, correct) through any head: a plain linear layer is fused with the loss, another is called first."""
    if type(head) is nn.Linear:
        return linear_cross_entropy(
            selected, head.weight, targets, weights, label_smoothing=smoothing, bias=head.bias, softcap=softcap
        )
    logits = head(selected).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)
    nll = -logp.gather(1, targets[:, None])[:, 0]
    loss = (weights * ((1 - smoothing) * nll - smoothing * logp.mean(-1))).sum()
    correct = ((logits.argmax(-1) == targets) & (weights > 0)).sum()
    return loss, (weights * nll).sum().detach(), correct.detach()


class Likelihood:
    """supervised, language-modeling and classification: which positions are targets was decided when data were
    prepared."""

    def __init__(self, settings: Objective) -> None:
        self.smoothing = settings.label_smoothing
        self.class_weights = settings.class_weights

    def __call__(self, model: Trainee, batch: Batch) -> dict[str, Terms]:
        """{task: sums} of one micro-batch."""
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, device=batch.ids.device)
        readout = partial(
            read_likelihood,
            batch=batch,
            smoothing=self.smoothing,
            softcap=logit_softcap(model.config) if not model.classifies else None,
            class_weights=weights,
        )
        return model(batch, readout)
