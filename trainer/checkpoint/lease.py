"""The lease on a run's folder: one run works in it, whoever came second is told at once, a dead one is followed.

`<folder>/.lease/00000007` belongs to generation 7; the highest number holds the folder. A taker makes the next number
with O_EXCL, which exactly one process in the world can, and removes the lower ones. So a generation is never used
twice, nobody ever writes another's file, and a holder that was taken for dead finds its own file gone.

A holder is dead where its process is (same host, same boot, same process namespace: process number and start time), or
where another host's heartbeat stood still for `STALE` seconds of the taker's own clock. Clocks of two hosts are never
compared. Files are opened anew for every look, which is what NFS needs to show another host's writes.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.checkpoint.agreement import agreed
from trainer.checkpoint.durable import host_name, started, sync
from trainer.checkpoint.manifest import CheckpointError
from trainer.config.errors import UserError
from trainer.launched import LOGS, LOGS_FOLDER
from trainer.world import World

log = logging.getLogger(__name__)

LEASES = ".lease"
RENEW = 2.0  # seconds between heartbeats
FRESH = 8.0  # seconds after a heartbeat in which no taker can have run out of patience: far below STALE
STALE = 30.0  # seconds that a heartbeat of another host must stand still
_LOOK = 0.25  # seconds between a taker's looks
_LARGEST = 4096  # bytes of a lease
_RELEASED = "released"
_WIDTH = 20  # of the heartbeat, the file's last line


class LeaseLostError(CheckpointError):
    """Another process holds the folder now: this one writes nothing more."""


class NoLease:
    """For folders that nobody else can know: any write is allowed."""

    generation = 0
    lost = False
    lost_message = "output: another run has taken the folder over; this one writes nothing more"

    def check(self) -> None:
        """Raise LeaseLostError where the lease may have gone; no look at the disk while the heartbeat is fresh."""

    def verify(self) -> None:
        """Look at the disk; raise LeaseLostError where the lease is gone."""

    def release(self) -> None:
        """Let the next one in."""


NO_LEASE = NoLease()


class Lease(NoLease):
    """A held folder; a thread renews the heartbeat until `release`. Made by `acquire`."""

    def __init__(self, path: Path, generation: int, offset: int) -> None:
        self.path, self.generation = path, generation
        self.lost = False
        self._offset = offset  # of the heartbeat in the file
        self._beats = 0
        self._beaten = _now()
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLostError where the lease may have gone; no look at the disk while the heartbeat is fresh.

        A process that was stopped for longer looks at the disk before it goes on.
        """
        if self.lost or _now() - self._beaten > FRESH:
            self.verify()

    def verify(self) -> None:
        """Beat, and look at the disk; raise LeaseLostError where the lease is gone. OSError tells nothing of it."""
        with self._lock:
            now = _now()
            if not self.lost:
                self.lost = not self._beat(f"{self._beats + 1:0{_WIDTH}d}") or _exists(self._next())
                self._beats, self._beaten = self._beats + 1, now
        if self.lost:
            raise LeaseLostError(self.lost_message)

    def release(self) -> None:
        """Let the next one in. The file stays: its number is used up."""
        self._released.set()
        self._thread.join()
        with self._lock:
            if not self.lost:
                self._beat(_RELEASED.ljust(_WIDTH))

    def move(self, folder: Path, aside: Path) -> None:
        """Rename the held folder, and let go of it there."""
        self._released.set()
        self._thread.join()
        folder.rename(aside)
        self.path = aside / LEASES / self.path.name
        self.release()

    def _beat(self, text: str) -> bool:
        """Write the heartbeat in place; closing brings it to an NFS server. False where the file is gone."""
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            os.pwrite(file, text.encode(), self._offset)
        finally:
            os.close(file)
        return True

    def _next(self) -> Path:
        return self.path.with_name(f"{self.generation + 1:08d}")

    def _renew(self) -> None:
        while not self._released.wait(RENEW):
            try:
                self.verify()
            except LeaseLostError as error:
                log.error("%s", error)
                return
            except OSError as error:
                log.warning("lease %s could not be renewed: %s", self.path, error)


