"""The recipe: schema, loading, checks. Imports no torch, so that a login node checks a recipe at once."""

from trainer.config.errors import RunError, UserError
from trainer.config.resolve import build_recipe, dump_recipe, load_recipe
from trainer.config.schema import Recipe, Source, Stage, Suite

__all__ = [
    "Recipe",
    "RunError",
    "Source",
    "Stage",
    "Suite",
    "UserError",
    "build_recipe",
    "dump_recipe",
    "load_recipe",
]
