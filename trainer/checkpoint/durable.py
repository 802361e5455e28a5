"""Files and folders that survive a kill or a power cut: written aside, synced, renamed, parent synced."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import shutil
import socket
from pathlib import Path

log = logging.getLogger(__name__)

STAGING = ".staging-"
REPLACED = ".replaced-"
REMOVING = ".removing-"

_STAGED = re.compile(
    re.escape(STAGING) + r".+@(g(?P<generation>\d+)\+)?(?P<host>[A-Za-z0-9._-]+)\+(?P<pid>\d+)\+(?P<start>\d+)"
)


def write_file(path: Path, data: bytes) -> None:
    """A new file, synced. Raises FileExistsError: nothing published is ever written again."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring a folder and all that is in it to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def staging_folder(target: Path, generation: int = 0) -> Path:
    """A new empty folder beside `target`; its name tells its writer (generation of its lease, host, process, start), so
    that a later one can see whether that writer is fenced off or dead."""
    pid = os.getpid()
    writer = f"g{generation:08d}+{host_name()}+{pid}+{started(pid)}"
    staging = target.with_name(f"{STAGING}{target.name}@{writer}")
    if staging.exists():
        remove_folder(staging)  # our own, of a save that failed
    staging.mkdir(parents=True)
    return staging


def publish_folder(staging: Path, target: Path) -> None:
    """Rename a synced staging folder to its final name. A folder already there steps aside first and goes last, so
    that at any moment one of the two is whole on the disk."""
    aside = target.with_name(REPLACED + target.name)
    if target.exists():
        remove_folder(aside)
        target.rename(aside)
    staging.rename(target)
    sync(target.parent)
    remove_folder(aside)


def remove_folder(folder: Path) -> None:
    """Remove a folder: renamed first, so that a kill halfway leaves nothing that looks like a checkpoint."""
    if not folder.exists() and not folder.is_symlink():
        return
    doomed = folder
    if not folder.name.startswith(REMOVING):
        doomed = folder.with_name(REMOVING + folder.name.removeprefix(STAGING).lstrip("."))
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
    if doomed.is_symlink() or not doomed.is_dir():
        doomed.unlink()
        return
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("could not remove %s: %s", doomed, error)


def clean(parent: Path, prefix: str, generation: int = 0) -> None:
    """Remove what killed writers of folders `prefix...` left: half removed ones, and staged ones of an earlier
    generation than the caller's lease, or whose writer ran on this host and is dead. Without a lease one staged from
    another host stays: nobody can tell whether its writer lives. A fenced writer that still lives finds its folder gone
    when it comes to rename it."""
    marks = (STAGING, REPLACED, REMOVING)
    for path in sorted(path for mark in marks for path in parent.glob(f"{mark}{glob.escape(prefix)}*")):
        staged = _STAGED.fullmatch(path.name)
        fenced = staged is not None and int(staged["generation"] or 0) < generation
        dead = staged is not None and _dead(staged["host"], int(staged["pid"]), staged["start"])
        if path.name.startswith(REMOVING) or fenced or dead:
            log.info("removing %s, left by a writer that died or lost its lease", path)
            remove_folder(path)
        elif path.name.startswith(REPLACED) and path.with_name(path.name[len(REPLACED) :]).exists():
            remove_folder(path)


def _dead(host: str, pid: int, start: str) -> bool:
    return host == host_name() and started(pid) != start


def host_name() -> str:
    """This host's name, of characters that a file's name may hold."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()) or "unknown"


def started(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" if none lives. A number used again differs in it.

    A process that has ended and waits for its parent to notice is dead. Without /proc the bare fact that the process
    lives answers "0".
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # it lives, and is another user's
    return "0"
