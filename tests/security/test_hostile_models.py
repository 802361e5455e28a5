"""Base models that mean harm are refused before a library reads them: at once, in little memory, naming the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import bounded, pickled_command
from hostile_models import MODELS

from trainer.check import check_paths
from trainer.config import UserError, build_recipe
from trainer.config.hub_model import model_folder
from trainer.config.model_facts import UnknownModel, model_facts
from trainer.config.model_files import check_model_folder
from trainer.config.safetensors_header import read_header
from trainer.config.schema import Model, Tuning
from trainer.data.tokenizer import load_tokenizer
from trainer.model.load import load_network

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A good model, to be spoilt."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", MODELS)
def test_refused(name: str, folder: Path, tmp_path: Path) -> None:
    make, expected = MODELS[name]
    canary = tmp_path / "canary"
    make(folder, canary)
    with bounded(), pytest.raises(UserError) as caught:
        check_model_folder(folder, "the/model")
    message = str(caught.value)
    assert message.startswith("model.path: the/model: ") and expected in message and "\n" not in message
    assert len(message) < 600 and not canary.exists()


def test_the_good_model_is_not_refused(folder: Path) -> None:
    check_model_folder(folder, "it")
    names = set(read_header(folder / "model.safetensors"))
    assert "model.embed_tokens.weight" in names and "__metadata__" not in names


@pytest.mark.parametrize("name", ["pickle alone", "adapter as a pickle", "tensors overlap", "vocabulary of 10^12"])
def test_every_way_to_a_model_looks_first(name: str, folder: Path, tmp_path: Path) -> None:
    """The checks before a run, loading itself, and the facts for the memory estimate."""
    make, expected = MODELS[name]
    canary = tmp_path / "canary"
    make(folder, canary)
    recipe = {"name": "x", "model": {"path": str(folder)}, "sources": {"s": {"path": "x/y", "format": "text"}}}
    with pytest.raises(UserError, match=r"model\.path"):
        check_paths(build_recipe(recipe | {"objective": {"name": "language-modeling"}}))
    with pytest.raises(UserError) as caught:
        load_network(Model(path=str(folder)), Tuning(), seed=1)
    assert expected in str(caught.value) and not canary.exists()


@pytest.mark.parametrize("name", ["tokenizer a pipe", "tokenizer settings deep", "tokenizer of 1 GiB"])
def test_the_tokenizer_is_looked_at(name: str, folder: Path, tmp_path: Path) -> None:
    make, expected = MODELS[name]
    make(folder, tmp_path / "canary")
    with pytest.raises(UserError) as caught:
        load_tokenizer(Model(path=str(folder)))
    assert expected in str(caught.value)


def test_pickles_beside_the_weights_are_left_alone(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "x.npy"):
        (folder / name).write_bytes(pickled_command(canary))
    load_network(Model(path=str(folder), dtype="float32"), Tuning(), seed=1)
    load_tokenizer(Model(path=str(folder)))
    assert not canary.exists()


def test_a_hub_cache_of_links_works_and_a_pickle_in_it_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache as it lies on the disk: blobs, a snapshot of links into them, a branch that names the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--owner--name"
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    shutil.move(folder, place / "blobs")
    for blob in (place / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = Model(path="owner/name", dtype="float32")
    assert model_folder(model, weights=True) == snapshot
    load_network(model, Tuning(), seed=1)
    load_tokenizer(model)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "pytorch_model.bin").write_bytes(pickled_command(tmp_path / "canary"))
    with pytest.raises(UserError, match=r"model.path: owner/name: pytorch_model.bin: a pickle"):
        load_network(model, Tuning(), seed=1)
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    "content",
    [
        b"", b"GGUF", b"nope" * 99, b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16,
        b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1 << 60).to_bytes(8, "little"),
        b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + (1 << 50).to_bytes(8, "little"),
    ],
    ids=["empty", "cut", "no gguf", "2^64 tensors", "2^60 values", "a key of 2^50 bytes"],
)  # fmt: skip
def test_gguf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    recipe = {"name": "x", "model": {"path": str(path)}, "sources": {"s": {"path": "x/y", "format": "text"}}}
    with bounded(), pytest.raises(UserError, match=r"model.path: .*m\.gguf.*: not a GGUF file that can be read"):
        check_paths(build_recipe(recipe | {"objective": {"name": "language-modeling"}}))
    with bounded(), pytest.raises(UnknownModel):
        model_facts(Model(path=str(path)))


# ---------------------------------------------------------------- a model's own code

MODULE = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
LOADING = """
import socket, sys
def refuse(*given, **named):
    print("network:", given[-1], flush=True)
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
from trainer.config import UserError
from trainer.config.schema import Model, Tuning
from trainer.data.tokenizer import load_tokenizer
from trainer.model.load import load_network
for path in sys.argv[2:]:
    model = Model(path=path, dtype="float32", trust_remote_code=sys.argv[1] == "on")
    for load in (load_tokenizer, lambda model: load_network(model, Tuning(), seed=1)):
        try:
            print(type(load(model)).__name__)
        except UserError as error:
            print("refused:", str(error).replace("\\n", " "))
