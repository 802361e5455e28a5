"""What the kernel tells of processes and memory: states, kills for want of memory, devices, ports."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

STATES = {
    "T": "stopped (SIGSTOP)",
    "t": "stopped by a debugger",
    "D": "blocked in the kernel (disk or network file system)",
    "Z": "dead",
}
CGROUPS = Path("/sys/fs/cgroup")
_KILLED = re.compile(r"[Kk]illed process (\d+)")


def process_state(pid: int) -> str:
    """The state letter of a process (R, S, D, T, t, Z ...); empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def memory_kills() -> int:
    """How many processes of this one's memory cgroups the kernel has killed for want of memory; 0 where none tells."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return 0
    count = 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            places = [CGROUPS, CGROUPS / "unified"]
            file = "memory.events"
        elif "memory" in controllers.split(","):
            places = [CGROUPS / "memory"]
            file = "memory.oom_control"
        else:
            continue
        for root in places:
            # a container may show its own cgroup as the root of the tree
            for folder in dict.fromkeys((root / path.lstrip("/"), root)):
                if (found := _oom_kill(folder / file)) is not None:
                    count += found
                    break
    return count


def _oom_kill(path: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


class KernelLog:
    """The kernel's messages from now on, where this user may read them."""

    def __init__(self) -> None:
        self._file = -1
        try:
            self._file = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError:
            self.close()  # not readable: the cgroup's counter is what remains

    def killed(self) -> set[int]:
        """The pids that the kernel says it has killed for want of memory since the last call."""
        found = set()
        while self._file >= 0:
            try:
                message = os.read(self._file, 8192).decode(errors="replace")
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # messages were overwritten before they were read; the next read goes on behind them
            except OSError:
                self.close()
                break
            found |= {int(pid) for pid in _KILLED.findall(message)}
        return found

    def close(self) -> None:
        """Read no further."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def devices() -> int:
    """NVIDIA devices that a run may use, as the file system and CUDA_VISIBLE_DEVICES say; importing torch takes 1 s."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def listening_socket() -> socket.socket:
    """A free port of the loopback interface, already listening: no other process can take it in between, and nobody
    outside of this machine reaches it."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return listener
