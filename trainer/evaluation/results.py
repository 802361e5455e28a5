"""The files of an evaluation: one JSON object for each suite, step and model, in the run's `evaluation` folder.

    {"suite", "step", "model": "run" | "base", "source", "kind", "metrics": {name: number},
     "directions": {name: "higher" | "lower"}, "n", "seconds", "ids": [...], "per_example": {name: [numbers]},
     "examples": [{"id", "prompt", "reference", "prediction", "scores": {metric: number}}],
     "predictions": [...], "references": [...], "verdicts": [...]}

`ids`, every list in `per_example`, `predictions` and `references` run in parallel over all examples; `examples` holds
the first ones as a reader wants them. `predictions` and `references` are there because a corpus measure is resampled
from texts. JSON has no NaN: numbers that are not finite are written as "nan", "inf", "-inf" and read back as floats; in
a verdict, where they mean that nothing was tested, as null.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainer.config import UserError

Result = dict[str, Any]
Model = Literal["run", "base"]

FOLDER = "evaluation"
_NUMERIC = ("metrics", "per_example")  # the parts that hold numbers and none of the model's texts
_STEP_FILE = re.compile(r"-step-(\d+)\.json$")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def result_path(run_folder: Path, suite: str, step: int | None, model: Model, variant: str = "") -> Path:
    """Where a suite's result lies. Raises ValueError for a run's result without its step.

    A `variant` of the run's weights (an average) has a folder of its own: no reader takes its results for the run's.
    """
    if model == "base":
        return run_folder / FOLDER / f"{suite}-base.json"
    if step is None:
        raise ValueError(f"suite {suite!r}: the result of a run belongs to a step")
    return run_folder / FOLDER / variant / f"{suite}-step-{step:08d}.json"


def write_result(path: Path, result: Result) -> None:
    """Write one result so that the file is at any moment absent, the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    safe = {key: _each(value, _encoded) if key in _NUMERIC else value for key, value in result.items()}
    safe["examples"] = [row | {"scores": _each(row["scores"], _encoded)} for row in result.get("examples", [])]
    if "verdicts" in result:
        safe["verdicts"] = _each(result["verdicts"], _or_null)
    temporary = path.with_name(f".{path.name}.tmp")
    # a tokenizer may decode half a character to a lone surrogate, which UTF-8 cannot hold
    data = json.dumps(safe, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_result(path: Path) -> Result:
    """The result in a file. Raises UserError where it is missing or not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); evaluate again") from error
    except ValueError as error:
        raise UserError(f"{path}: not a result ({error}); delete it and evaluate again") from error
    wanted = ("suite", "metrics", "ids", "per_example")
    missing = [key for key in wanted if not isinstance(result, dict) or key not in result]
    if missing:
        raise UserError(f"{path}: not a result (no {missing[0]!r}); delete it and evaluate again")
    for key in _NUMERIC:
        if key in result:
            result[key] = _each(result[key], _decoded)
    for row in result.get("examples", []):
        row["scores"] = _each(row["scores"], _decoded)
    return result


def base_result(run_folder: Path, suite: str) -> Result | None:
    """The base model's result of a suite; None where it was not evaluated. Raises UserError for a spoiled file."""
    path = result_path(run_folder, suite, None, "base")
    return read_result(path) if path.exists() else None


def latest_results(run_folder: Path) -> dict[str, Result]:
    """{suite: result of its latest step} of a run, by name of suite.

    Raises UserError where the folder holds no evaluation of the run.
    """
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((run_folder / FOLDER).glob("*.json")):
        found = _STEP_FILE.search(path.name)
        if found is None or path.name.startswith("."):
            continue
        suite, step = path.name[: found.start()], int(found.group(1))
        if suite not in newest or step > newest[suite][0]:
            newest[suite] = (step, path)
    if not newest:
        raise UserError(
            f"{run_folder}: no evaluation of a run (evaluation/<suite>-step-*.json); run `tunesmith evaluate`"
        )
    return {suite: read_result(path) for suite, (_, path) in sorted(newest.items())}


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_each(entry, change) for entry in value]
    return change(value)


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
