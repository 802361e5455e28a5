"""The digest of a base model's files: it tells bases apart, and nothing else."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from trainer.config import UserError
from trainer.config.schema import Model
from trainer.model.files import base_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def digest(folder: Path) -> str:
    return base_digest(Model(path=str(folder)))


def test_another_place_or_other_files_of_the_same_tensors_are_the_same_base(folder: Path, tmp_path: Path) -> None:
    first = digest(folder)
    shutil.copytree(folder, tmp_path / "moved")
    assert digest(tmp_path / "moved") == first
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert digest(tmp_path / "sharded") == first


def test_one_changed_tensor_is_another_base(folder: Path) -> None:
    first = digest(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.001
    save_file(tensors, file, metadata={"format": "pt"})
    assert digest(folder) != first


def test_dtype_and_configuration_count(folder: Path, tmp_path: Path) -> None:
    found = {digest(folder)}
    tiny_llama(tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(tmp_path / "low")
    found.add(digest(tmp_path / "low"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    found.add(digest(folder))
    assert len(found) == 3
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "0.0.0"}, indent=9))
    assert digest(folder) in found  # who wrote it, and how, does not count


def test_a_gguf_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + bytes(100_000))
    first = digest(file)
    data = bytearray(file.read_bytes())
    data[50_000] = 1
    file.write_bytes(bytes(data))
    assert digest(file) != first


@pytest.mark.parametrize("damage", ["absent", "cut", "index"])
def test_what_is_missing_or_damaged_is_named(folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"model\.path: .*(model\.safetensors|gone\.safetensors)"):
        digest(folder)
