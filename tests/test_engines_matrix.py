"""Every engine, every method, one, two and four ranks against one process; writes `docs/engines-table.md`.

Whole runs from a recipe: 20 steps of AdamW with clipping and accumulation, in fp32. Per-step losses within 1e-5 and
gradient norms within 1e-4, relative; final parameters within 1e-5.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_same_numbers import CUTS, METHODS, Outcome, outcome, recipe_for, run_here
from tiny import next_port, run_ranks

pytestmark = pytest.mark.slow

TABLE = Path(__file__).resolve().parent.parent / "docs" / "engines-table.md"
# The tiny model's parameters are all small enough to stay gathered by DeepSpeed's default.
ZERO = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000},
}
RANKS = {"FSDP2": (2, 4), **dict.fromkeys(ZERO, (1, 2, 4))}
CELLS = [(engine, method, ranks) for engine, sizes in RANKS.items() for method in METHODS for ranks in sizes]
LIMITS = (1e-5, 1e-4, 1e-5)  # losses, norms, parameters


@dataclass(frozen=True)
class Cell:
    """The largest differences of a run from the one process's: relative, relative, absolute."""

    loss: float
    norm: float
    parameter: float


def recipe_of(home: Path, model: Path, data: Path, engine: str, method: str, ranks: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"kind": engine.lower()}
    if engine in ZERO:
        file = home / f"{engine}.json"
        file.write_text(json.dumps({"zero_optimization": ZERO[engine]}))
        settings = {"kind": "deepspeed", "config": str(file)}
    return recipe_for(home / f"{engine}-{method}-{ranks}", model, data, method, CUTS["packed-micro"], engine=settings)


def run_all(rank: int, recipes: list[dict[str, Any]]) -> None:
    for recipe in recipes:
        assert run_here(recipe) == "complete"
        next_port()


def largest(found: Outcome, alone: Outcome) -> Cell:
    assert len(found.losses) == len(alone.losses) == 20
    assert found.parameters.keys() == alone.parameters.keys()
    return Cell(
        max(abs(a / b - 1) for a, b in zip(found.losses, alone.losses, strict=True)),
        max(abs(a / b - 1) for a, b in zip(found.norms, alone.norms, strict=True)),
        max(float((found.parameters[name] - value).abs().max()) for name, value in alone.parameters.items()),
    )


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chats: Path) -> dict[tuple[str, str, int], Cell]:
    """All runs: one process each method, then all engines of one number of ranks in one start of processes."""
    home = tmp_path_factory.mktemp("matrix")
    alone = {}
    for method in METHODS:
        run_here(recipe_of(home, tiny_folder, chats, "single", method, 1))
        alone[method] = outcome(home / f"single-{method}-1")
        assert max(alone[method].norms) > 1.0, "clipping was not at work"
    for ranks in (1, 2, 4):
        mine = [recipe_of(home, tiny_folder, chats, e, m, r) for e, m, r in CELLS if r == ranks]
        run_ranks(ranks, run_all, mine)
    return {(e, m, r): largest(outcome(home / f"{e}-{m}-{r}"), alone[m]) for e, m, r in CELLS}


@pytest.mark.timeout(1800)
def test_the_table(cells: dict[tuple[str, str, int], Cell]) -> None:
    """Written whole even where a cell is out of tolerance: the next test tells which."""
    names = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()}), gloo"
    rows = [
        f"| {engine} | {method} | {ranks} | {cell.loss:.1e} | {cell.norm:.1e} | {cell.parameter:.1e} |"
        for (engine, method, ranks), cell in cells.items()
    ]
    text = f"""# Engines agree

Largest difference of a run from the same recipe in one process without an engine's help (`single`). Written by
`tests/test_engines_matrix.py`, which fails where a cell exceeds its limit.

* Runs: 20 steps of AdamW with warm-up, weight decay, clipping at 1.0 (the norm exceeds it) and label smoothing, six
  packed examples a step in several micro-batches; fp32; a Llama of {tiny_size():,} parameters with tied embeddings.
* Limits: losses {LIMITS[0]:.0e} and gradient norms {LIMITS[1]:.0e}, relative; final parameters {LIMITS[2]:.0e}.
* ZeRO-3 with `stage3_param_persistence_threshold: 0` and several sub groups, so that every parameter is partitioned.
* Device: {device}. {versions}.

| engine | method | ranks | loss | gradient norm | parameters |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    TABLE.write_text(text, encoding="utf-8")
    assert len(rows) == len(CELLS)


def tiny_size() -> int:
    from tiny import tiny_llama

    return sum(parameter.numel() for parameter in tiny_llama().parameters())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("engine", "method", "ranks"), CELLS)
def test_every_cell_is_within_its_limits(
    cells: dict[tuple[str, str, int], Cell], engine: str, method: str, ranks: int
) -> None:
    cell = cells[engine, method, ranks]
    assert (cell.loss <= LIMITS[0], cell.norm <= LIMITS[1], cell.parameter <= LIMITS[2]) == (True, True, True), cell
