"""Forwards that prove, once a model is in its engine's hands, that it computes what the recipe says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import Recipe, UserError
from trainer.model.dropout import verify_dropout
from trainer.model.root import Trainee, logit_softcap


def verify_trainee(trainee: Trainee, recipe: Recipe) -> None:
    """Raise UserError where the model does more than its head, or ignores the recipe's dropout.

    Called on every rank after the engine has put sharding on: the forwards run inside the root's, where weights are
    gathered. The mode of every module and the random state stay as they were.
    """
    trainee.within_forward(lambda: verify_head(trainee))
    trainee.within_forward(lambda: verify_dropout(trainee.base, recipe.model, torch.device(trainee.device_type)))


@torch.no_grad()
def verify_head(trainee: Trainee, tolerance: float = 1e-2) -> None:
    """Check on one probe that head(hidden) gives the network's own logits; raises UserError where the model does more.

    Models exist that scale logits after the head (Cohere, Granite); training them through the bare head would be
    wrong in silence.
    """
    if trainee.encoder:
        return
    device = torch.device(trainee.device_type)
    ids = torch.arange(1, 9, device=device)[None] % trainee.config.get_text_config().vocab_size
    positions = torch.arange(8, device=device)[None]
    with _evaluating(trainee):
        backbone = getattr(trainee.base, trainee.base.base_model_prefix)
        hidden = backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        logits = trainee.head(hidden).float()
        cap = logit_softcap(trainee.config)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        expected = trainee.base(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    logits = logits[:, -1] if expected.dim() == 2 else logits
    difference = (logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not difference <= tolerance:
        raise UserError(
            f"model.path: {trainee.config.name_or_path}: applies more than its head to the last hidden state "
            f"(relative difference {float(difference):.1e}); this model family is not supported yet"
        )


@contextmanager
def _evaluating(trainee: Trainee) -> Iterator[None]:
    was_training = trainee.training
    trainee.eval()
    try:
        yield
    finally:
        trainee.train(was_training)
