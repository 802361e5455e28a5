"""Preparing: cached by content, once for all processes, with honest counts."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import chat, write_jsonl

from trainer.config import Recipe, UserError, build_recipe
from trainer.data import parallel
from trainer.data import prepare as module
from trainer.data.prepare import prepare
from trainer.data.prompts import generation_prompts
from trainer.data.tokenizer import load_tokenizer

Maker = Callable[..., Recipe]


def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts how often a source is really tokenised."""
    made: list[str] = []
    fill = module._fill
    monkeypatch.setattr(
        module, "_fill", lambda writer, job, tokenizer: (made.append(job.key), fill(writer, job, tokenizer))
    )
    return made


def test_second_time_comes_from_the_cache_and_any_change_does_not(
    chats: Path, tmp_path: Path, recipe_on: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = builds(monkeypatch)
    first = prepare(recipe_on(chats), tmp_path / "cache")["s"]
    again = prepare(recipe_on(chats), tmp_path / "cache")["s"]
    assert made == ["sources.s"] and np.array_equal(first.ids, again.ids) and first.fingerprint == again.fingerprint
    for change in (
        {"system": "x"},
        {"limit": 39},
        {"train_on": "all"},
        {"truncation": "left"},
        {"model": {"max_length": 511}},
    ):
        prepare(recipe_on(chats, **change), tmp_path / "cache")
    assert len(made) == 6
    with chats.open("a") as stream:
        stream.write(json.dumps(chat("new", "row")) + "\n")
    changed = prepare(recipe_on(chats), tmp_path / "cache")["s"]
    assert len(made) == 7 and len(changed) == 41 and changed.fingerprint != first.fingerprint


def test_damaged_cache_is_made_again(
    chats: Path, tmp_path: Path, recipe_on: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = builds(monkeypatch)
    source = prepare(recipe_on(chats), tmp_path / "cache")["s"]
    ids = tmp_path / "cache" / source.key / "ids.npy"
    whole = np.array(source.ids)
    ids.write_bytes(ids.read_bytes()[:-4])
    assert np.array_equal(prepare(recipe_on(chats), tmp_path / "cache")["s"].ids, whole)
    assert len(made) == 2


def test_counts_names_and_arrays(tmp_path: Path, recipe_on: Maker) -> None:
    rows = [chat("q", "a"), {"messages": 3}, chat("q", "a" * 900), chat("q", "b"), chat("q", "c")]
    rows[3]["messages"][1]["weight"] = 0
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    source = prepare(recipe_on(path, on_bad_row="skip", truncation="drop"), tmp_path / "cache")["s"]
    counts = source.counts
    assert {key: counts[key] for key in ("rows", "kept", "skipped_bad", "dropped_long", "no_target")} == {
        "rows": 5, "kept": 2, "skipped_bad": 1, "dropped_long": 1, "no_target": 1,
    }  # fmt: skip
    assert [source.example_id(index) for index in range(2)] == ["s:1", "s:5"]
    assert counts["target_tokens"] == 4 == source.targets.sum()  # one letter and the end of turn, twice
    assert counts["tokens"] == source.lengths.sum() == len(source.ids)
    assert source.weights.dtype == np.uint8 and source.ids.dtype == np.int32 and source.offsets.dtype == np.int64
    ids, weights, label = source.example(1)
    assert len(ids) == len(weights) == source.lengths[1] and weights.sum() == 2 and label == -1


def test_weights_between_zero_and_one_are_kept(tmp_path: Path, recipe_on: Maker) -> None:
    row = chat("q", "a")
    row["messages"][1]["weight"] = 0.1
    source = prepare(recipe_on(write_jsonl(tmp_path / "d.jsonl", [row])), tmp_path / "cache")["s"]
    assert source.weights.dtype == np.float32 and set(source.weights.tolist()) == {0.0, np.float32(0.1)}


def test_a_source_under_two_objectives_has_two_forms(chats: Path, tmp_path: Path, recipe_on: Maker) -> None:
    stages = [{"name": "a", "objective": {"name": "language-modeling"}}, {"name": "b"}]
    recipe = recipe_on(chats, top={"stages": stages})
    prepared = prepare(recipe, tmp_path / "cache")
    every, answers = (prepared.stage(stage)["s"] for stage in recipe.stages)
    assert np.array_equal(every.ids, answers.ids) and len(prepared) == 1
    assert every.counts["target_tokens"] == every.counts["tokens"] - 40 > answers.counts["target_tokens"]


def test_workers_give_what_one_process_gives(
    chats: Path, tmp_path: Path, recipe_on: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = prepare(recipe_on(chats), tmp_path / "one")["s"]
    monkeypatch.setattr(parallel, "ALONE", 8)
    monkeypatch.setattr(parallel, "CHUNK", 4)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda process: {0, 1})
    together = prepare(recipe_on(chats), tmp_path / "two")["s"]
    for name in ("ids", "weights", "offsets", "lines"):
        assert np.array_equal(getattr(alone, name), getattr(together, name))


def rank(recipe: Recipe, tokenizer: Any, cache: Path, result: Path) -> None:
    """One of several processes that prepare at once; notes whether it was the one that worked."""
    fill, made = module._fill, []
    module._fill = lambda *arguments: (made.append(1), fill(*arguments))  # type: ignore[assignment,func-returns-value]
    try:
        outcome = str(len(prepare(recipe, cache, tokenizer)["s"]))
    except UserError as error:
        outcome = str(error)
    result.write_text(f"{len(made)} {outcome}")


@pytest.mark.parametrize("broken", [False, True])
def test_processes_at_once(chats: Path, tmp_path: Path, recipe_on: Maker, tokenizer: Any, broken: bool) -> None:
    if broken:
        with chats.open("a") as stream:
            stream.write("nonsense\n")
    context, results = multiprocessing.get_context("fork"), [tmp_path / f"{number}.txt" for number in range(3)]
    jobs = [(recipe_on(chats), tokenizer, tmp_path / "cache", result) for result in results]
    ranks = [context.Process(target=rank, args=job) for job in jobs]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(30)
    made, outcomes = zip(*(result.read_text().split(" ", 1) for result in results), strict=True)
    assert len(set(outcomes)) == 1
    if broken:
        assert "chats.jsonl:41:1:" in outcomes[0]
    else:
        assert outcomes[0] == "40" and sorted(made) == ["0", "0", "1"]
    assert not list((tmp_path / "cache").glob(".building-*"))


def test_prompts_match_training(chats: Path, tmp_path: Path, recipe_on: Maker) -> None:
    held_out = {"path": str(chats), "format": "messages", "truncation": "left"}
    suite = {"name": "exact", "source": "test", "kind": "generate", "metrics": ["exact_match"], "limit": 3}
    data = recipe_on(chats).model_dump(mode="json", exclude_unset=True)
    data["sources"]["test"] = held_out
    data["evaluation"] = {"suites": [suite]}
    recipe = build_recipe(data)
    prepared = prepare(recipe, tmp_path / "cache")
    prompts = generation_prompts(recipe, recipe.evaluation.suites[0], load_tokenizer(recipe.model))
    assert [prompt.name for prompt in prompts] == ["test:1", "test:2", "test:3"]
    assert [prompt.reference for prompt in prompts] == ["a", "aa", "aaa"]
    held = prepared.suite(recipe, recipe.evaluation.suites[0])
    assert len(held) == 3 and held.example(0)[0][: len(prompts[0].ids)].tolist() == prompts[0].ids.tolist()
