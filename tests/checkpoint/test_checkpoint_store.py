"""Round trips: bit for bit, at every world size, for every optimizer; agreement of ranks; retention."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_cases import FlatEngine, checkpoints, in_threads, logical, ok, single, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainer.checkpoint import CheckpointError, image, load, newest, save, shard_file, store, verify
from trainer.config.errors import UserError
from trainer.world import World

STATE = {"loader": {"position": 12, "seed": 3}, "best": None, "note": "Größe", "x": [1, 2.5, True]}


@pytest.mark.parametrize(
    ("name", "width"),
    [("adamw", 5), ("sgd", 5), ("lion", 5), ("adamw8bit", 1000), ("muon", 5)],
    ids=lambda value: str(value),
)
def test_a_restored_engine_is_bitwise_the_saved_one_and_trains_on_bitwise(
    tmp_path: Path, name: str, width: int
) -> None:
    options = {"momentum": 0.9} if name == "sgd" else {}
    source = single(0, name, width, **options)
    train(source, 3)
    save(tmp_path, 3, source, World(), STATE)
    target = single(1, name, width, **options)
    train(target, 1, first=50)  # state of another course, all of it to be overwritten
    loaded = load(tmp_path, target, World())
    assert (loaded.step, loaded, loaded.refused) == (3, STATE, ())
    assert logical([target]) == logical([source])
    assert train(target, 3, first=3) == train(source, 3, first=3)
    assert logical([target]) == logical([source])


def test_8_bit_state_is_saved_whole(tmp_path: Path) -> None:
    engine = single(0, "adamw8bit", 1000)
    train(engine, 2)
    path = save(tmp_path, 2, engine, World(), {})
    tensors = load_file(path / "rank-00000-of-00001.safetensors")
    assert tensors["whole/state1/body.weight"].dtype == torch.uint8
    assert tensors["whole/state1/body.weight"].shape == (6, 1000)
    assert tensors["whole/absmax1/body.weight"].shape == (24,)  # 6000 elements in blocks of 256
    assert tensors["state1/body.bias@0"].dtype == torch.float32  # small ones stay in 32 bits and can be cut


def test_parameters_without_state_yet_come_back_without(tmp_path: Path) -> None:
    fresh = single(0)
    save(tmp_path, 0, fresh, World(), {})
    stepped = single(1)
    train(stepped, 2)
    load(tmp_path, stepped, World())
    assert logical([stepped]) == logical([fresh])
    assert train(stepped, 3) == train(single(0), 3)
    train(fresh, 1)  # head_from=2: all but `head` have state now
    save(tmp_path, 1, fresh, World(), {})
    other = single(2)
    train(other, 4)
    load(tmp_path, other, World())
    assert logical([other]) == logical([fresh])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=4),
)
def test_any_world_size_reads_what_any_other_wrote(
    tmp_path_factory, sizes: list[int], shapes: list[tuple[int, ...]]
) -> None:
    named = {f"layer.{index}": shape for index, shape in enumerate(shapes)}
    folder = tmp_path_factory.mktemp("reshard")
    expected = None
    for step, size in enumerate(sizes):

        def work(world: World, step: int = step) -> FlatEngine:
            engine = FlatEngine(world, seed=step, shapes=named)
            if step:
                assert load(folder, engine, world).step == step - 1
                assert engine.loads == 1
            else:
                engine.train(2)
            save(folder, step, engine, world, {"step": step})
            return engine

        engines = ok(in_threads(size, work))
        state = logical(engines)
        expected = expected or state
        assert state == expected
    assert all(verify(path).state == {"step": verify(path).step} for path in newest(folder))


def test_the_files_are_plain_safetensors_and_json_of_the_documented_form(tmp_path: Path) -> None:
    ok(in_threads(3, lambda world: save(tmp_path, 50, FlatEngine(world), world, STATE)))
    path = tmp_path / "step-00000050"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "manifest.sha256", *(f"rank-{rank:05d}-of-00003.safetensors" for rank in range(3))
    ]  # fmt: skip
    assert (tmp_path / "latest").read_text() == "step-00000050\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["world_size"], manifest["state"]) == (2, 50, 3, STATE)
    # 30 + 6 + 1 + 1 + 18 = 56 elements in parts of 19: body.weight is cut at 19, head (from 38) lies on the last rank
    weight = next(t for t in manifest["tensors"] if t["name"] == "body.weight")
    assert weight["shape"] == [6, 5] and weight["dtype"] == "F32"
    assert [(r["start"], r["numel"]) for r in weight["ranges"]] == [(0, 19), (19, 11)]
    assert load_file(path / "rank-00001-of-00003.safetensors")["param/body.weight@19"].shape == (11,)
    assert os.system("cd '%s' && sha256sum -c --quiet manifest.sha256" % path) == 0  # noqa: S605, UP031


def test_retention_keeps_the_newest_and_counts_nothing_newer_than_the_step(tmp_path: Path) -> None:
    engine = checkpoints(tmp_path, 1, 2, 3, 4, 5)
    assert [path.name[-1] for path in newest(tmp_path)] == ["5", "4", "3"]
    for name in ("step-00000005", "step-00000004"):
        (tmp_path / name / "manifest.json").write_text("{}")
    save(
        tmp_path, 3, engine, World(), {}, keep=1
    )  # the newer ones are bad: the one just saved must not make room for them
    assert [path.name[-1] for path in newest(tmp_path)] == ["5", "4", "3"]
    assert load(tmp_path, single(), World()).step == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    engine = checkpoints(tmp_path, 2)
    save(tmp_path, 2, engine, World(), {"again": 1})
    assert load(tmp_path, single(), World()) == {"again": 1}
    # killed between the two renames of that rewrite: the old one, set aside, still counts
    (tmp_path / "step-00000002").rename(tmp_path / ".replaced-step-00000002")
    loaded = load(tmp_path, single(1), World())
    assert (loaded.step, loaded) == (2, {"again": 1})


def test_values_that_are_not_finite_are_never_published(tmp_path: Path) -> None:
    for poison in (float("nan"), float("inf"), float("-inf")):

        def work(world: World, poison: float = poison) -> None:
            engine = FlatEngine(world)
            engine.train(1)
            if world.rank == 1:
                engine.optimizer.state[engine.master]["exp_avg"][3] = poison
            save(tmp_path, 1, engine, world, {})

        for result in in_threads(2, work):
            assert isinstance(result, CheckpointError)
            assert "exp_avg/" in str(result) and "not finite" in str(result) and "rank 1 of 2" in str(result)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="not JSON compliant"):
        save(tmp_path, 1, single(), World(), {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("writes", [0, 1])
def test_a_full_disk_on_one_rank_fails_all_and_leaves_the_old_one(
    tmp_path, monkeypatch, failing: int, writes: int
) -> None:
    def saved(step: int, world: World) -> Path:
        engine = FlatEngine(world, shapes={"body": (50, 50)})  # 5,000 bytes a rank: two pages
        return save(tmp_path, step, engine, world, {})

    ok(in_threads(2, lambda world: saved(1, world)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done, write = [], shard_file._write

    def full(file, chunk) -> None:
        name = os.readlink(f"/proc/self/fd/{file}")
        if f"rank-{failing:05d}" in name:
            done.append(len(chunk))
            if len(done) > writes:
                write(file, chunk[: len(chunk) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", name)
        write(file, chunk)

    monkeypatch.setattr(image, "CHUNK", image.PAGE)
    monkeypatch.setattr(shard_file, "_write", full)
    for result in in_threads(2, lambda world: saved(2, world)):
        assert (
            isinstance(result, CheckpointError)
            and "No space left" in str(result)
            and f"rank {failing} of 2" in str(result)
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    ok(in_threads(2, lambda world: saved(2, world)))
    assert [path.name[-1] for path in newest(tmp_path)] == ["2", "1"]


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_full_disk_at_the_last_small_files(tmp_path: Path, monkeypatch, name: str) -> None:
    checkpoints(tmp_path, 1)
    write = store.write_file

    def full(path: Path, data: bytes) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(store, "write_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2, single(), World(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_another_model_or_optimizer_is_refused_with_the_names(tmp_path: Path) -> None:
    checkpoints(tmp_path, 3)
    with pytest.raises(
        UserError, match=r"1 parameters differ: body.weight: saved \[6, 5\] F32, trainable now \[6, 4\] F32"
    ):
        load(tmp_path, single(width=4), World())
    frozen = single()
    frozen.model.head.requires_grad_(False)
    with pytest.raises(UserError, match=r"head: saved \[3, 6\] F32, trainable now not"):
        load(tmp_path, type(frozen)(frozen.model, *_settings()), World())
    for name in ("sgd", "lion", "adamw8bit"):
        with pytest.raises(UserError, match="resume with the same optimizer"):
            load(tmp_path, single(optimizer=name), World())


def _settings():
    from trainer.config.schema import Optimizer

    return Optimizer(), 0.05, World()


def test_8_bit_state_cut_over_ranks_is_the_users_error(tmp_path: Path) -> None:
    def work(world: World) -> None:
        engine = FlatEngine(world)
        engine.train(1)
        state = engine.optimizer.state[engine.master]
        state["state1"] = torch.zeros(engine.master.numel(), dtype=torch.uint8)
        save(tmp_path, 1, engine, world, {})

    for result in in_threads(2, work):
        assert isinstance(result, UserError) and "optimizer.name" in str(result)
    assert list(tmp_path.iterdir()) == []


def test_values_alone_load_into_an_engine_of_any_optimizer(tmp_path: Path) -> None:
    source = checkpoints(tmp_path, 3)
    target = single(1, "sgd")
    seen: list[dict] = []
    load(tmp_path, target, World(), seen.append, optimizer=False)
    values = {key: value for key, value in logical([source]).items() if key.startswith("param/")}
    assert {key: value for key, value in logical([target]).items() if key.startswith("param/")} == values
    assert seen == [{"position": 3}]


def test_prepare_runs_before_the_engine_is_touched(tmp_path: Path) -> None:
    checkpoints(tmp_path, 3)
    target = single(1)
    before = logical([target])

    def refuse(state: dict) -> None:
        raise UserError("data differ")

    with pytest.raises(UserError, match="data differ"):
        load(tmp_path, target, World(), refuse)
    assert logical([target]) == before
