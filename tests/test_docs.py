"""What the documentation says exists: recipes load, verbs and options are the command line's, keys the schema's, links
resolve."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from trainer.cli import app
from trainer.config import build_recipe, load_recipe
from trainer.config.written import RecipeFile
from trainer.config.yaml_file import parse_yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CALL = re.compile(r"(?:\btunesmith|-m trainer)((?: +--debug)?) +([a-z][a-z-]*)([^#\n]*)")
KEY = re.compile(
    r"(?<![\w./-])(?:model|tuning|engine|optimizer|schedule|batch|until|evaluation|checkpoint|tracking|guard)\.[a-z0-9_.]+"
)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str) -> Iterator[str]:
    """Fenced blocks other than Python's, and inline code: where commands and keys stand."""
    for block in FENCE.finditer(text):
        if block["info"] != "python":
            yield block["body"]
    yield from INLINE.findall(FENCE.sub("", text))


def wrong_calls(text: str) -> list[str]:
    """Verbs that the command line lacks, and options that the verb lacks."""
    wrong = []
    for piece in code(text):
        for _, verb, rest in CALL.findall(piece):
            if verb not in COMMANDS:
                wrong.append(verb)
                continue
            known = {option for parameter in COMMANDS[verb].params for option in parameter.opts} | {"--help"}
            wrong += [
                f"{verb} {option}" for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", rest) if option not in known
            ]
    return wrong


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schema sections in a field's type, whether plain, optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def is_key(dotted: str) -> bool:
    """Whether the schema has a dotted key; what stands for a suite's name or index is passed over."""
    models = [RecipeFile]
    for place, part in enumerate(parts := dotted.split(".")):
        found = [model.model_fields[part] for model in models if part in model.model_fields]
        if not found and place and parts[place - 1] == "suites":
            continue
        if not found:
            return False
        models = [section for field in found for section in sections(field.annotation)]
    return True


def is_module(dotted: str) -> bool:
    """Whether a dotted name begins with a module of the package that is no key as well, such as `model.root`."""
    package, module = dotted.split(".")[:2]
    return (ROOT / "trainer" / package / f"{module}.py").is_file() and not is_key(f"{package}.{module}")


def wrong_keys(text: str) -> list[str]:
    """Dotted recipe keys in code that the schema lacks."""
    found = [key.rstrip(".") for piece in code(text) for key in KEY.findall(piece)]
    return [key for key in found if not is_key(key) and not is_module(key)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        missing = not place.exists() or ROOT not in [place, *place.parents]
        if missing or (anchor and anchor not in anchors(place.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "# Expect: " in text, "a recipe begins with what it is and what to expect"
    assert path.name == "demo.yaml" or recipe.name == path.stem


def test_recipe_blocks_load() -> None:
    loaded = 0
    for page in PAGES:
        for block in FENCE.finditer(page.read_text(encoding="utf-8")):
            if block["info"].split() == ["yaml", "recipe"]:
                build_recipe(parse_yaml(block["body"], name_of(page)), name_of(page))
                loaded += 1
    assert loaded > 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_verbs_options_and_keys_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert wrong_calls(text) == []
    assert wrong_keys(text) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_every_page_is_in_the_index() -> None:
    index = LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(index)


def test_the_checks_can_fail() -> None:
    assert wrong_calls("`tunesmith fly RECIPE`, `tunesmith train R --fast`, `tunesmith train R --fresh`") == [
        "fly",
        "train --fast",
    ]
    assert wrong_calls("```bash\npython -m trainer chekc R\n```") == ["chekc"]
    assert wrong_keys("`optimizer.lr=1e-4 optimizer.scale_lr.rul=sqrt model.size`") == [
        "optimizer.scale_lr.rul",
        "model.size",
    ]
    assert wrong_keys("`evaluation.suites.triage.limit`, `evaluation.suites.0.size`") == ["evaluation.suites.0.size"]
    assert anchors("# One `two`, three\n") == {"one-two-three"}
