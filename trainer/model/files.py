"""The files of a base model: which tensor lies where, and the digest by which one base is told from another."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.hub_model import model_folder
from trainer.config.model_files import CONFIG, INDEX, WEIGHTS, read_json
from trainer.config.safetensors_header import read_header
from trainer.config.schema import Model

SAMPLES, SAMPLE_BYTES = 8, 256  # of each tensor: a model of 1,000 tensors is known by 2 MB, whatever its size
GGUF_SAMPLES = 4096  # of the one file
UNTOLD = ("_name_or_path", "transformers_version", "use_cache")  # keys of config.json that say nothing of the weights


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # first byte in the file
    stop: int


def base_digest(model: Model) -> str:
    """SHA-256 that tells one base model from another by its files alone: before anything loads, the same on every
    rank, whatever the engine.

    Taken over the configuration and, of each tensor of safetensors files, its name, dtype, shape and evenly spread
    samples of its bytes; of a GGUF file its size and samples. It sees another model or another fine-tuning, not every
    flipped bit. How tensors are dealt to files, and where the folder lies, does not count. Raises UserError where the
    model cannot be had.
    """
    digest = hashlib.sha256()
    files = weight_files(model)
    folder = files[0].parent
    try:
        if files[0].suffix == ".gguf":
            digest.update(json.dumps(files[0].stat().st_size).encode())
            with files[0].open("rb") as stream:
                _add_samples(digest, stream.fileno(), 0, files[0].stat().st_size, GGUF_SAMPLES)
            return digest.hexdigest()
        known = {key: value for key, value in read_json(folder / CONFIG).items() if key not in UNTOLD}
        digest.update(json.dumps(known, sort_keys=True).encode())
        if model.trust_remote_code:  # the code is part of the model
            code = sorted(folder.glob("*.py"))
            digest.update(json.dumps([[f.name, hashlib.sha256(f.read_bytes()).hexdigest()] for f in code]).encode())
        _add_tensors(digest, stored_tensors(files))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {model.path}: its files cannot be read: {str(error)[:200]}") from error
    return digest.hexdigest()


def weight_files(model: Model) -> list[Path]:
    """The files that hold a model's weights, in the order of their names: one .gguf, or safetensors.

    Those of a hub model are fetched into the hub's cache, where loading finds them. Raises UserError where the model
    cannot be had.
    """
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.path: {model.path}: no such file; check the path")
        return [path]
    folder = model_folder(model, weights=True)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Every tensor of safetensors files by its stored name, from the headers alone.

    Raises ValueError where a header is damaged or two files hold a tensor of the same name.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in found:
                raise ValueError(f"{name} is in {found[name].file.name} and in {file.name}")
            found[name] = Stored(file, *entry)
    return found


def _add_tensors(digest: Any, tensors: dict[str, Stored]) -> None:
    handles = {file: os.open(file, os.O_RDONLY) for file in {tensor.file for tensor in tensors.values()}}
    try:
        for name, tensor in sorted(tensors.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            _add_samples(digest, handles[tensor.file], tensor.start, tensor.stop, SAMPLES)
    finally:
        for handle in handles.values():
            os.close(handle)


def _add_samples(digest: Any, handle: int, start: int, stop: int, count: int) -> None:
    """`count` samples spread evenly over the bytes [start, stop), the first and the last among them."""
    last = max(start, stop - SAMPLE_BYTES)
    for place in sorted({start + (last - start) * i // (count - 1) for i in range(count)}):
        digest.update(os.pread(handle, min(SAMPLE_BYTES, stop - place), place))
