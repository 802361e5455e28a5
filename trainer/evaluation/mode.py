"""The state of a model while it is looked at and not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.model.root import Trainee


@contextmanager
def evaluating(trainee: Trainee) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode and every random state are as before afterwards.

    no_grad and not inference_mode: FSDP2 keeps gathered weights from one forward to the next, and inference tensors
    among them could not be saved for the next backward.
    """
    modes = [(module, module.training) for module in trainee.modules()]
    devices = [torch.cuda.current_device()] if trainee.device_type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        trainee.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
