"""A base model as a folder on this disk: its own, or the hub's snapshot of it in the cache, looked at before reading.

Libraries are given the folder and never the hub id, so that what they read is what was looked at: no adapter, pickle or
kernel is fetched because a model's own files say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.model_files import INDEX, WEIGHTS, check_model_folder, read_json
from trainer.config.schema import Model

METADATA = ["*.json", "*.jinja", "*.model", "*.txt", "*.vocab", "*.tiktoken"]


def model_folder(model: Model, *, weights: bool) -> Path:
    """The folder, checked; of a hub model the snapshot, whose missing files are fetched, weights only if asked for.

    Raises UserError where the model cannot be had, or is not one to be loaded. Not for .gguf files.
    """
    folder = Path(model.path).expanduser()
    if not folder.exists():
        code = ["*.py"] if model.trust_remote_code else []
        folder = _fetch(model, METADATA + code)
        check_model_folder(folder, model.path, trusted=model.trust_remote_code, weights=False)
        if weights:
            _fetch(model, _weight_names(folder, model))
    check_model_folder(folder, model.path, trusted=model.trust_remote_code, weights=weights)
    return folder


def _weight_names(folder: Path, model: Model) -> list[str]:
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    try:
        return sorted({str(name) for name in read_json(folder / INDEX)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.path: {model.path}: {INDEX}: not an index ({error}); download it again") from error


def _fetch(model: Model, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download  # 0.2 s, only for hub ids

    options: dict[str, Any] = {"revision": model.revision, "local_files_only": constants.HF_HUB_OFFLINE}
    try:
        return Path(snapshot_download(model.path, allow_patterns=patterns, ignore_patterns=["*/*"], **options))
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.path: {model.path}: cannot be loaded ({reason[:200]}); check the id, revision or network"
        ) from error