def acquire(folder: Path, above: int = 0) -> Lease:
    """The lease on a run's folder, of a generation above all before it (and above `above`).

    Raises UserError where another run holds it: within a second where that runs on this host, within two heartbeats
    where on another. Where another host's heartbeat stands still, after `STALE` seconds the lease is taken over.
    """
    leases = folder / LEASES
    leases.mkdir(parents=True, exist_ok=True)
    while True:
        last = _newest(leases)
        if last:
            _await_death(folder, leases / f"{last:08d}")
        generation = max(last, above) + 1
        path = leases / f"{generation:08d}"
        text = json.dumps({"generation": generation, **_owner()}) + "\n"
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue  # another was quicker
        try:
            os.write(file, f"{text}{0:0{_WIDTH}d}\n".encode())
        finally:
            os.close(file)
        if _newest(leases) != generation:  # this number had been used and cleared away before
            path.unlink(missing_ok=True)
            continue
        sync(leases)
        for old in leases.iterdir():
            if old.name.isdigit() and int(old.name) < generation:
                old.unlink(missing_ok=True)
        return Lease(path, generation, len(text.encode()))


@contextmanager
def held(folder: Path, world: World, *, fresh: bool = False) -> Iterator[NoLease]:
    """The lease on a run's folder while the block runs: the main rank holds it, the others rely on that.

    With `fresh` what the folder holds is moved aside under the lease, before the block. Raises UserError on every rank
    where another run holds it.
    """
    taken: list[Lease] = []

    def take() -> None:
        taken.append(acquire(folder))
        if fresh and any(path.name not in (LEASES, LOGS_FOLDER) for path in folder.iterdir()):
            aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
            old = taken.pop()
            old.move(folder, aside)
            _keep_logs(aside)
            taken.append(acquire(folder, above=old.generation))

    agreed(world, lambda: take() if world.is_main else None)
    try:
        yield taken[0] if taken else NO_LEASE
    finally:
        for lease in taken:
            lease.release()


def _keep_logs(aside: Path) -> None:
    """Put the logs that a supervisor is writing back where it knows them."""
    logs = Path(os.environ[LOGS]) if LOGS in os.environ else None
    if logs is not None and (aside / LOGS_FOLDER / logs.name).is_dir():
        logs.parent.mkdir(parents=True, exist_ok=True)
        (aside / LOGS_FOLDER / logs.name).rename(logs)


def check_free(folder: Path) -> None:
    """Raise UserError where a process of this host holds the folder; an early word before data are read, no promise."""
    last = _newest(folder / LEASES)
    record, beat = _read(folder / LEASES / f"{last:08d}") if last else ({}, _RELEASED)
    if beat != _RELEASED and _alive_here(record):
        raise _held(folder, record)


def _await_death(folder: Path, path: Path) -> None:
    """Return once the holder has released, is known to be dead, or its file is gone; raise UserError if it lives."""
    record, first = _read(path)
    if first == _RELEASED or _alive_here(record) is False:
        return
    if _alive_here(record):
        raise _held(folder, record)
    patience = _now() + STALE
    log.info("%s: held by %s: waiting up to %.0f s for a sign of life", folder, record.get("host"), STALE)
    while _now() < patience:
        time.sleep(_LOOK)
        if not _exists(path):
            return
        record, beat = _read(path)
        if beat == _RELEASED:
            return
        if beat != first:
            raise _held(folder, record)
    log.warning("%s: the lease of %s stood still for %.0f s: taken over", folder, record.get("host"), STALE)


def _held(folder: Path, record: dict[str, Any]) -> UserError:
    return UserError(
        f"output: {folder}: another run is working in it (process {record.get('pid')} on {record.get('host')}); stop "
        "that one, or choose another `output`"
    )


def _alive_here(record: dict[str, Any]) -> bool | None:
    """Whether the holder's process lives; None where it cannot be seen from here."""
    mine = _owner()
    if not record or any(record.get(key) != mine[key] for key in ("host", "boot", "namespace")):
        return None
    return started(record["pid"]) == record["started"]


def _owner() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": host_name(),
        "boot": _first_line(Path("/proc/sys/kernel/random/boot_id")),
        "namespace": os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else "",
        "pid": pid,
        "started": started(pid),
        "job": os.environ.get("SLURM_JOB_ID", ""),
    }


def _first_line(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _newest(leases: Path) -> int:
    if not leases.exists():
        return 0
    return max((int(name) for name in os.listdir(leases) if name.isdigit()), default=0)


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Owner and heartbeat; an unreadable or half written one has no owner, and whether it changes tells of its life."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}, _RELEASED
    try:
        head, _, beat = os.read(file, _LARGEST).decode(errors="replace").partition("\n")
    finally:
        os.close(file)
    try:
        record = json.loads(head)
    except ValueError:
        record = None
    told = isinstance(record, dict) and type(record.get("pid")) is int and isinstance(record.get("started"), str)
    return record if told else {}, beat.strip()


def _exists(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return False
    return True


def _now() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
