"""What a run learned, tensor by tensor: the trained parameters of a verified checkpoint, without engine or model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.ranges import PARAMETER
from trainer.checkpoint.reader import Reader
from trainer.config.errors import UserError

EMA = "ema"  # the kind of the averages that training keeps, beside `param`


class Source(Protocol):
    """Named whole tensors, read one at a time: a checkpoint's, or an average of several."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape by the name that the trainee gives its parameter."""

    def read(self, name: str) -> Tensor:
        """A fresh tensor with the values, in the dtype they were saved in."""


class Weights:
    """The tensors of one kind (`param`, `ema`) of a verified checkpoint, whatever ranks and engine wrote it."""

    def __init__(self, reader: Reader, kind: str = PARAMETER) -> None:
        """Raises UserError where the checkpoint holds no tensors of this kind."""
        self.path, self.kind, self.step = reader.folder, kind, reader.manifest.step
        self.state: dict[str, Any] = reader.manifest.state
        self._reader = reader
        names = reader.names(kind)
        if kind == EMA and not names:
            raise UserError(f"--ema: {self.path}: holds no averaged weights; train with `ema.decay` to have them")
        if odd := set(names) ^ set(reader.names(PARAMETER)):
            raise CheckpointError(f"{self.path}: {min(odd)}: of `{kind}` and `{PARAMETER}` only one is there")
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(reader.tensors[kind, name].shape) for name in names}

    def read(self, name: str) -> Tensor:
        """The whole tensor. Raises CheckpointError where its files vanished meanwhile (retention of a live run)."""
        try:
            with self._reader as reader:  # no file stays open between tensors: an average reads many checkpoints
                return reader.tensor(self.kind, name)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: removed while it was read: choose another step") from error


@torch.no_grad()
def fill(model: nn.Module, source: Source) -> None:
    """Write a source into a model's trainable parameters, in the dtype and on the device where they are.

    Raises UserError where names or shapes are not those of the source.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_shapes({name: tuple(parameter.shape) for name, parameter in trainable.items()}, source.shapes)
    for name, parameter in trainable.items():
        parameter.copy_(source.read(name))


def check_shapes(model: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError that names the first parameters in which a model and what was saved differ."""
    names = sorted(name for name in model.keys() | saved.keys() if model.get(name) != saved.get(name))
    if names:
        shown = "; ".join(
            f"{name}: saved {saved.get(name, 'not')}, model {model.get(name, 'not')}" for name in names[:3]
        )
        raise UserError(
            f"tuning: {len(names)} parameters differ from what was saved: {shown}: use the recipe of the run"
        )
