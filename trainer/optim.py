"""Parameter groups, optimizers, and learning-rate schedules as pure functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.config.schema import Batch, Optimizer, Schedule

# ---------------------------------------------------------------- learning rate


def scaled_lr(settings: Optimizer, batch: Batch) -> float:
    """The peak learning rate for this global batch.

    linear: lr * B / B_ref (Goyal et al. 2017, sec. 2.1); sqrt: lr * sqrt(B / B_ref) (Krizhevsky 2014; for Adam, Malladi
    et al. 2022). B is in the unit of the recipe's batch, examples or tokens.
    """
    ratio = (batch.examples or batch.tokens or 1) / settings.scale_lr.reference_batch
    factor = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[settings.scale_lr.rule]
    return settings.lr * factor


def warmup_steps(warmup: float, total: int) -> int:
    """Whole steps of warm-up: a share of the total below 1, steps from 1 on."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def lr_factor(settings: Schedule, step: int, total: int) -> float:
    """Factor of the peak learning rate at 0-based `step` of `total`; plateau's cuts are not in it.

    Warm-up is linear from 1/(w+1) so that no step is wasted at zero. After it, with x in [0, 1) the share of the
    remaining
    steps done: linear 1-x, cosine (1+cos(pi x))/2 (Loshchilov & Hutter 2017, eq. 5), polynomial (1-x)^p, inverse-sqrt
    sqrt(w/(t+1)) (Vaswani et al. 2017, sec. 5.3), wsd constant and then linear to the floor (Hu et al. 2024, sec. 4).
    """
    warm = warmup_steps(settings.warmup, total)
    if step < warm:
        return (step + 1) / (warm + 1)
    x = min((step - warm) / max(total - warm, 1), 1.0)
    return settings.floor + (1 - settings.floor) * SHAPES[settings.name](settings, x, step, warm)


def _restarts(settings: Schedule, x: float, step: int, warm: int) -> float:
    inside = math.fmod(x * settings.cycles, 1.0) if x < 1 else 1.0
    return (1 + math.cos(math.pi * inside)) / 2


def _decay_tail(settings: Schedule, x: float, step: int, warm: int) -> float:
    return min(1.0, (1 - x) / settings.decay)


SHAPES: dict[str, Callable[[Schedule, float, int, int], float]] = {
    "constant": lambda settings, x, step, warm: 1.0,
    "plateau": lambda settings, x, step, warm: 1.0,
    "linear": lambda settings, x, step, warm: 1 - x,
    "cosine": lambda settings, x, step, warm: (1 + math.cos(math.pi * x)) / 2,
    "cosine-restarts": _restarts,
    "polynomial": lambda settings, x, step, warm: (1 - x) ** settings.power,
    "inverse-sqrt": lambda settings, x, step, warm: math.sqrt(max(warm, 1) / (step + 1)),
    "wsd": _decay_tail,
}


@dataclass
class Plateau:
    """Cuts the learning rate by `factor` after `patience` evaluations in a row without a relative gain of `threshold`.

    The counter starts anew after a cut, as in torch's ReduceLROnPlateau.
    """

    settings: Schedule
    higher_is_better: bool
    best: float | None = None
    bad: int = 0
    factor: float = 1.0

    def observe(self, value: float) -> bool:
        """Take one evaluated value; returns whether the rate was cut."""
        if math.isfinite(value) and (self.best is None or self._gains(value)):
            self.best, self.bad = value, 0
            return False
        self.bad += 1
        if self.bad <= self.settings.patience:
            return False
        self.bad = 0
        self.factor = max(self.factor * self.settings.factor, self.settings.floor)
        return True

    def _gains(self, value: float) -> bool:
        assert self.best is not None
        margin = self.settings.threshold * abs(self.best)
        return value > self.best + margin if self.higher_is_better else value < self.best - margin

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "bad": self.bad, "factor": self.factor}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.best, self.bad, self.factor = state["best"], state["bad"], state["factor"]


# ---------------------------------------------------------------- optimizers


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, with decoupled decay (Chen et al. 2023, algorithm 2)."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p)}
            moments = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            update = torch._foreach_lerp(grads, moments, beta1)
            torch._foreach_sign_(update)
            torch._foreach_add_(params, update, alpha=-group["lr"])
            torch._foreach_lerp_(moments, grads, 1 - beta2)


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: matrices do; biases, norms and other vectors do not."""
    return len(shape) >= 2 and not name.endswith(".bias")


def parameter_groups(
    named: list[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups, with and without decay; `shapes` are those of the whole parameters, since a shard may be flat."""
    groups = [
        {"params": [p for n, p in named if decays(n, shapes[n])], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, shapes[n])], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizers(
    settings: Optimizer, lr: float, named: list[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> list[torch.optim.Optimizer]:
    """The optimizers over this rank's parameters; more than one only for muon, which leaves vectors and embeddings
    to AdamW."""
    if settings.name == "muon":
        matrices = [(n, p) for n, p in named if len(shapes[n]) == 2 and not _is_table(n)]
        rest = [(n, p) for n, p in named if not (len(shapes[n]) == 2 and not _is_table(n))]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            momentum = 0.95 if settings.momentum is None else settings.momentum
            optimizers.append(
                torch.optim.Muon(
                    [p for _, p in matrices],
                    lr=lr,
                    weight_decay=settings.weight_decay,
                    momentum=momentum,
                    adjust_lr_fn="match_rms_adamw",  # so that one lr serves both optimizers (Liu et al. 2025, sec. 2.2)
                )
            )
        if rest:
            optimizers.append(
                _elementwise(settings, "adamw", lr, parameter_groups(rest, shapes, settings.weight_decay))
            )
        return optimizers
    return [_elementwise(settings, settings.name, lr, parameter_groups(named, shapes, settings.weight_decay))]


def _is_table(name: str) -> bool:
    """Embeddings and output heads: rows are looked up, so orthogonalising them as one matrix makes no sense."""
    return any(part in name for part in ("embed", "lm_head", "score", "classifier"))


def _elementwise(settings: Optimizer, name: str, lr: float, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps, fused=True)
    if name == "adamw8bit":
        import bitsandbytes  # optional and 3 s to import: only for recipes that ask for it

        return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=settings.betas, eps=settings.eps)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum or 0.0, foreach=True)
    return Lion(groups, lr=lr, betas=settings.betas, weight_decay=settings.weight_decay)
