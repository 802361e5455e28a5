"""From a YAML file and dotted overrides to a checked, frozen recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config.check import problems_of
from trainer.config.errors import UserError
from trainer.config.inherit import inherit
from trainer.config.overrides import apply_overrides
from trainer.config.problems import Problem, report, schema_problems
from trainer.config.schema import Recipe
from trainer.config.written import file_problems, written
from trainer.config.yaml_file import dump_yaml, read_yaml


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML 1.2 recipe, apply `key.sub=value` overrides, fill stages, and check the whole.

    Raises UserError naming key, value and remedy for the first thing that is wrong, and how many others are.
    """
    data = read_yaml(Path(path))
    return build_recipe(apply_overrides(data, overrides or []), str(path))


def build_recipe(data: dict[str, Any], origin: str = "") -> Recipe:
    """Plain data as a recipe: keys and types, inheritance into stages, cross-field checks. Leaves `data` as it is.

    `origin` begins the message of a UserError.
    """
    wrong = file_problems(data)
    if wrong:
        raise report(wrong, origin)
    try:
        recipe = Recipe.model_validate(inherit(data))
    except ValidationError as error:
        raise report(schema_problems(error, Recipe, data), origin) from error
    except UserError as error:
        raise UserError(f"{origin}: {error}" if origin else str(error)) from error
    wrong = [Problem(written(key, data), value, remedy) for key, value, remedy in problems_of(recipe)]
    if wrong:
        raise report(wrong, origin)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, keys in the order of the schema, that loads back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


__all__ = ["Recipe", "apply_overrides", "build_recipe", "dump_recipe", "load_recipe", "read_yaml"]
