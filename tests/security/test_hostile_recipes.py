"""Recipes and overrides that mean harm are refused in one line, in time, and run nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bounds import bounded
from hostile_recipes import BASE, FILES, OVERRIDES

from trainer.check import check_paths
from trainer.config import UserError, build_recipe, load_recipe
from trainer.config.yaml_file import parse_yaml, read_yaml

SECONDS = 4.0  # the largest file that is read takes the pure-Python parser about two


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    text, part = FILES[name]
    canary = tmp_path / "canary"
    data = text.replace("{canary}", str(canary)).encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    (tmp_path / "recipe.yaml").write_bytes(data)
    assert part in failure(lambda: load_recipe(tmp_path / "recipe.yaml"))
    assert not canary.exists()


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(name: str, tmp_path: Path) -> None:
    item, part = OVERRIDES[name]
    canary = tmp_path / "canary"
    (tmp_path / "recipe.yaml").write_text(BASE)
    assert part in failure(lambda: load_recipe(tmp_path / "recipe.yaml", [item.replace("{canary}", str(canary))]))
    assert not canary.exists()


def failure(act: object) -> str:
    with bounded(SECONDS), pytest.raises(UserError) as caught:
        act()  # type: ignore[operator]
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path / "loop.yaml", Path("/dev/zero"), tmp_path / ("x" * 5_000)):
        failure(lambda path=path: read_yaml(path))


def test_numbers_and_words_are_those_of_yaml_1_2() -> None:
    expected = {"0o17": 15, "017": 17, "1e-4": 1e-4, "no": "no", "on": "on", "1:30": "1:30", "~": None}
    found = {text: parse_yaml(text, "x") for text in expected}
    assert found == expected and {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in expected.items()
    }


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder", "large", "NUL"])
def test_templates_and_data_that_are_no_files(kind: str, tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    """Neither the chat template nor a source may be what would never end, or fill memory."""
    path = str(tmp_path / "t")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        (tmp_path / "t").mkdir()
    elif kind == "large":
        (tmp_path / "t").touch()
        os.truncate(path, 1 << 40)
    else:
        path = kind if kind == "/dev/zero" else "a\0b"
    data = {"name": "x", "model": {"path": str(tiny_folder)}, "sources": {"s": {"path": path, "format": "messages"}}}
    assert "sources.s.path" in failure(lambda: check_paths(build_recipe(data)))
    data = {
        "name": "x",
        "model": {"path": str(tiny_folder), "chat_template": path},
        "sources": {"s": {"path": str(chats), "format": "messages"}},
    }
    assert "model.chat_template" in failure(lambda: check_paths(build_recipe(data)))
