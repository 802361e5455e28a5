"""``report.html``: what a run did, in one self-contained file made from the run's folder alone."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.config.errors import UserError
from trainer.tracking.console import duration
from trainer.tracking.curves import draw_curves, draw_forest
from trainer.tracking.journal import Row, scan_rows, supersede
from trainer.tracking.redact import known_secrets, redact
from trainer.tracking.report_evaluation import compare, pick_examples, read_evaluations
from trainer.tracking.run_record import FILE_NAME as RUN_FILE
from trainer.tracking.run_record import read_run, replace_file

FILE_NAME = "report.html"
_STATUS_WORDS = {
    "complete": "Complete",
    "failed": "Failed",
    "preempted": "Preempted, to be resumed",
    "running": "Running",
    None: "Unknown",
}
# Shown in sections of their own; whatever else run.json holds is listed as it is.
_OWN_SECTION = {"id", "name", "status", "versions", "hardware", "code", "platform", "data", "sources", "fingerprints"}
_COMMON_EVENTS = {"checkpoint"}  # counted, not listed one by one


def write_report(run_folder: Path) -> Path:
    """Write ``<run_folder>/report.html`` from what the folder holds, and return its path.

    A run that has just begun, failed or was never evaluated gets a report of what there is, with what is missing or
    unreadable named in it. Raises UserError where the folder is no run's (neither run.json nor metrics.jsonl).
    """
    run_folder = Path(run_folder)
    path = run_folder / FILE_NAME
    content = gather(run_folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(figure=figure, share=p_value, plain=plain)
    replace_file(path, environment.get_template("report.html.j2").render(content))
    return path


def gather(run_folder: Path) -> dict[str, Any]:
    """Everything that the template shows, by the names it uses."""
    rows, problems = scan_rows(run_folder)
    if not (run_folder / RUN_FILE).exists() and not rows:
        raise UserError(f"{run_folder}: neither {RUN_FILE} nor a row of metrics: name the folder of a run")
    record: dict[str, Any] = {}
    try:
        record = read_run(run_folder)
    except UserError as error:
        problems.append(str(error))
    rows = supersede(rows)
    evaluations, evaluation_problems = read_evaluations(run_folder)
    comparisons = compare(evaluations)
    recipe_path = run_folder / "recipe.yaml"
    secrets = known_secrets(os.environ)
    events = sorted((row for row in rows if row["kind"] == "event"), key=lambda row: row.get("time") or 0)
    return {
        "name": str(record.get("name") or run_folder.resolve().name),
        "status": record.get("status"),
        "status_words": _STATUS_WORDS.get(record.get("status"), str(record.get("status"))),
        "outcome": outcome(record, rows, comparisons),
        "figures": key_figures(record, rows, comparisons),
        "curves": draw_curves(rows),
        "comparisons": comparisons,
        "forest": draw_forest(comparisons),
        "examples": [pick_examples(evaluation) for evaluation in evaluations if evaluation.run.get("examples")],
        "recipe": redact(recipe_path.read_text(encoding="utf-8"), secrets) if recipe_path.exists() else None,
        "record": record,
        "data": data_table({key: record[key] for key in ("data", "sources", "fingerprints") if record.get(key)}),
        "other": {key: value for key, value in record.items() if key not in _OWN_SECTION},
        "events": [event for event in events if event.get("name") not in _COMMON_EVENTS],
        "checkpoints": sum(event.get("name") in _COMMON_EVENTS for event in events),
        "problems": problems + evaluation_problems,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def outcome(record: Mapping[str, Any], rows: Sequence[Row], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: how it ended and, where evaluations allow it, whether the run is better than its base."""
    steps = [int(row["step"]) for row in rows if row["kind"] == "step"]
    status, last = record.get("status"), max(steps, default=0)
    reached = f"step {last}" if steps else "before its first step"
    if status == "failed":
        told = [row for row in rows if row["kind"] == "event" and row.get("name") in ("failed", "error", "stopped")]
        reason = record.get("error") or (told[-1].get("detail") if told else None)
        return f"The run failed {'after ' + reached if steps else reached}{': ' + plain(reason) if reason else ''}."
    if status == "preempted":
        return f"The run was interrupted after {reached} and can be resumed."
    if status == "running":
        return (
            f"The run has not ended; it has reached {reached}." if steps else "The run has begun; no step is done yet."
        )
    tested = [row for row in comparisons if row["low"] is not None]
    if not tested:
        return f"The run ended at {reached}; it was not compared with its base model."
    first = min(tested, key=_prominence)
    better, worse = sum(row["better"] is True for row in tested), sum(row["better"] is False for row in tested)
    verdict = {True: "better than", False: "worse than"}.get(first["better"], "not told apart from")
    sentence = (
        f"The run is {verdict} its base on {first['suite']}: {first['metric']} {figure(first['base'])} before, "
        f"{figure(first['run'])} after (difference {figure(first['difference'], sign=True)}, "
        f"{first['confidence']:.0%} interval {figure(first['low'], sign=True)} to {figure(first['high'], sign=True)})"
    )
    if len(tested) == 1:
        return f"{sentence}."
    undecided = len(tested) - better - worse
    names = ", ".join(f"{row['suite']} {row['metric']}" for row in tested if row["better"] is False)
    losses = f"{worse} worse ({names})" if worse else "none worse"
    return f"{sentence}. Of {len(tested)} measures {better} better, {losses}, {undecided} undecided."


