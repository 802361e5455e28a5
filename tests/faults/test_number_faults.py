"""Numbers that go wrong on one rank alone: all ranks decide alike, and the rank is named where it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import recipe_for
from tiny import next_port, run_ranks

from trainer.checkpoint.manifest import newest
from trainer.config import RunError, build_recipe
from trainer.session import open_session
from trainer.tracking import read_rows
from trainer.train import train, train_step

ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "fsdp2"},
    "replicated": {"kind": "fsdp2", "shard_size": 1},
    "zero1": {"kind": "deepspeed", "config": "zero1"},
    "zero2": {"kind": "deepspeed", "config": "zero2"},
    "zero3": {"kind": "deepspeed", "config": "zero3"},
}


def values(run: Any) -> list[torch.Tensor]:
    """This rank's masters and moments."""
    found = []
    for slot in run.engine.slots():
        for piece in slot.pieces:
            found.append(slot.value(piece).clone())
            found += [slot.moment(kind, piece).clone() for kind in ("exp_avg", "exp_avg_sq") if kind in slot.state]
    return found


def poison_one_rank(rank: int, folder: Path, model: Path, data: Path, engines: list[str]) -> None:
    """Rank 1's loss is NaN in step 3: that update is skipped on both, the next is made; three in a row end the run."""
    for engine in engines:
        recipe = recipe_for(folder / engine, model, data, engine=ENGINES[engine])
        try:
            with open_session(build_recipe(recipe), console=False) as run:
                backward = run.engine.backward

                def poisoned(loss: Any, *, last: bool, run: Any = run, backward: Any = backward) -> None:
                    bad = rank == 1 and (run.step + 1 == 3 or run.step + 1 >= 6)
                    backward(loss * float("nan") if bad else loss, last=last)

                run.engine.backward = poisoned  # type: ignore[method-assign]
                for step in (1, 2):
                    assert not train_step(run).skipped, step
                before = values(run)
                assert train_step(run).skipped
                assert all(torch.equal(a, b) for a, b in zip(before, values(run), strict=True))
                assert not train_step(run).skipped
                assert not all(torch.equal(a, b) for a, b in zip(before, values(run), strict=True))
                train(run)
        except RunError as error:
            assert "3 steps in a row without a finite gradient" in str(error), error
        else:
            raise AssertionError("went on with NaN")
        next_port()


def check_poisoned(folder: Path) -> None:
    rows = [row for row in read_rows(folder) if row["kind"] == "step"]
    assert [row["step"] for row in rows if row["skipped"]] == [6, 7, 8]  # step 3 was made by hand, unrecorded
    assert newest(folder / "checkpoints")  # that of step 6: finite, since nothing was applied


def test_nan_on_one_rank_skips_on_all(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    run_ranks(2, poison_one_rank, tmp_path, tiny_folder, chats, ["fsdp2"])
    check_poisoned(tmp_path / "fsdp2")


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_nan_on_one_rank_of_every_engine(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    engines = ["replicated", "zero1", "zero2", "zero3"]
    run_ranks(2, poison_one_rank, tmp_path, tiny_folder, chats, engines)
    for engine in engines:
        check_poisoned(tmp_path / engine)


def flip_one_bit(rank: int, folder: Path, model: Path, data: Path, engines: list[str]) -> None:
    """Rank 1's copy loses one bit after step 5's update, which under ZeRO writes the copies anew; step 5's comparison
    names it."""
    for engine in engines:
        recipe = recipe_for(folder / engine, model, data, engine=ENGINES[engine], guard={"replica_check": 5})
        try:
            with open_session(build_recipe(recipe), console=False) as run:
                for _ in range(4):
                    train_step(run)
                    run.check_replicas_if_due()
                train_step(run)
                if rank == 1:
                    replica = next(iter(run.engine.replicas()))
                    local = replica.tensor.detach().view(-1)
                    assert replica.ranks == (0, 1)
                    local[:1].view(torch.int32)[0] ^= 1 << 12
                run.check_replicas_if_due()
        except RunError as error:
            who = "ranks 0, 1" if engine == "replicated" else "rank 1"  # of two equal copies nobody knows the right one
            assert f"step 5: {who}: " in str(error), error
        else:
            raise AssertionError("not seen")
        next_port()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_copy_that_lost_a_bit_names_its_rank(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    run_ranks(2, flip_one_bit, tmp_path, tiny_folder, chats, ["zero1", "zero2", "replicated"])
