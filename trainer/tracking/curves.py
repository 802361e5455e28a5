"""The report's pictures: matplotlib drawings as inline SVG, sized to be read on a phone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.tracking.journal import Row, eval_metrics

Series = tuple[list[float], list[float]]  # steps, values
_MOST_POINTS = 600  # a curve is some 500 px wide
_BLUE, _GREEN, _RED, _GREY = "#1f5fa8", "#1b7f4b", "#b3372f", "#6b7280"
_COLOURS = [_BLUE, "#c2570c", _GREEN, "#7b4bb3", "#b3372f", "#0f766e", "#a16207", "#475569"]
_STYLE: Any = {  # its type is a literal of 300 names
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 11,
    "text.parse_math": False,  # a suite may be called "cost$"
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3af",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e8ec",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
}


def series(rows: Sequence[Row], key: str) -> Series:
    """Steps and finite values of a key of the step rows."""
    pairs = [(float(row["step"]), row.get(key)) for row in rows if row["kind"] == "step"]
    kept = [(step, float(value)) for step, value in pairs if isinstance(value, int | float) and math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def evaluation_series(rows: Sequence[Row]) -> dict[str, dict[str, Series]]:
    """``{metric: {suite: (steps, values)}}`` of the eval rows, finite values only."""
    found: dict[str, dict[str, Series]] = {}
    for row in rows:
        if row["kind"] != "eval":
            continue
        for metric, value in eval_metrics(row).items():
            if math.isfinite(value):
                steps, values = found.setdefault(metric, {}).setdefault(str(row.get("suite", "evaluation")), ([], []))
                steps.append(float(row["step"]))
                values.append(value)
    return found


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average with weight 2 / (span + 1) for the newest, corrected for its start as in Adam
    (Kingma and Ba 2015, section 3): the first value is itself."""
    weight = 2 / (span + 1)
    average, mass, smoothed = 0.0, 0.0, []
    for value in values:
        average, mass = (1 - weight) * average + weight * value, (1 - weight) * mass + weight
        smoothed.append(average / mass)
    return smoothed


