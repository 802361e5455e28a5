"""Two finished runs side by side: their last evaluations, paired by example id."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import UserError
from trainer.evaluation.results import latest_results
from trainer.evaluation.verdicts import verdict

log = logging.getLogger(__name__)


def compare(
    run_a: Path, run_b: Path, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each suite and metric that both runs have, by name of suite.

    A row is the verdict's fields (`baseline` is A, `candidate` is B, so `better` says whether B is) with `suite`,
    `direction`, `step_a` and `step_b`. A suite that only one run has is logged and left out. Raises UserError where a
    run has no evaluation, none is common, or the examples differ.
    """
    first, second = latest_results(run_a), latest_results(run_b)
    shared = [suite for suite in first if suite in second]
    if not shared:
        raise UserError(
            f"{run_b}: has none of the suites {', '.join(first)} of {run_a}; evaluate both with the same ones"
        )
    for suite in sorted(set(first) ^ set(second)):
        log.warning("suite %s: only %s has it; not compared", suite, run_a if suite in first else run_b)
    rows = []
    for suite in shared:
        a, b = first[suite], second[suite]
        for found in verdict(a, b, confidence, resamples, seed):
            place = {"suite": suite, "direction": b["directions"][found.metric]}
            rows.append(place | {"step_a": a["step"], "step_b": b["step"]} | asdict(found))
    return rows


def table(rows: Sequence[Mapping[str, Any]], name_a: str = "A", name_b: str = "B") -> str:
    """The rows of `compare` as plain text for the terminal; the arrow says which way the metric is better."""
    from rich.console import Console  # 60 ms with the table, and only who prints needs it
    from rich.table import Table

    drawn = Table(title=f"{name_b} against {name_a}")
    for column in ("suite", "metric"):
        drawn.add_column(column, overflow="fold")
    for column in (name_a, name_b, "difference", "interval", "p", "n"):
        drawn.add_column(column, justify="right")
    drawn.add_column("verdict")
    outcome = {True: f"{name_b} better", False: f"{name_b} worse", None: "undecided"}
    for row in rows:
        drawn.add_row(
            row["suite"],
            f"{row['metric']} {'↑' if row['direction'] == 'higher' else '↓'}",
            f"{row['baseline']:.4g}",
            f"{row['candidate']:.4g}",
            f"{row['difference']:+.4g}",
            f"{row['low']:+.4g} .. {row['high']:+.4g}",
            f"{row['p_value']:.2g}",
            str(row["n"]),
            outcome[row["better"]],
        )
    text = io.StringIO()
    Console(file=text, width=max(120, shutil.get_terminal_size((120, 40)).columns), no_color=True).print(drawn)
    return text.getvalue()
