"""Recipes on files that a test writes, with a tiny tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_cases import chat, make_tokenizer, write_jsonl

from trainer.config import Recipe, build_recipe


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that AutoTokenizer loads."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_on(model_folder: Path) -> Callable[..., Recipe]:
    """A recipe with one training source; keyword arguments are the source's, `model`, `top` go elsewhere."""

    def make(
        path: Path | str, model: dict[str, Any] | None = None, top: dict[str, Any] | None = None, **source: Any
    ) -> Recipe:
        settings = {"format": "messages", **source}
        data = {
            "name": "t",
            "model": {"path": str(model_folder), "max_length": 512, **(model or {})},
            "sources": {"s": {"path": str(path), **settings}},
            **(top or {}),
        }
        return build_recipe(data)

    return make


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Forty short conversations of different lengths."""
    return write_jsonl(tmp_path / "chats.jsonl", [chat(f"q{n}", "a" * (1 + n % 7)) for n in range(40)])
