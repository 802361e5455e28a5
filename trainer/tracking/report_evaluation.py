"""What the report takes from ``evaluation/``: run against base, suite by suite, and the examples that tell most."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_RUN_FILE = re.compile(r"(?P<suite>.+)-step-(?P<step>\d+)\.json")
_MOST_EXAMPLES = 5  # of each group
_MOST_CHARACTERS = 1200  # of a prompt or an answer


@dataclass
class Evaluation:
    """A suite's last evaluation of the run, and the baseline's where there is one."""

    suite: str
    run: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)


def read_evaluations(run_folder: Path) -> tuple[list[Evaluation], list[str]]:
    """The evaluation of each suite at its last step, by suite name, and a sentence for each file that is unreadable."""
    last: dict[str, tuple[int, Path]] = {}
    for path in sorted((run_folder / "evaluation").glob("*.json")):
        match = _RUN_FILE.fullmatch(path.name)
        if match and int(match["step"]) >= last.get(match["suite"], (-1, path))[0]:
            last[match["suite"]] = (int(match["step"]), path)
    found, problems = [], []
    for suite, (_, path) in sorted(last.items()):
        base_path = path.with_name(f"{suite}-base.json")
        try:
            run = _read(path)
            base = _read(base_path) if base_path.exists() else {}
        except (OSError, ValueError) as error:
            problems.append(f"{path.name} or its base: not readable as an evaluation ({error})")
            continue
        found.append(Evaluation(str(run.get("suite") or suite), run, base))
    return found, problems


def compare(evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """A row for each suite and metric: base, run, difference, interval, p-value and the verdict in words.

    Where no test was made the interval is None and ``verdict`` says so.
    """
    rows: list[dict[str, Any]] = []
    for evaluation in evaluations:
        verdicts = {str(verdict.get("metric")): verdict for verdict in evaluation.run.get("verdicts") or []}
        before, after = evaluation.base.get("metrics") or {}, evaluation.run.get("metrics") or {}
        for metric in dict.fromkeys([*verdicts, *after]):
            verdict = verdicts.get(metric, {})
            base = verdict.get("baseline", before.get(metric))
            run = verdict.get("candidate", after.get(metric))
            difference = verdict.get("difference", run - base if _both_numbers(run, base) else None)
            rows.append(
                {
                    "place": len(rows), "suite": evaluation.suite, "kind": evaluation.run.get("kind"), "metric": metric,
                    "direction": (evaluation.run.get("directions") or {}).get(metric), "base": base, "run": run,
                    "difference": difference, "low": verdict.get("low"), "high": verdict.get("high"),
                    "confidence": verdict.get("confidence") or 0.95, "p_value": verdict.get("p_value"),
                    "n": verdict.get("n", evaluation.run.get("n")), "method": verdict.get("method"),
                    "better": verdict.get("better"), "verdict": _words(verdict, difference),
                    "step": evaluation.run.get("step"),
                }
            )  # fmt: skip
    return rows


def pick_examples(evaluation: Evaluation) -> dict[str, Any]:
    """The suite's examples in groups, those first that show what changed.

    Where a score is 0 or 1 throughout: newly right, newly wrong, still wrong, still right. Else by the change of the
    first score that should be high: most improved, most worsened. Without a baseline: right or wrong, or as they come.
    """
    after = [example for example in evaluation.run.get("examples") or [] if isinstance(example, Mapping)]
    before = {str(example.get("id")): example for example in evaluation.base.get("examples") or []}
    metric, is_binary = _deciding_score(evaluation, after)
    pairs = []
    for example in after:
        base = before.get(str(example.get("id")))
        pairs.append(
            {
                "id": str(example.get("id", "")), "prompt": _cut(example.get("prompt")),
                "reference": _cut(example.get("reference")), "answer": _cut(example.get("prediction")),
                "base_answer": _cut(base.get("prediction")) if base else None,
                "score": _score(example, metric), "base_score": _score(base, metric) if base else None,
            }
        )  # fmt: skip
    groups = _binary_groups(pairs) if is_binary else _graded_groups(pairs, metric)
    kept = [(title, len(members), members[:_MOST_EXAMPLES]) for title, members in groups if members]
    return {"suite": evaluation.suite, "metric": metric, "is_binary": is_binary, "groups": kept, "total": len(pairs)}


def _binary_groups(pairs: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    changes = {
        "Wrong before, right now": (False, True),
        "Right before, wrong now": (True, False),
        "Wrong before and now": (False, False),
        "Right before and now": (True, True),
        "Right (no answer of the base)": (None, True),
        "Wrong (no answer of the base)": (None, False),
    }

    def state(score: float | None) -> bool | None:
        return None if score is None else score >= 1

    return [
        (title, [pair for pair in pairs if (state(pair["base_score"]), state(pair["score"])) == change])
        for title, change in changes.items()
    ]


def _graded_groups(pairs: list[dict[str, Any]], metric: str | None) -> list[tuple[str, list[dict[str, Any]]]]:
    def change(pair: dict[str, Any]) -> float:
        return pair["score"] - pair["base_score"]

    both = [pair for pair in pairs if pair["score"] is not None and pair["base_score"] is not None]
    if not both:
        return [("Answers", pairs)]
    improved = sorted((pair for pair in both if change(pair) > 0), key=change, reverse=True)
    worsened = sorted((pair for pair in both if change(pair) < 0), key=change)
    return [
        (f"Most improved ({metric})", improved),
        (f"Most worsened ({metric})", worsened),
        ("Unchanged", [pair for pair in both if change(pair) == 0]),
    ]


def _deciding_score(evaluation: Evaluation, examples: list[Mapping[str, Any]]) -> tuple[str | None, bool]:
    """The score that sorts examples, and whether it says right or wrong."""
    everything = [*examples, *(evaluation.base.get("examples") or [])]
    values: dict[str, set[float]] = {}
    for example in everything:
        for name, value in (example.get("scores") or {}).items():
            if isinstance(value, int | float):
                values.setdefault(name, set()).add(float(value))
    directions = evaluation.run.get("directions") or {}
    rising = [name for name in values if directions.get(name, "higher") == "higher"]
    binary = [name for name in rising if values[name] <= {0.0, 1.0}]
    return next(iter(binary or rising), None), bool(binary)


def _score(example: Mapping[str, Any], metric: str | None) -> float | None:
    value = (example.get("scores") or {}).get(metric)
    return float(value) if isinstance(value, int | float) else None


def _words(verdict: Mapping[str, Any], difference: float | None) -> str:
    if verdict.get("summary"):
        return str(verdict["summary"])
    if "better" in verdict:
        return {True: "better", False: "worse"}.get(verdict["better"], "no difference shown")
    return "not tested" if difference is not None else "no baseline"


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _both_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _cut(text: Any) -> str:
    whole = "" if text is None else str(text)
    if len(whole) <= _MOST_CHARACTERS:
        return whole
    return f"{whole[:_MOST_CHARACTERS]} [... {len(whole) - _MOST_CHARACTERS:,} more characters]"
