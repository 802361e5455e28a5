"""Find the recipes, DeepSpeed settings and Slurm templates that come with the project."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.config.errors import UserError

KINDS = ("recipes", "ds_configs", "slurm")


def folder(kind: str) -> Path:
    """Give the folder of one kind of resource: inside an installed wheel, else at the root of the checkout.

    Raises ``UserError`` for an unknown kind, and where neither place has the folder.
    """
    if kind not in KINDS:
        raise UserError(f"resource kind: {kind}: use one of {', '.join(KINDS)}")
    package = Path(__file__).resolve().parent.parent
    for place in (package / "resources" / kind, package.parent / kind):
        if place.is_dir():
            return place
    raise UserError(f"{kind}: not found beside {package}: install tunesmith again")


def names(kind: str) -> list[str]:
    """Give the file names of one kind of resource, sorted; the folder's README is not one."""
    return sorted(path.name for path in folder(kind).iterdir() if path.is_file() and path.name != "README.md")


def find(kind: str, name: str) -> Path:
    """Give the path of the resource ``name`` (a plain file name, such as ``demo.yaml``).

    Raises ``UserError`` where there is none, with the names there are.
    """
    if name in names(kind):
        return folder(kind) / name
    raise UserError(f"{kind}: {name}: no such file: choose one of {', '.join(names(kind)) or '(none)'}")


def cache_folder() -> Path:
    """Give the user's cache folder.

    ``TUNESMITH_CACHE``, else ``XDG_CACHE_HOME/tunesmith``, else ``~/.cache/tunesmith``.
    """
    if own := os.environ.get("TUNESMITH_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tunesmith"
