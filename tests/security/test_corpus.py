"""The table in docs/security.md tells what the corpus holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from finished import CANARIES
from hostile_checkpoints import CHECKPOINTS
from hostile_data import DATA
from hostile_models import MODELS
from hostile_recipes import FILES, OVERRIDES
from hostile_templates import ENDLESS, ESCAPES, GREEDY

SIZES = {
    "templates without end": len(ENDLESS),
    "templates without measure": len(GREEDY),
    "templates that reach out": len(ESCAPES),
    "base models": len(MODELS),
    "recipes": len(FILES),
    "overrides": len(OVERRIDES),
    "data": len(DATA),
    "checkpoints": len(CHECKPOINTS),
    "secrets": len(CANARIES),
}
PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", SIZES)
def test_the_page_counts_right(kind: str) -> None:
    (told,) = re.findall(rf"^\| {kind} \| (\d+) \|", PAGE, re.MULTILINE)
    assert int(told) == SIZES[kind]


def test_the_corpus_is_as_large_as_it_was_meant_to_be() -> None:
    assert sum(SIZES.values()) - len(CANARIES) >= 200
