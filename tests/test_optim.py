"""Schedules, learning-rate rules and optimizers against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.schema import Batch, Optimizer, ScaleLR, Schedule
from trainer.optim import SHAPES, Lion, Plateau, build_optimizers, decays, lr_factor, scaled_lr, warmup_steps


def factors(total: int, **settings: object) -> list[float]:
    schedule = Schedule.model_validate(settings)
    return [lr_factor(schedule, step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("settings", "total", "expected"),
    [
        ({"name": "constant"}, 3, [1, 1, 1]),
        ({"name": "linear"}, 4, [1, 0.75, 0.5, 0.25]),
        ({"name": "linear", "floor": 0.2}, 4, [1, 0.8, 0.6, 0.4]),
        ({"name": "linear", "warmup": 3}, 7, [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
        ({"name": "linear", "warmup": 0.5}, 4, [1 / 3, 2 / 3, 1, 0.5]),
        ({"name": "cosine"}, 4, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ({"name": "cosine-restarts", "cycles": 2}, 4, [1, 0.5, 1, 0.5]),
        ({"name": "polynomial", "power": 2.0}, 4, [1, 0.5625, 0.25, 0.0625]),
        (
            {"name": "inverse-sqrt", "warmup": 4},
            16,
            [0.2, 0.4, 0.6, 0.8, *(math.sqrt(4 / (s + 1)) for s in range(4, 16))],
        ),
        ({"name": "wsd", "decay": 0.5}, 8, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"name": "plateau", "warmup": 1}, 3, [0.5, 1, 1]),
    ],
)
def test_schedule_values_worked_by_hand(settings: dict[str, object], total: int, expected: list[float]) -> None:
    assert factors(total, **settings) == pytest.approx(expected)


def test_every_name_in_the_schema_has_a_shape() -> None:
    assert set(SHAPES) == set(Schedule.model_fields["name"].annotation.__args__)


@given(
    name=st.sampled_from(sorted(SHAPES)),
    total=st.integers(1, 300),
    warmup=st.one_of(st.floats(0, 0.9), st.integers(1, 400).map(float)),
    floor=st.floats(0, 1),
)
def test_factor_stays_between_zero_and_one_and_above_the_floor(
    name: str, total: int, warmup: float, floor: float
) -> None:
    schedule = Schedule(name=name, warmup=warmup, floor=floor)  # type: ignore[arg-type]
    warm = warmup_steps(warmup, total)
    for step in range(total):
        factor = lr_factor(schedule, step, total)
        assert 0 <= factor <= 1 + 1e-9
        assert step < warm or factor >= floor - 1e-9


@pytest.mark.parametrize(("rule", "expected"), [("none", 1e-3), ("linear", 4e-3), ("sqrt", 2e-3)])
def test_learning_rate_rules(rule: str, expected: float) -> None:
    settings = Optimizer(lr=1e-3, scale_lr=ScaleLR(rule=rule, reference_batch=32))  # type: ignore[arg-type]
    assert scaled_lr(settings, Batch(examples=128)) == pytest.approx(expected)
    assert scaled_lr(settings, Batch(tokens=128)) == pytest.approx(expected)


def test_plateau_cuts_after_patience_and_keeps_the_floor() -> None:
    plateau = Plateau(
        Schedule(name="plateau", factor=0.5, patience=1, threshold=0.1, floor=0.2), higher_is_better=False
    )
    seen = [plateau.observe(value) for value in (10.0, 9.5, 9.2, 8.0, 7.9, 7.8, 7.7, 7.6, 7.5, 7.4)]
    # 9.5 and 9.2 gain less than 10 %: the second is one more than the patience of 1; 8.0 gains; then all are bad again
    assert seen == [False, False, True, False, False, True, False, True, False, True]
    assert plateau.factor == 0.2
    again = Plateau(plateau.settings, higher_is_better=False)
    again.load(plateau.state())
    assert again == plateau


def test_plateau_for_a_metric_where_higher_is_better() -> None:
    plateau = Plateau(Schedule(name="plateau", patience=0, threshold=0.0), higher_is_better=True)
    assert [plateau.observe(v) for v in (0.5, 0.6, 0.6, 0.7)] == [False, False, True, False]


def test_lion_by_hand() -> None:
    # m0 = 0, g = 1: update sign(0.9*0 + 0.1*1) = 1; p = 2*(1 - 0.1*0.5) - 0.1*1 = 1.8; m1 = 0.99*0 + 0.01*1 = 0.01
    # g = -0.05: 0.9*0.01 + 0.1*(-0.05) = 0.004 > 0 -> sign 1; p = 1.8*0.95 - 0.1 = 1.61; m2 = 0.99*0.01 - 0.0005 =
    # 0.0094
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    lion = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    p.grad = torch.tensor([1.0], dtype=torch.float64)
    lion.step()
    assert p.item() == pytest.approx(1.8)
    p.grad = torch.tensor([-0.05], dtype=torch.float64)
    lion.step()
    assert p.item() == pytest.approx(1.61)
    assert lion.state[p]["exp_avg"].item() == pytest.approx(0.0094)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd", "lion", "muon"])
def test_optimizers_reduce_a_quadratic_and_never_decay_vectors(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.ones(8))
    named = [("block.weight", weight), ("norm.weight", bias)]
    shapes = {n: tuple(p.shape) for n, p in named}
    settings = Optimizer(name=name, lr=0.05, weight_decay=0.5)  # type: ignore[arg-type]
    optimizers = build_optimizers(settings, 0.05, named, shapes)
    before = weight.detach().square().sum()
    for _ in range(20):
        weight.grad, bias.grad = weight.detach().clone(), torch.zeros(8)
        for optimizer in optimizers:
            optimizer.step()
    assert weight.detach().square().sum() < 0.5 * before
    assert torch.equal(bias.detach(), torch.ones(8))  # no gradient, no decay: untouched


def test_what_decays() -> None:
    assert decays("layers.0.mlp.up_proj.weight", (4, 4))
    assert not decays("layers.0.mlp.up_proj.bias", (4,))
    assert not decays("norm.weight", (4,))
    assert decays("layers.0.q_proj.lora_A.default.weight", (2, 4))