def thin(points: Series, most: int = _MOST_POINTS) -> Series:
    """At most ``most`` points: the lowest and highest of each bin, so that no spike is lost."""
    steps, values = points
    if len(steps) <= most:
        return points
    kept: list[int] = []
    bins = most // 2
    for index in range(bins):
        window = range(index * len(steps) // bins, (index + 1) * len(steps) // bins)
        kept.extend(sorted({min(window, key=values.__getitem__), max(window, key=values.__getitem__)}))
    return [steps[index] for index in kept], [values[index] for index in kept]


def stage_starts(rows: Sequence[Row]) -> list[tuple[float, str]]:
    """Step and name where each stage begins."""
    starts: list[tuple[float, str]] = []
    for row in rows:
        stage = row.get("stage")
        if row["kind"] == "step" and stage is not None and (not starts or starts[-1][1] != str(stage)):
            starts.append((float(row["step"]), str(stage)))
    return starts


def draw_curves(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """``(title, svg)`` of each curve for which the rows hold at least one point."""
    starts = stage_starts(rows)
    return [
        (title, _curve(title, label, lines, starts, faint)) for title, label, lines, faint in _wanted(rows) if lines
    ]


def _wanted(rows: Sequence[Row]) -> Iterator[tuple[str, str, dict[str, Series], Series | None]]:
    """Title, axis label, lines by name, and the raw points behind a smoothed line."""
    for key, title, label, is_noisy in (
        ("loss", "Training loss", "nats per target token", True),
        ("lr", "Learning rate", "learning rate", False),
        ("grad_norm", "Gradient norm", "norm before clipping", True),
        ("tokens_per_second", "Throughput", "tokens per second", True),
    ):
        points = series(rows, key)
        if points[0] and is_noisy and len(points[0]) >= 10:
            span = max(5.0, len(points[0]) / 25)
            yield title, label, {"smoothed": thin((points[0], smooth(points[1], span)))}, thin(points)
        else:
            yield title, label, {"": thin(points)} if points[0] else {}, None
        if key == "loss":  # what was learned stands next to how it was learned
            for metric, suites in evaluation_series(rows).items():
                yield f"Evaluation: {metric}", metric, {suite: thin(line) for suite, line in suites.items()}, None


def _curve(
    title: str, label: str, lines: Mapping[str, Series], starts: list[tuple[float, str]], faint: Series | None
) -> Markup:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.9, 3.1), layout="constrained")
        axes = figure.add_subplot()
        if faint is not None:
            axes.plot(*faint, color=_BLUE, alpha=0.25, linewidth=1, label="each step")
        for colour, (name, points) in zip(_COLOURS * (len(lines) // len(_COLOURS) + 1), lines.items(), strict=False):
            marker = "o" if len(points[0]) <= 30 and faint is None else ""
            axes.plot(*points, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=name or None)
        top = axes.get_xaxis_transform()
        for step, stage in starts if len(starts) > 1 else []:
            axes.axvline(step, color=_GREY, linewidth=1, linestyle=(0, (3, 3)))
            axes.text(step, 0.99, f" {_short(stage, 18)}", transform=top, fontsize=9, color=_GREY, va="top")
        axes.set(xlabel="optimizer step", ylabel=label, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02, y=0.12)
        if len(lines) > 1 or faint is not None or any(lines):
            axes.legend(loc="best", handlelength=1.4)
        return _svg(figure, title)


def draw_forest(comparisons: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Interval bars of the differences run minus base, a panel for each scale; None where nothing has an interval.

    Each comparison: ``suite``, ``metric``, ``difference``, ``low``, ``high``, ``better`` (true, false, None).
    """
    rows = [row for row in comparisons if all(_finite(row.get(key)) for key in ("difference", "low", "high"))]
    if not rows:
        return None
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault(_scale(row), []).append(row)
    heights = [len(panel) for panel in panels.values()]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.9, 0.55 * sum(heights) + 0.75 * len(panels) + 0.1), layout="constrained")
        all_axes = figure.subplots(
            len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [h + 0.6 for h in heights]}
        )
        for axes, (scale, panel) in zip(all_axes[:, 0], panels.items(), strict=True):
            _forest_panel(axes, panel, scale)
        return _svg(figure, "Differences between run and base with their confidence intervals")


def _forest_panel(axes: Any, panel: Sequence[Mapping[str, Any]], scale: str) -> None:
    axes.axvline(0, color="#374151", linewidth=1)
    for place, row in enumerate(panel):
        colour = {True: _GREEN, False: _RED}.get(row.get("better"), _GREY)  # type: ignore[arg-type]
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot([row["difference"]], [place], marker="D", markersize=6, color=colour)
        # Above its bar and not beside the axis: on a phone the bars need the whole width.
        name = f"{_short(str(row['suite']), 30)}: {_short(str(row['metric']), 22)}"
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axes.text(0, place - 0.38, name, transform=axes.get_yaxis_transform(), va="center", fontsize=10.5, bbox=paper)
    axes.set_yticks([])
    axes.set_ylim(len(panel) - 0.6, -0.75)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"run minus base ({scale})")


def _scale(row: Mapping[str, Any]) -> str:
    """Metrics share an axis only where their numbers can be compared by eye."""
    direction = {"lower": ", lower is better", "higher": ", higher is better"}.get(str(row.get("direction")), "")
    if str(row["metric"]) in ("loss", "perplexity") or row.get("direction") == "lower":
        return f"{row['metric']}{direction}"
    values = [abs(float(row[key])) for key in ("base", "run", "difference") if _finite(row.get(key))]
    most = max(values)
    unit = "shares, 0 to 1" if most <= 1 else "points, 0 to 100" if most <= 100 else str(row["metric"])
    return f"{unit}{direction}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _svg(figure: Figure, title: str) -> Markup:
    """The drawing as an ``<svg>`` element that scales with its box, its ids unlike those of its neighbours."""
    text = io.StringIO()
    # Clip paths are named by a hash of their shape and this salt; two drawings in one page must not share names.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # A phone's reader has its own font; matplotlib's list of fonts in every label is 100 bytes of nothing.
    drawing = re.sub(r"(font:[^'\";]*?\d+px) [^;\"]*sans-serif[^;\"]*", r"\1 sans-serif", drawing)
    drawing = re.sub(
        r'<svg [^>]*?width="[^"]*"', lambda match: re.sub(r' (?:width|height)="[^"]*"', "", match[0]), drawing
    )
    drawing = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # "axes_1" of every drawing; nothing refers to them
    label = Markup.escape(title)
    return Markup(drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
