"""Where this process is, kept in a small file that another process can read at any moment, even after a kill -9.

`tunesmith launch` names a folder in the environment; each rank keeps one file there. A rank that stops beating is
found by what it last wrote: section, step, micro-batch, collective. Without that folder every call does nothing.

The file has two slots of fixed size, one for the place (rewritten at each beat) and one for the step's example ids
(once a step). A slot is a CRC-32, a length and JSON: a reader that meets a slot half written sees it by the CRC and
reads again. Only the main thread beats: a writer thread that goes on must not hide a main thread that hangs.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trainer.launched import HEARTBEAT, LOGS

STACK_SIGNAL = signal.SIGRTMIN + 7  # nobody's: the C library uses the first two, debuggers and runtimes low ones
PLACE_SIZE, IDS_SIZE = 4096, 12 * 1024  # bytes
HEAD = struct.Struct("<II")  # CRC-32 and length of what follows


class Quiet:
    """The pulse of a process that nobody watches."""

    def enter(self, section: str) -> None:
        """Nothing to tell."""

    def leave(self) -> None:
        """Nothing to tell."""

    def tell(self, **facts: Any) -> None:
        """Nothing to tell."""

    def wait(self, collective: str) -> None:
        """Nothing to tell."""

    def ids(self, step: int, ids: Iterable[str]) -> None:
        """Nothing to tell."""


class Pulse(Quiet):
    """The pulse of one rank. A beat costs a few microseconds: one small JSON text copied into mapped memory."""

    def __init__(self, path: Path, rank: int) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, PLACE_SIZE + IDS_SIZE)  # a full disk is told here, not by a SIGBUS later
            self._memory = mmap.mmap(file, PLACE_SIZE + IDS_SIZE)
        finally:
            os.close(file)
        self._thread = threading.get_ident()
        self._sections: list[str] = []
        self._place: dict[str, Any] = {
            "rank": rank,
            "pid": os.getpid(),
            "section": "start",
            "waits": None,  # what this rank waits for: the collective it is in, a lock that another rank holds
            "collective": None,  # entered last
            "collectives": 0,  # entered so far: the others wait for the rank with the lower count
            "step": None,  # the optimizer step in work, from 1
            "done": None,  # the last step that this process has finished
            "longest": {},  # {stretch: seconds}: the longest silence so far, waiting in collectives left out
            "ended": None,  # the error that this rank told before it left
        }
        self._time = time.monotonic()
        self.tell()

    def enter(self, section: str) -> None:
        """Begin a section within the present one."""
        if self._foreign():
            return
        self._sections.append(self._place["section"])
        self.tell(section=section)

    def leave(self) -> None:
        """End the section; the one around it goes on."""
        if self._foreign():
            return
        self.tell(section=self._sections.pop())

    def tell(self, **facts: Any) -> None:
        """Beat, with what has changed."""
        if self._foreign():
            return
        place, now = self._place, time.monotonic()
        if place["waits"] is None:
            longest, name = place["longest"], stretch(place)
            longest[name] = max(longest.get(name, 0.0), round(now - self._time, 3))
        place.update(facts)
        place["time"] = self._time = now  # of CLOCK_MONOTONIC: one clock for all processes of a machine
        _write(self._memory, 0, PLACE_SIZE, place)

    def wait(self, collective: str) -> None:
        """Begin to wait for the others in a collective."""
        self.tell(waits=collective, collective=collective, collectives=self._place["collectives"] + 1)

    def ids(self, step: int, ids: Iterable[str]) -> None:
        """The examples of the step in work, as many as the slot holds."""
        if self._foreign():
            return
        shown, room = [], IDS_SIZE - 256
        for name in ids:
            room -= len(json.dumps(name)) + 2
            if room < 0:
                break
            shown.append(name)
        _write(self._memory, PLACE_SIZE, IDS_SIZE, {"step": step, "ids": shown})

    def _foreign(self) -> bool:
        return threading.get_ident() != self._thread


def stretch(place: Mapping[str, Any]) -> str:
    """The section, with a process's first step apart: it compiles, allocates and connects."""
    return "first step" if place["section"] == "step" and place["done"] is None else place["section"]


