"""``run.json``: what a run is, on what it ran, and how it ended."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import trainer
from trainer.config.errors import UserError
from trainer.tracking.redact import known_secrets, redact

FILE_NAME = "run.json"
STATUSES = ("running", "complete", "failed", "preempted")
_PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy",
    "pydantic", "wandb",
)  # fmt: skip
_GIT_SECONDS = 5.0


def write_run(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``<folder>/run.json`` whole or not at all, secrets redacted; returns what was written.

    Raises ValueError on a status other than running, complete, failed, preempted.
    """
    status = record.get("status")
    if status is not None and status not in STATUSES:
        raise ValueError(f"status {status!r}: one of {', '.join(STATUSES)}")
    clean = redact(dict(record), known_secrets(os.environ))
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / FILE_NAME, json.dumps(clean, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return clean


def read_run(folder: Path) -> dict[str, Any]:
    """The content of ``<folder>/run.json``. Raises UserError where it is missing or not a JSON object."""
    path = folder / FILE_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing: name the folder of a run (it holds {FILE_NAME})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): restore it, or delete it and resume the run") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a JSON object: restore it, or delete it and resume the run")
    return record


def update_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Replace the named top-level keys of ``run.json`` (made if absent) in one atomic write; returns the whole."""
    record = read_run(folder) if (folder / FILE_NAME).exists() else {}
    return write_run(folder, {**record, **changes})


def open_run(folder: Path, **facts: Any) -> dict[str, Any]:
    """Record that a process starts to work on this run: status running, environment, ``facts``.

    A new folder gets an ``id`` and ``started`` (unix seconds) and ``restarts`` 0; one that has run before keeps id
    and start and counts one restart more. Returns the record.
    """
    first = {"id": new_run_id(), "started": round(time.time(), 3), "restarts": 0}
    if (folder / FILE_NAME).exists():
        before = read_run(folder)
        first = {**first, **before, "restarts": int(before.get("restarts", -1)) + 1}
    return write_run(folder, {**first, **describe_environment(), **facts, "status": "running"})


def new_run_id() -> str:
    """A sortable id of letters, digits and dashes, as W&B accepts it: date, time (UTC), six random hex digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def describe_environment() -> dict[str, Any]:
    """``versions`` (package: version or None), ``code`` (commit, dirty; None outside a checkout), ``hardware``
    (cpu, cores, memory_bytes, gpus) and ``platform``.

    Imports nothing heavy: versions come from package metadata, GPU names only where torch is already imported.
    """
    versions: dict[str, str | None] = {"tunesmith": trainer.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    hardware = {"cpu": _cpu_model(), "cores": _cores(), "memory_bytes": _memory_bytes(), "gpus": _gpu_names()}
    return {"versions": versions, "code": _code_version(), "hardware": hardware, "platform": platform.platform()}


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, flush it to the disk, and rename it over ``path``."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def _code_version() -> dict[str, Any] | None:
    package = Path(trainer.__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # A package installed below somebody else's checkout has no version of its own there.
    if top is None or Path(top).resolve() != package.parent:
        return None
    commit = _git(package, "rev-parse", "--verify", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", str(package))
    return None if commit is None else {"commit": commit, "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where there is no git, no checkout or no commit."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(errors="replace"), flags=re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
