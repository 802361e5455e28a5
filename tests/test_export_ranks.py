"""Export in one process of what several ranks wrote, under another engine: the same bytes, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import next_port, run_ranks

from trainer.checkpoint import load, newest, save, verify
from trainer.checkpoint.average import Average, write_average
from trainer.config import build_recipe, load_recipe
from trainer.engine.single import SingleEngine
from trainer.model.build import build_trainee
from trainer.revisit import Choice, export_run
from trainer.session import open_session
from trainer.train import train
from trainer.world import World

RUNS: dict[str, dict[str, Any]] = {
    "fsdp2-full": {"engine": {"kind": "fsdp2"}, "tuning": {"method": "full"}},
    "fsdp2-lora": {"engine": {"kind": "fsdp2"}, "tuning": {"rank": 4}},
    "zero2-full": {"engine": {"kind": "deepspeed", "config": "zero2"}, "tuning": {"method": "full"}},
    "zero3-lora": {"engine": {"kind": "deepspeed", "config": "zero3"}, "tuning": {"rank": 4}},
}


def train_all(rank: int, recipes: list[dict[str, Any]]) -> None:
    for index, recipe in enumerate(recipes):
        if index:
            next_port()
        with open_session(build_recipe(recipe), console=False) as run:
            run.status = train(run)


def train_in_ranks(folder: Path, model: Path, chats: Path, *names: str) -> list[Path]:
    """Two steps of each on two real processes, with moving averages."""
    shared = {
        "model": {"path": str(model), "dtype": "bfloat16", "max_length": 96},
        "sources": {"chats": {"path": str(chats), "format": "messages"}},
        "optimizer": {"lr": 0.01},
        "batch": {"examples": 6, "micro_tokens": 512},
        "until": {"steps": 2, "epochs": None},
        "ema": {"decay": 0.5},
    }
    run_ranks(2, train_all, [{"name": name, "output": str(folder / name), **shared, **RUNS[name]} for name in names])
    return [folder / name for name in names]


def test_export_of_two_ranks_is_bitwise_that_of_one_process(tiny_folder: Path, chats: Path, tmp_path: Path) -> None:
    for run in train_in_ranks(tmp_path, tiny_folder, chats, "fsdp2-full", "zero3-lora"):
        check_export(run)


@pytest.mark.slow
def test_export_of_two_ranks_of_the_other_pairs(tiny_folder: Path, chats: Path, tmp_path: Path) -> None:
    for run in train_in_ranks(tmp_path, tiny_folder, chats, "fsdp2-lora", "zero2-full"):
        check_export(run)


def check_export(run: Path) -> None:
    """The state that two ranks saved, loaded into one process and saved by that, exports to the same bytes."""
    one = run.with_name(f"one-{run.name}")
    (path,) = newest(run / "checkpoints")
    manifest = verify(path)
    assert len(manifest.files) == 2 and "ema" in {tensor.kind for tensor in manifest.tensors}
    one.mkdir()
    (one / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    loaded = load_recipe(run / "recipe.yaml")
    settings = loaded.stages[-1].optimizer
    alone = SingleEngine(build_trainee(loaded, 2), settings, settings.lr, World())
    state = load(path, alone, World(), optimizer=False)
    save(one / "checkpoints", manifest.step, alone, World(), dict(state))
    assert len(verify(newest(one / "checkpoints")[0]).files) == 1

    written = []
    for folder in (run, one):
        report = export_run(folder, folder / "export", False, Choice())
        assert report["max_difference"] <= report["tolerance"]
        assert report["base"] == ("files" if "lora" in run.name else "none")
        written.append({file.name: file.read_bytes() for file in (folder / "export").glob("*.safetensors")})
    assert written[0] == written[1] and list(written[0]) == ["model.safetensors"]
    export_run(run, run / "ema", False, Choice(ema=True))
    assert (run / "ema" / "model.safetensors").read_bytes() != written[0]["model.safetensors"]


WRITING = """
import gc, json, re, sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.checkpoint import Reader, verify
from trainer.checkpoint.assemble import Assembly
from trainer.checkpoint.base import file_base, layout_of
from trainer.checkpoint.tensor_files import write_model
from trainer.checkpoint.weights import Weights
from trainer.config.schema import Model

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

base, saved, out = map(Path, sys.argv[1:])
out.mkdir()
with torch.device("meta"):
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16)
weights = Weights(Reader(saved, verify(saved)))
assembly = Assembly(layout_of(network), weights, 2.0, torch.bfloat16)
frozen = file_base(Model(path=str(base)), assembly.layout, assembly.needed)
torch.ones(64, 64) @ torch.ones(64, 64)  # what the first product sets up
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
write_model(out, assembly.planned, lambda name: assembly.make(name, frozen), limit=40_000_000)
print(json.dumps({"grown": peak() - before, "written": sum(f.stat().st_size for f in out.iterdir())}))
"""


class Held:
    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values, self.shapes = values, {name: tuple(value.shape) for name, value in values.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.values[name]


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_writing_takes_the_memory_of_a_tensor_and_not_of_the_model(method: str, tmp_path: Path) -> None:
    """A model of 115 MB in bf16 (230 MB as it is trained) is written in a few times its largest tensor of 3 MB.

    A merge holds the base and the change in fp32 and the bf16 result: 10 bytes an element, 16 MB here.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, vocab_size=1000,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    base = tmp_path / "base"
    config.save_pretrained(base)
    values = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(values, base / "model.safetensors", {"format": "pt"})
    largest = max(shape.numel() for shape in shapes.values())
    if method == "full":
        trained = {f"network.{name}": value.float() for name, value in values.items()}
    else:
        trained = {}
        for name, shape in shapes.items():
            if name.endswith("proj.weight"):
                module = f"network.base_model.model.{name.removesuffix('.weight')}"
                trained[f"{module}.lora_A.default.weight"] = torch.full((4, shape[1]), 0.25)
                trained[f"{module}.lora_B.default.weight"] = torch.full((shape[0], 4), 0.5)
    saved = write_average(tmp_path / "saved", Average([Held(trained)]), 1, {})
    command = [sys.executable, "-c", WRITING, *map(str, (base, saved, tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["written"] > 110_000_000
    assert found["grown"] < 14 * largest + 16_000_000, found
