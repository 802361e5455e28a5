"""Spikes, passed-over steps and copies that differ: each with a real run or real tensors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.config import build_recipe
from trainer.config.schema import Spike
from trainer.guard import IN_A_ROW, SpikeWatch, odd_ones, spike_limit
from trainer.session import open_session
from trainer.tracking import read_rows
from trainer.train import train


def test_limit_by_hand() -> None:
    # median 3, absolute deviations 2 1 0 1 2 -> MAD 1
    assert spike_limit([1.0, 2.0, 3.0, 4.0, 5.0], 6.0) == pytest.approx(3 + 6 * 1.4826)
    assert spike_limit([2.0] * 9, 6.0) == pytest.approx(2 + 6 * 0.02)  # no spread: a hundredth of the median


def test_a_spike_does_not_enter_the_yardstick_and_a_new_level_is_taken() -> None:
    watch = SpikeWatch(Spike(policy="warn", window=8))
    assert not any(watch.judge(1.0 + 0.01 * (step % 2)) for step in range(20))
    before = watch.limit()
    assert watch.judge(9.0) and watch.limit() == before
    assert not watch.judge(1.0)
    assert [watch.judge(9.0) for _ in range(IN_A_ROW)] == [True, True, False]
    assert list(watch.losses) == [9.0]
    assert not watch.judge(float("nan"))


def test_the_first_losses_are_no_spike() -> None:
    watch = SpikeWatch(Spike(policy="warn"))
    assert not any(watch.judge(float(2**step)) for step in range(8))


@given(st.dictionaries(st.integers(0, 7), st.sampled_from("abc"), min_size=1))
def test_odd_ones_are_the_minority_or_all(digests: dict[int, str]) -> None:
    odd = odd_ones(digests)
    values = list(digests.values())
    rest = {digests[rank] for rank in digests if rank not in odd}
    if odd == sorted(digests):
        assert max(values.count(value) for value in values) * 2 <= len(values)
    else:
        assert len(rest) == 1 and values.count(rest.pop()) * 2 > len(values)


# ---------------------------------------------------------------- runs

POISON = 37  # the row whose answer is unlike all others


def poisoned(folder: Path, model: Path, policy: str, **changes: Any) -> dict[str, Any]:
    """Rows that soon are known by heart, and one that is not, so that the step that draws it is a spike."""
    data, draw = folder.parent / "rows.jsonl", random.Random(0)
    with data.open("w", encoding="utf-8") as file:
        for row in range(96):
            odd = row == POISON
            answer = "".join(draw.choice("QXZ%&*@#") for _ in range(40)) if odd else "yes"
            messages = [{"role": "user", "content": "ok?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return {
        "name": folder.name,
        "output": str(folder),
        "model": {"path": str(model), "dtype": "float32", "max_length": 96},
        "tuning": {"method": "full"},
        "sources": {"rows": {"path": str(data), "format": "messages"}},
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant"},
        "batch": {"examples": 4},
        "until": {"epochs": 2},
        "tracking": {"ledger": True},
        "checkpoint": {"every": 5},
        "guard": {"spike": {"policy": policy, "window": 12, "deviations": 12.0}},
    } | changes


def values(run: Any) -> list[Tensor]:
    return [slot.value(piece).clone() for slot in run.engine.slots() for piece in slot.pieces]


def walk(recipe: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[int, list[Tensor]], dict[int, dict[str, Any]]]:
    """Journal, weights after each recorded step, and the ledger's last row of each step."""
    seen: dict[int, list[Tensor]] = {}
    with open_session(build_recipe(recipe), console=False) as run:
        record = run.write_ledger

        def watched(step: int, **options: Any) -> None:
            record(step, **options)
            seen[step] = values(run)

        run.write_ledger = watched  # type: ignore[method-assign]
        run.status = train(run)
    folder = Path(recipe["output"])
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return read_rows(folder), seen, {row["step"]: row for row in ledger}


def steps_with_poison(ledger: dict[int, dict[str, Any]]) -> list[int]:
    return [step for step, row in ledger.items() if any(name.endswith(f":{POISON + 1}") for name in row["ids"])]


def test_warn_tells_and_trains(tmp_path: Path, tiny_folder: Path) -> None:
    rows, seen, ledger = walk(poisoned(tmp_path / "run", tiny_folder, "warn"))
    spikes = [row["step"] for row in rows if row["kind"] == "step" and row["spike"]]
    late = [step for step in steps_with_poison(ledger) if step > 12]
    assert late and set(late) <= set(spikes)
    events = [row for row in rows if row["kind"] == "event" and row["name"] == "spike"]
    assert {row["step"] for row in events} == set(spikes)
    assert all(not torch.equal(a, b) for a, b in zip(seen[late[0] - 1], seen[late[0]], strict=True))


def test_skip_leaves_weights_as_they_were(tmp_path: Path, tiny_folder: Path) -> None:
    rows, seen, ledger = walk(poisoned(tmp_path / "run", tiny_folder, "skip"))
    late = [step for step in steps_with_poison(ledger) if step > 12]
    by_step = {row["step"]: row for row in rows if row["kind"] == "step"}
    for step in late:
        assert by_step[step]["spike"] and by_step[step]["skipped"]
        assert all(torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True))
    assert len(by_step) == 48


def test_rollback_returns_to_the_checkpoint_and_goes_past(tmp_path: Path, tiny_folder: Path) -> None:
    rows, seen, ledger = walk(poisoned(tmp_path / "run", tiny_folder, "rollback"))
    events = [row for row in rows if row["kind"] == "event" and row["name"] == "rollback"]
    assert events
    spiked = events[-1]["step"]
    saved = int(events[-1]["detail"].split("step-")[1][:8])
    assert saved == (spiked - 1) // 5 * 5
    for step in range(saved + 1, spiked + 1):
        assert ledger[step]["ids"] == [] and ledger[step]["untrained"] == "rollback"
    assert all(torch.equal(a, b) for a, b in zip(seen[saved], seen[spiked], strict=True))
    assert max(ledger) == 48  # step k is step k of the plan, trained or not


def test_listed_steps_are_passed_over(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = poisoned(tmp_path / "run", tiny_folder, "off", until={"steps": 6, "epochs": None})
    recipe["guard"] = {"skip_steps": [3]}
    rows, seen, ledger = walk(recipe)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    assert ledger[3]["ids"] == [] and ledger[3]["untrained"] == "guard.skip_steps"
    passed = next(row for row in rows if row["kind"] == "event" and row["name"] == "passed_over")
    assert passed["step"] == 3 and "rows:" in passed["detail"]
