from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trainer.config.errors import UserError
from trainer.tracking import Tracker, open_run
from trainer.tracking.curves import smooth, stage_starts, thin
from trainer.tracking.report import figure, outcome, p_value, write_report
from trainer.tracking.report_evaluation import Evaluation, compare, pick_examples, read_evaluations

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.links.append(str(value))
            assert not name.startswith("on"), (tag, name)


def example(number: int, score: float, **changes: object) -> dict:
    return {
        "id": f"e{number}", "prompt": "p", "reference": "r", "prediction": "a", "scores": {"exact_match": score},
        **changes,
    }  # fmt: skip


def verdict(metric: str, before: float, after: float, low: float, high: float, better: bool | None) -> dict:
    return {
        "metric": metric, "n": 40, "baseline": before, "candidate": after, "difference": after - before, "low": low,
        "high": high, "confidence": 0.95, "p_value": 0.0001, "method": "paired bootstrap", "better": better,
        "summary": {True: "better", False: "worse", None: "no difference shown"}[better],
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "triage"
    open_run(folder, name=f"triage {ATTACK}", data={"tickets": {"fingerprint": "ab" * 32, "examples": 1234}})
    (folder / "recipe.yaml").write_text(f"name: x # {ATTACK}\nhub: {{token: canary-in-recipe}}\n")
    tracker = Tracker(folder, 40, console=False)
    for step in range(1, 41):
        stage = "domain" if step <= 15 else ATTACK
        loss = math.nan if step == 7 else 3 / step
        tracker.step(
            {"step": step, "stage": stage, "loss": loss, "lr": 1e-4, "grad_norm": 1.0, "seconds": 0.5, "tokens": 90}
        )
        if step % 10 == 0:
            tracker.eval({"step": step, "suite": f"held$out {ATTACK}", "metrics": {"exact_match": step / 50}})
            tracker.eval({"step": step, "suite": "inline", "perplexity": 9.0 - step / 10})
    tracker.event(7, "skip", ATTACK)
    tracker.close("complete")
    (folder / "evaluation").mkdir()
    after = {
        "suite": "held-out", "step": 40, "kind": "generate", "n": 40, "metrics": {"exact_match": 0.8, "chrf": 70.0},
        "directions": {"exact_match": "higher"}, "verdicts": [verdict("exact_match", 0.1, 0.8, 0.6, 0.8, True)],
        "examples": [example(1, 1, prompt=ATTACK, prediction="NOW-RIGHT"), example(2, 0), example(3, 0), example(4, 1)],
    }  # fmt: skip
    before = {"suite": "held-out", "metrics": {"exact_match": 0.1}, "examples": []}
    before["examples"] = [example(1, 0, prediction=ATTACK), example(2, 1), example(3, 0), example(4, 1)]
    (folder / "evaluation" / "held-out-step-00000040.json").write_text(json.dumps(after))
    (folder / "evaluation" / "held-out-step-00000009.json").write_text("{ old and broken, never read")
    (folder / "evaluation" / "held-out-base.json").write_text(json.dumps(before))
    return folder


def test_report_is_whole_self_contained_and_escaped(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text()
    page = _Page(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert "&lt;script&gt;alert" in text and page.links == []
    assert not re.search(r"url\((?!#)|@import|<\?xml", text)
    assert len(page.ids) == len(set(page.ids))  # clip paths of one drawing must not serve another
    assert page.tags.count("svg") == 6  # loss, two evaluation metrics, rate, norm; forest
    assert "is better than its base on held-out: exact_match 0.100 before, 0.800 after" in text
    assert "+0.700" in text and "+0.600 to +0.800" in text and "&lt; 0.001" in text
    assert "1,234" in text and "NOW-RIGHT" in text and "✗ wrong" in text and "✓ right" in text
    assert "canary-in-recipe" not in text
    titles = ["Wrong before, right now", "Right before, wrong now", "Wrong before and now", "Right before and now"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)


def test_report_of_a_run_that_failed_early(tmp_path: Path) -> None:
    open_run(tmp_path / "run", name="early")
    tracker = Tracker(tmp_path / "run", 100, console=False)
    for step in (1, 2, 3):
        tracker.step({"step": step, "loss": math.nan})
    tracker.event(3, "failed", "loss not finite in 3 steps in a row")
    tracker.close("failed")
    text = write_report(tmp_path / "run").read_text()
    assert "The run failed after step 3: loss not finite in 3 steps in a row." in text
    assert "<svg" not in text and "No evaluation is recorded yet" in text


@pytest.mark.parametrize("content", ["", '{"kind": "step"', "garbage\n"])
def test_report_of_a_run_without_rows(tmp_path: Path, content: str) -> None:
    open_run(tmp_path, name="empty")
    (tmp_path / "metrics.jsonl").write_text(content)
    text = write_report(tmp_path).read_text()
    assert "The run has begun; no step is done yet." in text
    assert ("metrics.jsonl:1" in text) == (content == "garbage\n")


def test_report_of_a_live_run_with_broken_parts(run: Path) -> None:
    (run / "run.json").write_text("{")
    (run / "recipe.yaml").unlink()
    (run / "evaluation" / "held-out-base.json").write_text("[]")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "ste')
    text = write_report(run).read_text()
    assert "Not everything could be read" in text and "held-out-step-00000040.json or its base" in text
    assert "recipe.yaml is missing" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the folder of a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_comparison_without_a_test_or_a_baseline(run: Path) -> None:
    evaluations, problems = read_evaluations(run)
    assert problems == [] and [evaluation.run["step"] for evaluation in evaluations] == [40]
    tested, chrf = compare(evaluations)
    assert (tested["verdict"], tested["base"], tested["run"]) == ("better", 0.1, 0.8)
    assert (chrf["verdict"], chrf["base"], chrf["difference"], chrf["low"]) == ("no baseline", None, None, None)


def test_outcome_names_what_got_worse() -> None:
    run = {"kind": "generate", "verdicts": [verdict("exact_match", 0.1, 0.8, 0.6, 0.8, True)]}
    other = {"kind": "classify", "verdicts": [verdict("accuracy", 0.5, 0.4, -0.15, -0.05, False)]}
    rows = compare([Evaluation("aside", other), Evaluation("task", run)])
    sentence = outcome({"status": "complete"}, [{"kind": "step", "step": 9}], rows)
    assert sentence.startswith("The run is better than its base on task")
    assert "Of 2 measures 1 better, 1 worse (aside accuracy), 0 undecided." in sentence
    assert "not compared" in outcome({"status": "complete"}, [], [])


def test_graded_examples_are_ordered_by_change() -> None:
    def graded(number: int, score: float) -> dict:
        return {"id": number, "prompt": "p", "reference": "r", "prediction": "a", "scores": {"rouge": score}}

    run = {
        "examples": [graded(1, 0.5), graded(2, 0.9), graded(3, 0.1), graded(4, 0.4)],
        "directions": {"rouge": "higher"},
    }
    base = {"examples": [graded(1, 0.4), graded(2, 0.2), graded(3, 0.6), graded(4, 0.4)]}
    picked = pick_examples(Evaluation("s", run, base))
    found = [(title, [member["id"] for member in members]) for title, _, members in picked["groups"]]
    assert found == [("Most improved (rouge)", ["2", "1"]), ("Most worsened (rouge)", ["3"]), ("Unchanged", ["4"])]


def test_groups_show_a_limited_number_and_long_texts_are_cut() -> None:
    run = {"examples": [example(number, 1, prompt="p" * 5000) for number in range(30)]}
    ((title, count, members),) = pick_examples(Evaluation("s", run))["groups"]
    assert (title, count, len(members)) == ("Right (no answer of the base)", 30, 5)
    assert len(members[0]["prompt"]) < 1300 and "3,800 more characters" in members[0]["prompt"]


def test_smoothing_by_hand() -> None:
    # span 3 means weight 1/2: a mean weighted 4, 2, 1 from the newest back
    assert smooth([4.0, 8.0, 0.0], 3) == pytest.approx([4.0, (2 * 8 + 4) / 3, (4 * 0 + 2 * 8 + 4) / 7])


def test_thinning_keeps_spikes() -> None:
    values = [0.0] * 50_000
    values[12_345], values[40_000] = 9.0, -9.0
    steps, thinned = thin(([float(step) for step in range(50_000)], values), 600)
    assert len(steps) <= 600 and max(thinned) == 9.0 and min(thinned) == -9.0 and steps == sorted(steps)


def test_stage_starts() -> None:
    rows = [{"kind": "step", "step": step, "stage": "a" if step < 4 else "b"} for step in range(1, 7)]
    assert stage_starts(rows) == [(1.0, "a"), (4.0, "b")]


def test_figures_are_readable() -> None:
    assert [figure(value) for value in (0.12345, 12.345, 123.45, 12345.6, 3, 2e-5, None, math.nan)] == [
        "0.123", "12.35", "123.5", "12,346", "3", "2e−05", "–", "nan",
    ]  # fmt: skip
    assert figure(-0.5, sign=True) == "−0.500" and p_value(0.0) == "< 0.001" and p_value(0.0301) == "0.030"
