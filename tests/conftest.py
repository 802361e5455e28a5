"""Fixtures that all tests share; what they are made of is in tiny.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_llama, write_chats

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests never see the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TUNESMITH_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained-looking model with tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 short chats."""
    return write_chats(tmp_path_factory.mktemp("chats") / "train.jsonl", 60)
