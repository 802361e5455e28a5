"""What generation is asked and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.config.schema import Recipe, Suite
from trainer.data.encode import Encoder
from trainer.data.formats import to_record
from trainer.data.readers import Row, read_rows


@dataclass(frozen=True)
class Prompt:
    """One question of an evaluation, its name as in training (`source:line`), and the reference answer."""

    name: str
    ids: np.ndarray  # (length,) int32
    reference: str


def generation_prompts(recipe: Recipe, suite: Suite, tokenizer: Any) -> list[Prompt]:
    """The first ``suite.limit`` prompts of a suite's source: all before the last answer, and that answer.

    A prompt over max_length is treated by the source's `truncation`: an error, dropped, or its end kept (`left` and
    `right` alike: what is asked stands at the end). Bad rows follow `on_bad_row`.
    """
    source, key = recipe.sources[suite.source], f"sources.{suite.source}"
    encoder = Encoder(tokenizer, source, "supervised", recipe.model.max_length, key)
    prompts: list[Prompt] = []
    for row in _rows(recipe, suite):
        try:
            record = to_record(row, source, recipe.model.labels)
            ids, reference = encoder.generation_prompt(record)
        except UserError:
            if source.on_bad_row == "error":
                raise
            continue
        if len(ids) > recipe.model.max_length:
            if source.truncation == "error":
                raise UserError(
                    f"{row.place}: a prompt of {len(ids)} tokens, model.max_length is {recipe.model.max_length}; "
                    f"raise it, or set `{key}.truncation`"
                )
            if source.truncation == "drop":
                continue
            ids = ids[-recipe.model.max_length :]
        many = Path(source.path).expanduser().is_dir()
        file = f"/{Path(row.file).name}" if many else ""
        prompts.append(Prompt(f"{suite.source}{file}:{row.line}", ids, reference))
        if suite.limit is not None and len(prompts) >= suite.limit:
            break
    if not prompts:
        raise UserError(f"{key}.path: {source.path}: no prompt left for suite {suite.name!r}; check its rows")
    return prompts


def _rows(recipe: Recipe, suite: Suite) -> Iterator[Row]:
    source = recipe.sources[suite.source]
    for row in read_rows(source, f"sources.{suite.source}.path"):
        if isinstance(row, Row):
            yield row
        elif source.on_bad_row == "error":
            raise UserError(row.message)