def key_figures(
    record: Mapping[str, Any], rows: Sequence[Row], comparisons: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """``(label, value)`` of the handful of numbers that one looks for first; those unknown are left out."""
    steps = [row for row in rows if row["kind"] == "step"]
    found: list[tuple[str, str]] = []
    for row in sorted(comparisons, key=_prominence)[:2]:
        if row["base"] is not None:
            found.append((f"{row['suite']}: {row['metric']}", f"{figure(row['base'])} → {figure(row['run'])}"))
    if not steps:
        return found
    found.append(("Steps", f"{steps[-1]['step']:,}"))
    losses = [row["loss"] for row in steps if isinstance(row.get("loss"), int | float) and math.isfinite(row["loss"])]
    if losses:
        tail = losses[-max(1, len(losses) // 20) :]
        found.append(("Training loss, first → last 5%", f"{figure(losses[0])} → {figure(sum(tail) / len(tail))}"))
    seconds, tokens = _total(steps, "seconds"), _total(steps, "tokens")
    if tokens:
        found.append(("Tokens", f"{tokens:,.0f}"))
    if seconds:
        found.append(("Time in steps", duration(seconds)))
    if seconds and tokens:
        found.append(("Tokens per second", f"{tokens / seconds:,.0f}"))
    memory = max((row["memory_bytes"] for row in steps if isinstance(row.get("memory_bytes"), int | float)), default=0)
    if memory:
        found.append(("Peak memory", f"{memory / 2**30:.2f} GiB"))
    skipped = sum(bool(row.get("skipped")) for row in steps)
    if skipped:
        found.append(("Steps skipped", str(skipped)))
    if record.get("restarts"):
        found.append(("Restarts", str(record["restarts"])))
    return found


def data_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for the recorded data: a row for each source where sources are mappings, else key and value."""
    sources: dict[str, dict[str, Any]] = {}
    for section, entries in data.items():
        for name, value in entries.items() if isinstance(entries, Mapping) else [(section, entries)]:
            facts = value if isinstance(value, Mapping) else {"fingerprint" if section != "data" else "value": value}
            sources.setdefault(str(name), {}).update(facts)
    columns = list(dict.fromkeys(key for facts in sources.values() for key in facts))
    return ["source", *columns], [[name, *(facts.get(key) for key in columns)] for name, facts in sources.items()]


def figure(value: Any, sign: bool = False) -> str:
    """A number with four significant digits and no exponent where it can be helped; a dash for none."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        text = f"{value:+,.0f}" if sign else f"{value:,.0f}"
    elif size and size < 1e-3:
        text = f"{value:+.2g}" if sign else f"{value:.2g}"
    else:
        digits = 3 if size < 10 else 2 if size < 100 else 1
        text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")  # a minus as wide as a plus


def p_value(value: Any) -> str:
    """A p-value as it is commonly printed: three digits, never "0.000"."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def plain(value: Any) -> str:
    """A record's value as text: mappings and lists in one line, byte counts and numbers readable."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(entry)}" for key, entry in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    text = str(value)
    # a digest is told by its beginning; whole ones break a phone's line
    return f"{text[:16]}..." if re.fullmatch(r"(?:sha256:)?[0-9a-f]{40,}", text) else text


def _prominence(row: Mapping[str, Any]) -> tuple[bool, bool, float, int]:
    """Sort key: a task's own score before its loss, then the change that stands out most from its interval."""
    width = row["high"] - row["low"] if row["low"] is not None and row["high"] is not None else None
    certainty = (
        abs(row["difference"]) / max(width, 1e-12) if width is not None and row["difference"] is not None else -1.0
    )
    return row["kind"] == "loss", width is None, -certainty, row["place"]


def _total(rows: Sequence[Row], key: str) -> float:
    return sum(float(row[key]) for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key]))
