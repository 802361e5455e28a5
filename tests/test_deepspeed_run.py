"""Whole runs under DeepSpeed: evaluation and answers in between, resumption, launchers, loading, nothing compiled."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from test_resume import dropping, identical, run_until
from test_same_numbers import CUTS, outcome, recipe_for, run_here
from tiny import byte_tokenizer, free_ports, next_port, run_ranks, tiny_llama, write_chats

from trainer.config import UserError, build_recipe
from trainer.session import open_session
from trainer.tracking import read_run

GATHERED = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000}  # no parameter stays whole


def settings_file(folder: Path, zero: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "zero.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    return str(file)


def evaluated(folder: Path, model: Path, data: Path, held_out: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """LoRA with answers generated first, before any other forward, and between the steps."""
    recipe = recipe_for(folder, model, data, "lora", CUTS["packed-micro"], engine=engine)
    files = {"chats": data, "held": held_out}
    return recipe | {
        "sources": {name: {"path": str(path), "format": "messages"} for name, path in files.items()},
        "mixture": {"chats": 1.0},
        "until": {"steps": 4, "epochs": None},
        "evaluation": {
            "every": 2,
            "suites": [
                {"name": "answers", "kind": "generate", "source": "held", "metrics": ["exact_match"], "batch": 3}
                | {"max_new_tokens": 5},
                {"name": "loss", "kind": "loss", "source": "held"},
            ],
        },
    }


def in_ranks(rank: int, watched: dict[str, Any], stopped: dict[str, Any], straight: dict[str, Any]) -> None:
    assert run_here(watched) == "complete"
    next_port()
    assert run_until(stopped, 7) == "preempted"
    next_port()
    assert run_here(stopped) == "complete"
    next_port()
    assert run_here(straight) == "complete"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chats: Path) -> Path:
    """Two ranks, stage 3: a run that is evaluated, one that is stopped and goes on, one that is not."""
    home = tmp_path_factory.mktemp("deepspeed-runs")
    held = write_chats(home / "held.jsonl", 7, seed=5)
    engine = {"kind": "deepspeed", "config": settings_file(home, GATHERED)}
    assert run_here(evaluated(home / "alone", tiny_folder, chats, held, {"kind": "single"})) == "complete"
    watched = evaluated(home / "watched", tiny_folder, chats, held, engine)
    rest = [dropping(home / name, tiny_folder, chats, "full") | {"engine": engine} for name in ("stopped", "straight")]
    run_ranks(2, in_ranks, watched, *rest)
    return home


@pytest.mark.timeout(300)
def test_evaluation_and_answers_in_between_are_those_of_one_process(runs: Path) -> None:
    files = sorted(path.name for path in (runs / "alone" / "evaluation").iterdir())
    assert len(files) == 6
    for name in files:
        alone, found = (json.loads((runs / run / "evaluation" / name).read_text()) for run in ("alone", "watched"))
        assert found.get("predictions") == alone.get("predictions")
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
    found, alone = outcome(runs / "watched"), outcome(runs / "alone")
    assert found.losses == pytest.approx(alone.losses, rel=1e-5)
    assert read_run(runs / "watched")["loading"] == "sharded"


@pytest.mark.timeout(300)
def test_a_stopped_run_goes_on_bit_for_bit(runs: Path) -> None:
    identical(outcome(runs / "stopped"), outcome(runs / "straight"))
    assert read_run(runs / "stopped")["restarts"] == 1


def test_without_deepspeed_the_command_to_install_it(
    tmp_path: Path, tiny_folder: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.engine

    monkeypatch.setattr(trainer.engine, "find_spec", lambda name: None)
    recipe = recipe_for(tmp_path / "run", tiny_folder, chats, "lora", CUTS["packed"], engine={"kind": "deepspeed"})
    with (
        pytest.raises(UserError, match=r"not installed; run `pip install 'tunesmith\[deepspeed\]'`"),
        open_session(build_recipe(recipe)),
    ):
        pass
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- launchers, on a machine as it comes


def write_recipe(folder: Path, model: Path, data: Path, engine: dict[str, Any]) -> Path:
    recipe = recipe_for(folder / "run", model, data, "lora", CUTS["packed-micro"], engine=engine)
    with (folder / "recipe.yaml").open("w") as file:
        YAML(typ="safe").dump(recipe | {"until": {"steps": 3, "epochs": None}}, file)
    return folder / "recipe.yaml"


TRAIN = ["-m", "trainer", "train"]


def command(launcher: str) -> list[str]:
    """What a user types before the recipe's path."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *TRAIN]
    if launcher == "deepspeed":
        script, port = str(Path(sys.executable).with_name("deepspeed")), free_ports(1)[0]
        return [script, "--num_gpus=2", f"--master_port={port}", "--module", *TRAIN[1:]]
    return [sys.executable, *TRAIN]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("launcher", ["alone", "torchrun", "deepspeed"])