def _write(memory: mmap.mmap, start: int, size: int, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    if len(data) > size - HEAD.size:
        return  # what stood there stays: a place too long to tell is no reason to end a run
    memory[start : start + HEAD.size + len(data)] = HEAD.pack(zlib.crc32(data), len(data)) + data


def read_pulse(path: Path) -> dict[str, Any]:
    """What a rank last wrote: its place, and `ids` where they are those of its step. Raises OSError or ValueError
    where there is nothing whole to read (yet)."""
    content = path.read_bytes()
    place = _slot(content, 0)
    try:
        named = _slot(content, PLACE_SIZE)
    except ValueError:
        named = {}
    place["ids"] = named.get("ids", []) if named.get("step") == place["step"] else []
    return place


def _slot(content: bytes, start: int) -> dict[str, Any]:
    if len(content) < start + HEAD.size:
        raise ValueError("no whole record")
    crc, length = HEAD.unpack_from(content, start)
    data = content[start + HEAD.size : start + HEAD.size + length]
    if not length or zlib.crc32(data) != crc:
        raise ValueError("a record half written")
    return json.loads(data)


def pulse_path(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank:05d}.pulse"


def stacks_path(folder: Path, rank: int) -> Path:
    """Where the Python stacks of a rank go."""
    return folder / f"stacks-rank-{rank:05d}.txt"


_pulse: Quiet = Quiet()
_stacks: IO[str] | None = None  # open as long as the process lives: faulthandler keeps the descriptor only


def begin() -> None:
    """Beat from here on if a supervisor asks for it, and write all threads' Python stacks whenever it sends
    STACK_SIGNAL: faulthandler does that from C, so a thread that holds the interpreter's lock cannot prevent it."""
    global _pulse, _stacks
    if os.environ.get(HEARTBEAT) is None:
        return
    rank = int(os.environ.get("RANK", "0"))
    faulthandler.enable()  # a crash in C leaves its Python stack in the rank's log
    _stacks = stacks_path(Path(os.environ[LOGS]), rank).open("a", encoding="utf-8")
    faulthandler.register(STACK_SIGNAL, file=_stacks, all_threads=True, chain=False)
    _pulse = Pulse(pulse_path(Path(os.environ[HEARTBEAT]), rank), rank)  # last: who beats can be asked for stacks


def beat() -> None:
    """Tell that work goes on: once for each bounded piece of it, such as a micro-batch."""
    _pulse.tell()


def phase(name: str) -> None:
    """The process has come to its next part: start, data, load, step, finish."""
    _pulse.tell(section=name)


@contextmanager
def section(name: str) -> Iterator[None]:
    """Work within a phase that has a patience of its own: evaluation, checkpoint."""
    pulse = _pulse
    pulse.enter(name)
    try:
        yield
    finally:
        pulse.leave()


@contextmanager
def collective(name: str) -> Iterator[None]:
    """Waiting for the other ranks in something that every rank calls the same number of times."""
    pulse = _pulse
    pulse.wait(name)
    try:
        yield
    finally:
        pulse.tell(waits=None)


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """Waiting for another rank's work outside of the collectives, such as for a lock."""
    pulse = _pulse
    pulse.tell(waits=name)
    try:
        yield
    finally:
        pulse.tell(waits=None)


def step(number: int, ids: Callable[[], Iterable[str]]) -> None:
    """A step begins: its number, from 1, and the examples of all ranks. `ids` is only asked where somebody watches."""
    if not isinstance(_pulse, Pulse):
        return
    _pulse.ids(number, ids())
    _pulse.tell(step=number)


def step_done(number: int) -> None:
    """A step and all that is due after it are done."""
    _pulse.tell(done=number, step=None)


def ended(message: str) -> None:
    """The error with which this process leaves, in one line."""
    _pulse.tell(ended={"time": round(time.monotonic(), 6), "message": message[:300]})
