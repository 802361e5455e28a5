"""One run in a folder: exactly one wins, the other is told at once, and the dead are followed only with proof."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.checkpoint import lease as leasing
from trainer.checkpoint.durable import started
from trainer.checkpoint.lease import LEASES, LeaseLostError, acquire, check_free, held
from trainer.config.errors import UserError
from trainer.world import World

ROOT = Path(__file__).resolve().parent.parent.parent
HOLDER = """
import sys, time
from pathlib import Path
from trainer.checkpoint.lease import acquire
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
try:
    lease = acquire(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(2)
print("held", lease.generation, flush=True)
time.sleep(60)
"""


def holder(folder: Path, go: Path) -> subprocess.Popen[str]:
    """A process that takes the lease once `go` exists, and keeps it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOLDER, str(folder), str(go)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def foreign(folder: Path, generation: int = 5, beat: str = "0" * 20, **owner: object) -> Path:
    """The lease of a process of another host."""
    path = folder / LEASES / f"{generation:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"host": "elsewhere", "boot": "b", "namespace": "n", "pid": 1, "started": "7", "job": ""} | owner
    path.write_text(json.dumps(record) + "\n" + beat + "\n")
    return path


def test_of_processes_that_start_at_once_exactly_one_wins_and_a_killed_one_is_followed(tmp_path: Path) -> None:
    folder, go = tmp_path / "run", tmp_path / "go"
    processes = [holder(folder, go) for _ in range(3)]
    assert [line(process) for process in processes] == ["ready"] * 3
    go.touch()
    first = time.perf_counter()
    lines = [line(process) for process in processes]
    assert time.perf_counter() - first < 5
    assert sorted(text.split()[0] for text in lines) == ["UserError", "UserError", "held"]
    winner = processes[lines.index("held 1")]
    for process, text in zip(processes, lines, strict=True):
        if process is not winner:
            assert process.wait(20) == 2 and f"process {winner.pid} on" in text and "choose another `output`" in text
    (folder / "metrics.jsonl").write_text("row\n")
    before = {name: data for name, data in contents(folder).items() if not name.startswith(LEASES)}
    started_at = time.perf_counter()
    for attempt in (check_free, acquire):
        with pytest.raises(UserError, match="another run is working in it"):
            attempt(folder)
    assert time.perf_counter() - started_at < 1
    os.kill(winner.pid, signal.SIGKILL)  # as yet unreaped: a zombie does not live
    time.sleep(0.2)
    check_free(folder)
    lease = acquire(folder)
    assert lease.generation == 2
    assert [path.name for path in (folder / LEASES).iterdir()] == ["00000002"]
    assert {name: data for name, data in contents(folder).items() if not name.startswith(LEASES)} == before
    lease.release()
    winner.wait(20)


def test_each_start_is_a_generation_of_its_own(tmp_path: Path) -> None:
    for generation in (1, 2, 3):
        lease = acquire(tmp_path)
        assert lease.generation == generation
        lease.verify()
        lease.release()
    assert acquire_and_release(tmp_path, above=10) == 11


def acquire_and_release(folder: Path, above: int = 0) -> int:
    lease = acquire(folder, above)
    lease.release()
    return lease.generation


def test_a_number_used_again_by_another_process_is_not_its_holder(tmp_path: Path) -> None:
    mine = leasing._owner()
    foreign(tmp_path, **(mine | {"pid": 1}))  # lives, but began at another time
    assert started(1) not in ("", mine["started"])
    assert acquire_and_release(tmp_path) == 6


@pytest.mark.parametrize("key", ["host", "boot", "namespace"])
def test_from_elsewhere_only_a_silent_heartbeat_is_proof(tmp_path: Path, monkeypatch, key: str) -> None:
    monkeypatch.setattr(leasing, "STALE", 1.0)
    foreign(tmp_path, **(leasing._owner() | {"pid": 999_999_999, key: "other"}))
    check_free(tmp_path)
    begun = time.perf_counter()
    assert acquire_and_release(tmp_path) == 6
    assert 1.0 <= time.perf_counter() - begun < 3


def test_a_heartbeat_from_elsewhere_is_a_sign_of_life(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(leasing, "STALE", 10.0)
    path = foreign(tmp_path)
    beaten = path.read_text().replace("0" * 20, "0" * 19 + "1")
    with subprocess.Popen(["sh", "-c", 'sleep 0.5; printf "%s" "$2" > "$1"', "sh", str(path), beaten]):
        begun = time.perf_counter()
        with pytest.raises(UserError, match=r"process 1 on elsewhere"):
            acquire(tmp_path)
        assert time.perf_counter() - begun < 5
    assert [path.name for path in (tmp_path / LEASES).iterdir()] == ["00000005"]


@pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}\n0\n', "[1]\n0\n", "\x00" * 50])
def test_an_unreadable_lease_is_waited_out(tmp_path: Path, monkeypatch, text: str) -> None:
    monkeypatch.setattr(leasing, "STALE", 0.3)
    foreign(tmp_path).write_text(text)
    check_free(tmp_path)
    assert acquire_and_release(tmp_path) == 6


def test_a_holder_that_was_taken_for_dead_finds_out_before_it_writes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(leasing, "RENEW", 60.0)  # as if the process had been stopped
    lease = acquire(tmp_path)
    lease.check()
    (tmp_path / LEASES / "00000001").unlink()
    foreign(tmp_path, generation=2)
    lease.check()  # the heartbeat is fresh: no taker's patience can have run out, and no look at the disk is needed
    lease._beaten -= leasing.FRESH + 1
    for look in (lease.check, lease.verify):
        with pytest.raises(LeaseLostError, match="another run has taken the folder over"):
            look()
    lease.release()
    assert json.loads((tmp_path / LEASES / "00000002").read_text().splitlines()[0])["host"] == "elsewhere"


def test_the_thread_finds_a_lost_lease_by_itself(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(leasing, "RENEW", 0.05)
    lease = acquire(tmp_path)
    time.sleep(0.3)
    assert not lease.lost and int((tmp_path / LEASES / "00000001").read_text().splitlines()[1]) > 2
    (tmp_path / LEASES / "00000001").unlink()
    deadline = time.monotonic() + 5
    while not lease.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lease.lost
    lease.release()


def test_fresh_moves_what_is_there_aside_under_the_lease(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder, World()) as lease:
        (folder / "metrics.jsonl").write_text("old\n")
        with pytest.raises(UserError, match="another run"), held(folder, World(), fresh=True):
            raise AssertionError("two runs in one folder")
        assert (folder / "metrics.jsonl").read_text() == "old\n"
    with held(folder, World(), fresh=True) as fresh:
        assert fresh.generation > lease.generation
        assert [path.name for path in folder.iterdir()] == [LEASES]
        aside = next(path for path in tmp_path.iterdir() if path != folder)
        assert (aside / "metrics.jsonl").read_text() == "old\n"
        fresh.verify()
    assert acquire_and_release(aside) > 0  # let go of there
    with held(folder, World(), fresh=True):  # nothing to move
        assert len(list(tmp_path.iterdir())) == 2