def test_every_launcher_starts_it_and_nothing_is_compiled(
    launcher: str, stage: int, tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    extensions = tmp_path / "extensions"  # where DeepSpeed would build
    offloaded = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    engine = {"kind": "deepspeed", "config": settings_file(tmp_path, offloaded)}
    file = write_recipe(tmp_path, tiny_folder, chats, engine)
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
    done = subprocess.run(
        [*command(launcher), str(file)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_run(tmp_path / "run")
    assert (record["status"], record["engine"]) == ("complete", "deepspeed")
    assert record["world_size"] == (1 if launcher == "alone" else 2)
    assert not extensions.exists() or not list(extensions.rglob("*"))
    if launcher != "deepspeed":  # whose own lines are its own
        assert not [line for line in (done.stdout + done.stderr).splitlines() if "[INFO]" in line or "MA " in line]


# ---------------------------------------------------------------- memory of loading

WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 8}
WIDE |= {"num_key_value_heads": 8}


def resident(which: str) -> int:
    """Bytes of this process that are in memory now (VmRSS) or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def load_and_measure(rank: int, model: str, zero: dict[str, Any], loading: str, out: str) -> None:
    """The growth of this process's largest resident size over loading and sharding, in bytes."""
    from trainer.config.schema import Engine, Optimizer
    from trainer.engine.deepspeed import DeepSpeedEngine, load_deepspeed
    from trainer.model.build import build_unread
    from trainer.world import connected, environment_world

    file = settings_file(Path(out) / f"{loading}-{rank}", zero)
    recipe = recipe_for(Path(out), Path(model), Path("none.jsonl"), "lora", CUTS["packed"])
    recipe["engine"] = {"kind": "deepspeed", "config": file, "loading": loading}
    with connected(environment_world()) as world:
        load_deepspeed(world)
        for module in ("peft", "transformers.models.llama.modeling_llama", "transformers.generation"):
            importlib.import_module(module)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        trainee = build_unread(build_recipe(recipe), 2)
        DeepSpeedEngine(trainee, Optimizer(), 1e-3, Engine(kind="deepspeed", config=file), torch.float32, world)
        grown = resident("VmHWM") - before
        held = sum(parameter.ds_tensor.nbytes for parameter in trainee.parameters())
    Path(out, f"{loading}-{rank}.json").write_text(json.dumps({"grown": grown, "held": held}))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    network = tiny_llama(**WIDE)
    network.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    whole = sum(parameter.numel() * 4 for parameter in network.parameters())
    zero = GATHERED | {"reduce_bucket_size": 1_000_000, "sub_group_size": 1_000_000_000}
    for loading in ("whole", "sharded"):
        run_ranks(2, load_and_measure, str(tmp_path / "model"), zero, loading, str(tmp_path))
    shutil.rmtree(tmp_path / "model")
    measured = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    for rank in (0, 1):
        assert measured[f"sharded-{rank}"]["held"] == pytest.approx(whole / 2, rel=0.05)
        assert measured[f"whole-{rank}"]["grown"] > whole
        assert measured[f"sharded-{rank}"]["grown"] < 0.8 * whole, (whole, measured)
