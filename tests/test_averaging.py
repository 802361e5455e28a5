"""`tunesmith average` and what evaluates and exports its result, on real runs of a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_chats
from typer.testing import CliRunner

from trainer.averaging import Pick, average_run, parse_steps
from trainer.checkpoint import Reader, load, newest, open_checkpoint, save, verify
from trainer.checkpoint.manifest import step_name
from trainer.checkpoint.weights import Weights
from trainer.cli import app
from trainer.config import UserError, build_recipe
from trainer.config.errors import RunError
from trainer.engine.single import SingleEngine
from trainer.evaluation.results import read_result
from trainer.model.build import build_trainee
from trainer.revisit import Choice, evaluate_run, export_run
from trainer.session import open_session
from trainer.train import train
from trainer.world import World

STEPS = (2, 4, 6)


def run_of(folder: Path, model: Path, chats: Path, **changes: Any) -> Path:
    """A run of six steps with a checkpoint and an evaluation after every second."""
    held_out = write_chats(folder / "held-out.jsonl", 8, seed=9)
    recipe = {
        "name": "run",
        "output": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32", "max_length": 96},
        "tuning": {"rank": 4, "alpha": 8},
        "sources": {
            "chats": {"path": str(chats), "format": "messages"},
            "held-out": {"path": str(held_out), "format": "messages"},
        },
        "mixture": {"chats": 1.0},
        "optimizer": {"lr": 0.01},
        "batch": {"examples": 6, "micro_tokens": 512},
        "until": {"steps": STEPS[-1], "epochs": None},
        "evaluation": {"every": 2, "suites": [{"name": "held", "source": "held-out"}]},
        "checkpoint": {"every": 2, "keep": 9},
    } | changes
    with open_session(build_recipe(recipe), console=False) as run:
        run.status = train(run)
    return folder / "run"


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chats: Path) -> Path:
    return run_of(tmp_path_factory.mktemp("lora"), tiny_folder, chats)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chats: Path) -> Path:
    return run_of(tmp_path_factory.mktemp("full"), tiny_folder, chats, tuning={"method": "full"})


def exported(run: Path, out: Path, choice: Choice) -> dict[str, torch.Tensor]:
    report = export_run(run, out, False, choice)
    assert report["max_difference"] <= report["tolerance"]
    return load_file(out / "model.safetensors")


def test_an_average_of_adapters_exports_as_the_mean_of_the_merged_models(lora_run: Path, tmp_path: Path) -> None:
    path = average_run(lora_run, Pick(last=3), tell=lambda line: None)
    assert path == lora_run / "averages" / "last-3"
    singles = [exported(lora_run, tmp_path / str(step), Choice(step=step)) for step in STEPS]
    averaged = exported(lora_run, tmp_path / "average", Choice(average="last-3"))
    changed = 0
    for name, tensor in averaged.items():
        expected = torch.stack([single[name].double() for single in singles]).mean(0)
        assert torch.allclose(tensor.double(), expected, rtol=0, atol=1e-6), name
        changed += not torch.equal(tensor, singles[-1][name])
    assert changed == 14  # seven linear layers in each of two blocks
    report = export_run(lora_run, tmp_path / "adapter", True, Choice(average="last-3"))
    assert report["kind"] == "adapter"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 12 and config["lora_alpha"] == 24
    record = json.loads((lora_run / "averages" / "last-3.json").read_text())
    assert record["steps"] == list(STEPS) and record["tuning"] == {"rank": 12, "alpha": 24.0}
    assert set(record["metrics"]) == {"2", "4", "6"} and "loss" in record["metrics"]["6"]["held"]
    card = (tmp_path / "average" / "README.md").read_text()
    assert "average last-3 of steps 2, 4, 6" in card


def test_a_full_average_is_the_mean_bitwise_and_nothing_resumes_from_it(full_run: Path, tmp_path: Path) -> None:
    average_run(full_run, Pick(steps=parse_steps("6,2")), name="ends", tell=lambda line: None)
    two, six, mean = (
        exported(full_run, tmp_path / name, choice)
        for name, choice in (("2", Choice(step=2)), ("6", Choice()), ("m", Choice(average="ends")))
    )
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((two[name].double() + six[name].double()) / 2).float()), name
    assert [path.name for path in newest(full_run / "checkpoints")] == [step_name(step) for step in (6, 4, 2)]
    path = full_run / "averages" / "ends"
    assert newest(path.parent) == [] and verify(path).state["average"]["steps"] == [2, 6]


def test_evaluate_keeps_the_results_of_choices_apart(full_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    average_run(run, Pick(best=2), tell=lambda line: None)
    before = (run / "evaluation" / "held-step-00000006.json").read_bytes()
    lines = evaluate_run(run, [], Choice(average="best-2"))
    assert lines[0].startswith("held: {") and "base" in " ".join(lines[1:])
    found = read_result(run / "evaluation" / "averages" / "best-2" / "held-step-00000006.json")
    assert found["variant"] == "averages/best-2" and found["verdicts"]
    assert (run / "evaluation" / "held-step-00000006.json").read_bytes() == before
    middle = read_result(run / "evaluation" / "held-step-00000004.json")["metrics"]["loss"]
    evaluate_run(run, [], Choice(step=4))
    again = read_result(run / "evaluation" / "held-step-00000004.json")["metrics"]["loss"]
    assert again == pytest.approx(middle, rel=1e-6)


def test_best_is_the_step_that_was_measured_best(full_run: Path, tmp_path: Path) -> None:
    losses = {
        step: read_result(full_run / "evaluation" / f"held-{step_name(step)}.json")["metrics"]["loss"] for step in STEPS
    }
    average_run(full_run, Pick(best=1, metric="held/loss"), tell=lambda line: None)
    record = json.loads((full_run / "averages" / "best-1.json").read_text())
    best = min(losses, key=lambda step: losses[step])
    assert record["steps"] == [best] and record["metric"] == "held/loss"
    one, same = (exported(full_run, tmp_path / n, c) for n, c in (("b", Choice(best=True)), ("s", Choice(step=best))))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_greedy_soup_leaves_the_spoilt_checkpoint_out(
    method: str, lora_run: Path, full_run: Path, tmp_path: Path
) -> None:
    """Step 4 is replaced by weights far away from the path: whatever it is averaged with gets worse."""
    run = tmp_path / "run"
    shutil.copytree(lora_run if method == "lora" else full_run, run)
    from trainer.config import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    settings = recipe.stages[-1].optimizer
    engine = SingleEngine(build_trainee(recipe, 2), settings, settings.lr, World())
    state = load(run / "checkpoints" / step_name(4), engine, World(), optimizer=False)
    torch.manual_seed(0)
    for slot in engine.slots():
        for piece in slot.pieces:
            slot.value(piece).add_(torch.randn(piece.numel))
    shutil.rmtree(run / "checkpoints" / step_name(4))
    save(run / "checkpoints", 4, engine, World(), dict(state))
    said: list[str] = []
    path = average_run(run, Pick(greedy=True), tell=said.append)
    record = json.loads(path.with_name("greedy.json").read_text())
    rows = {row["step"]: row for row in record["greedy"]}
    assert rows[4]["kept"] is False and rows[4]["soup"] > rows[4 + 2]["alone"]
    assert 4 not in record["steps"] and set(record["steps"]) == {step for step, row in rows.items() if row["kept"]}
    assert "left out" in said[0] and "kept" in said[0] and str(path) in said[1]
    # what the table says of the last soup is what an evaluation of the stored average finds
    kept = [row["soup"] for row in record["greedy"] if row["kept"]][-1]
    evaluate_run(run, [], Choice(average="greedy"))
    newest_member = max(record["steps"])
    result = read_result(run / "evaluation" / "averages" / "greedy" / f"held-{step_name(newest_member)}.json")
    assert result["metrics"]["loss"] == pytest.approx(kept, rel=1e-5)


def test_last_passes_over_a_spoilt_checkpoint_and_a_named_one_must_be_good(full_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    shard = next((run / "checkpoints" / step_name(4)).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-9] ^= 4
    shard.write_bytes(data)
    path = average_run(run, Pick(last=2), tell=lambda line: None)
    assert verify(path).state["average"]["steps"] == [2, 6]
    with pytest.raises(RunError, match="SHA-256 differs"):
        average_run(run, Pick(steps=(2, 4)), tell=lambda line: None)
    with pytest.raises(UserError, match="2 good checkpoints, 3 asked for"):
        average_run(run, Pick(last=3), tell=lambda line: None)
    with pytest.raises(RunError, match="SHA-256 differs"):
        export_run(run, tmp_path / "out", False, Choice(step=4))


def test_a_moving_average_is_read_in_place_of_the_weights(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    run = run_of(tmp_path, tiny_folder, chats, ema={"decay": 0.5})
    checkpoint = open_checkpoint(run / "checkpoints")
    plain, moving = exported(run, tmp_path / "p", Choice()), exported(run, tmp_path / "m", Choice(ema=True))
    assert any(not torch.equal(plain[name], moving[name]) for name in plain)
    assert "ema" in checkpoint.kinds
    average = Weights(checkpoint, "ema")
    name = next(name for name in average.shapes if "lora_B" in name)
    assert not torch.equal(average.read(name), Weights(checkpoint).read(name))
    evaluate_run(run, [], Choice(ema=True))
    result = read_result(run / "evaluation" / "ema" / "held-step-00000006.json")
    plainly = read_result(run / "evaluation" / "held-step-00000006.json")["metrics"]["loss"]
    assert result["metrics"]["loss"] != plainly

    # where the run itself measures the average, `evaluate` does so too, and the best step is the average's
    recipe = (run / "recipe.yaml").read_text()
    assert recipe.count("evaluate: false") == 1
    (run / "recipe.yaml").write_text(recipe.replace("evaluate: false", "evaluate: true"))
    evaluate_run(run, [], Choice())
    again = read_result(run / "evaluation" / "held-step-00000006.json")["metrics"]["loss"]
    assert again == result["metrics"]["loss"]
    with pytest.raises(UserError, match="measured its moving average"):
        export_run(run, tmp_path / "best", False, Choice(best=True))
    export_run(run, tmp_path / "best", False, Choice(best=True, ema=True))


def test_the_verbs_as_a_user_types_them(full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_ALLOCATOR", "off")  # else the verb starts itself anew
    run = tmp_path / "run"
    shutil.copytree(full_run, run)

    def tunesmith(*arguments: Any) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "mean of steps 4, 6" in tunesmith("average", run, "--steps", "6,4", "--name", "end")
    greedy = tunesmith("average", run, "--greedy", "--metric", "held/loss")
    assert greedy.splitlines()[0].split() == ["step", "alone", "soup", "held/loss"] and len(greedy.splitlines()) == 5
    assert tunesmith("evaluate", run, "--average", "end").startswith("held: {")
    assert (run / "evaluation" / "averages" / "end" / "held-step-00000006.json").is_file()
    report = json.loads(tunesmith("export", run, "--average", "end", "--out", tmp_path / "out").splitlines()[-1])
    assert report["kind"] == "model" and (tmp_path / "out" / "config.json").is_file()
    for option in (["--step", "4"], ["--best"]):
        assert json.loads(tunesmith("export", run, "--out", tmp_path / "out", *option).splitlines()[-1])
    with pytest.raises(UserError, match="no rule"):
        CliRunner().invoke(app, ["average", str(run)], catch_exceptions=False)


def test_no_link_in_an_averages_or_a_results_folder_is_followed(full_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    for place in ("averages", "evaluation/averages/last-2"):
        (run / place).mkdir(parents=True, exist_ok=True)
        (run / place / ".trap").symlink_to(tmp_path / "elsewhere")
        for verb in (
            lambda: average_run(run, Pick(last=2), tell=lambda line: None),
            lambda: evaluate_run(run, [], Choice()),
        ):
            with pytest.raises(UserError, match="is a link"):
                verb()
        (run / place / ".trap").unlink()


def test_mistakes_are_told_before_anything_loads(full_run: Path, lora_run: Path, tmp_path: Path) -> None:
    quiet: Any = {"tell": lambda line: None}
    cases: list[tuple[str, Any]] = [
        ("give one of --last, --best", lambda: Pick()),
        ("--last and --greedy", lambda: Pick(last=2, greedy=True)),
        ("from 1 on", lambda: Pick(last=0)),
        ("--metric", lambda: Pick(last=2, metric="loss")),
        ("write 10,20,30", lambda: parse_steps("10;20")),
        ("--steps: 5: has no checkpoint; there are 2, 4, 6", lambda: average_run(full_run, Pick(steps=(5,)), **quiet)),
        ("names a step twice", lambda: average_run(full_run, Pick(steps=(4, 4)), **quiet)),
        ("--name", lambda: average_run(full_run, Pick(last=1), name="../up", **quiet)),
        ("measured at none of the steps", lambda: average_run(full_run, Pick(best=1, metric="rougeL"), **quiet)),
        ("--best: cannot stand beside --step", lambda: Choice(step=2, best=True)),
        ("give one of --average and --ema", lambda: Choice(average="a", ema=True)),
        ("--step: 5: has no checkpoint; there are 2, 4, 6", lambda: export_run(full_run, tmp_path, False, Choice(5))),
        ("not among", lambda: export_run(full_run, tmp_path / "o", False, Choice(average="../checkpoints"))),
        ("holds no averaged weights", lambda: export_run(full_run, tmp_path / "o", False, Choice(ema=True))),
        ("has no adapter", lambda: export_run(full_run, tmp_path / "o", True, Choice())),
    ]  # fmt: skip
    for words, call in cases:
        with pytest.raises(UserError, match=words):
            call()
    assert not (tmp_path / "o").exists()
    assert Reader(full_run / "checkpoints" / step_name(2), verify(full_run / "checkpoints" / step_name(2))).names()