"""


def with_code(folder: Path, canary: Path, model_type: str) -> None:
    """Give a model code of its own in every place that transformers looks for it."""
    for path, changes in (
        ("config.json", {"model_type": model_type, "architectures": ["OwnModel"], "auto_map": {
            "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}),
        ("tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": {
            "AutoTokenizer": [None, "own.OwnTokenizer"]}}),
    ):  # fmt: skip
        (folder / path).write_text(json.dumps(json.loads((folder / path).read_text()) | changes))
    (folder / "own.py").write_text(MODULE.format(canary=str(canary)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(MODULE.format(canary=str(canary)) + "def generate(): 0\n")


def loaded(switch: str, cache: Path, *folders: Path) -> list[str]:
    """What became of the tokenizer and the network of each folder, in a process of their own that tells of every look
    at a network: a folder needs none."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOADING, switch, *map(str, folders)]
    streams = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, env=environment, timeout=110, **streams)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_a_models_own_code_does_not_run_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    shutil.copytree(folder, tmp_path / "llama")
    with_code(folder, canary, "own")
    with_code(tmp_path / "llama", canary, "llama")
    said = loaded("off", tmp_path / "modules", folder, tmp_path / "llama")
    assert not canary.exists() and not list((tmp_path / "modules").rglob("own.py"))
    *refused, llama = said  # transformers has a llama of its own
    assert len(refused) == 3 and llama == "LlamaForCausalLM"
    assert all(line.startswith("refused:") and "set `model.trust_remote_code: true`" in line for line in refused)


def test_a_models_own_code_runs_where_the_recipe_says_so(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with_code(folder, canary, "own")
    assert loaded("on", tmp_path / "modules", folder) == ["OwnTokenizer", "OwnModel"] and canary.exists()


def test_code_of_another_repository_is_not_pinned(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "someone/else--modeling.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    check_model_folder(folder, "it")
    with pytest.raises(UserError, match=r"config\.json: auto_map: 'someone/else--modeling\.Model'"):
        check_model_folder(folder, "it", trusted=True)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123456", "0123456789ABCDEF0123456789abcdef01234567 "])
def test_trust_needs_a_commit(revision: str | None) -> None:
    model = {"path": "owner/name", "trust_remote_code": True} | ({"revision": revision} if revision else {})
    recipe = {"name": "x", "model": model, "sources": {"s": {"path": "x/y", "format": "messages"}}}
    with pytest.raises(UserError, match=r"model\.trust_remote_code: true: .*commit"):
        build_recipe(recipe)
    model["revision"] = "0123456789abcdef0123456789abcdef01234567"
    assert build_recipe(recipe).model.trust_remote_code
