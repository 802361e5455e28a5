"""The supervisor with real processes: deaths, signals at every phase, hangs, its own death; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_cases import ROOT, command, events, is_alive, output, rank_pids, run, saved_steps, start, wait_for

SLOW = pytest.mark.slow
SIGNALS = [
    signal.SIGTERM,
    signal.SIGUSR1,
    pytest.param(signal.SIGINT, marks=SLOW),
    pytest.param(signal.SIGUSR2, marks=SLOW),
]


def test_complete_and_what_is_left(tmp_path: Path) -> None:
    assert run(tmp_path / "run") == 0
    assert saved_steps(tmp_path / "run") == [5, 10, 15, 20]
    logs = tmp_path / "run" / "logs" / "attempt-01"
    assert sorted(path.name for path in logs.iterdir()) == ["rank-00000.log", "rank-00001.log"]
    assert "rank 1 of 2" in (logs / "rank-00001.log").read_text()
    assert "rank 0 of 2" in output(tmp_path / "run")
    assert "rank 1 of 2" not in output(tmp_path / "run")
    (ended,) = events(tmp_path / "run", "ended")
    assert ended["outcome"]["kind"] == "complete"
    assert [rank["code"] for rank in ended["ranks"]] == [0, 0]


def test_a_killed_rank_is_followed_by_a_restart_from_the_checkpoint(tmp_path: Path) -> None:
    assert run(tmp_path / "run", fault="step:step=7:rank=1:attempt=1:kill") == 0
    first, second = events(tmp_path / "run", "attempt")
    assert (first["number"], second["number"]) == (1, 2)
    assert second["reason"].startswith("rank 1 was ended by SIGKILL at step 7")
    assert "starting again from step 5" in output(tmp_path / "run")
    assert not any(is_alive(pid) for pid in first["pids"])


def test_a_step_that_fails_twice_ends_the_run_and_is_named(tmp_path: Path) -> None:
    assert run(tmp_path / "run", fault="step:step=7:rank=1:raise") == 1
    assert len(events(tmp_path / "run", "attempt")) == 2
    last = output(tmp_path / "run").splitlines()[-1]
    assert "failed 2 times at step 7" in last
    assert "its examples: source:7, source:107" in last
    assert "guard.skip_steps=[7]" in last
    assert "rank 1 at step 7: InjectedFault: fault injected at step" in last
    assert "rank 1 | trainer.fault.InjectedFault" in output(tmp_path / "run")


def test_restarts_are_limited(tmp_path: Path) -> None:
    fault = ";".join(f"step:step={5 * n + 2}:rank=1:attempt={n + 1}:kill" for n in range(4))
    assert run(tmp_path / "run", fault=fault, restarts=2, seconds=0) == 1
    assert len(events(tmp_path / "run", "attempt")) == 3
    assert "2 restarts used up" in output(tmp_path / "run")
    assert run(tmp_path / "run", fault=fault, restarts=2, seconds=0) == 0  # attempt 4 fails, attempt 5 completes
    assert [row["number"] for row in events(tmp_path / "run", "attempt")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["end:rank=1:exit", "end:rank=0:kill"])
def test_a_bad_end_after_completion_is_success(tmp_path: Path, fault: str) -> None:
    assert run(tmp_path / "run", fault=fault, steps=3) == 0
    assert len(events(tmp_path / "run", "attempt")) == 1
    assert "the run is complete; after that ended rank" in output(tmp_path / "run")


def test_an_old_completion_excuses_nothing(tmp_path: Path) -> None:
    assert run(tmp_path / "run", steps=3) == 0
    assert run(tmp_path / "run", steps=3, fault="start:rank=1:exit", restarts=0) == 1
    assert "rank 1 left with exit code 13 in its part `load`" in output(tmp_path / "run")


def test_a_refusal_is_not_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "refuse.py"
    program.write_text(
        "import sys\nfrom trainer import heartbeat\nheartbeat.begin()\n"
        "heartbeat.ended('optimizer.lr: -1: must be above 0')\nsys.exit(2)\n"
    )
    code = (
        "import sys; from pathlib import Path; from launchers.local import Launch\n"
        "from launchers.supervisor import supervise\nfrom trainer.config import UserError\n"
        f"try: supervise(Launch(Path({str(tmp_path / 'run')!r}), (), 2, program=(sys.executable, {str(program)!r})))\n"
        "except UserError as error: print(error); sys.exit(2)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == "optimizer.lr: -1: must be above 0\n"
    assert len(events(tmp_path / "run", "attempt")) == 1


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGTERM", "SIGUSR1", "SIGINT", "SIGUSR2"])
def test_a_signal_to_the_supervisor_saves_once_and_ends_with_75(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path / "run", seconds=0.1, steps=400)
    rank_pids(tmp_path / "run")
    wait_for(lambda: saved_steps(tmp_path / "run"))
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)  # a second one changes nothing
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert f"on {number.name}" in output(tmp_path / "run")
    (ended,) = events(tmp_path / "run", "ended")
    assert [rank["code"] for rank in ended["ranks"]] == [75, 75]
    steps = saved_steps(tmp_path / "run")
    assert run(tmp_path / "run", seconds=0, steps=steps[-1] + 2) == 0  # the same command goes on


def test_a_signal_to_one_rank_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path / "run", seconds=0.1, steps=400)
    pids = rank_pids(tmp_path / "run")
    wait_for(lambda: saved_steps(tmp_path / "run"))
    os.kill(pids[1], signal.SIGUSR2)
    assert process.wait(20) == 75
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("start:hang", marks=pytest.mark.slow),
        "start:hold",
        pytest.param("start:stop", marks=pytest.mark.slow),
        "start:rank=1:hang",
    ],
)
def test_a_signal_while_ranks_start_ends_with_75_though_they_hang(tmp_path: Path, fault: str) -> None:
    process = start(tmp_path / "run", fault=fault, steps=400, seconds=0.1)
    pids = rank_pids(tmp_path / "run")
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    assert "stopped by SIGUSR1" in output(tmp_path / "run")
    assert not any(is_alive(pid) for pid in pids)


def test_a_signal_at_once(tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    wait_for(lambda: (tmp_path / "run" / "logs").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


def test_a_signal_between_two_attempts(tmp_path: Path) -> None:
    fault = "step:step=3:attempt=1:kill;step:step=2:attempt=2:kill"
    process = start(tmp_path / "run", fault=fault)
    wait_for(lambda: len(events(tmp_path / "run", "restarts")) == 2)  # no progress: it rests for 2 s
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert len(events(tmp_path / "run", "attempt")) == 2
    assert "between two attempts" in output(tmp_path / "run")


def test_the_supervisors_death_leaves_no_orphan(tmp_path: Path) -> None:
    process = start(tmp_path / "run", seconds=0.1, steps=400)
    pids = rank_pids(tmp_path / "run")
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), seconds=5)


@pytest.mark.parametrize("action", [pytest.param("hang", marks=SLOW), "hold", "stop"])
def test_a_hung_rank_is_found_and_named_and_all_stacks_are_kept(tmp_path: Path, action: str) -> None:
    folder = tmp_path / "run"
    assert run(folder, fault=f"step:step=3:rank=1:attempt=1:{action}", hang=1.0, seconds=0.01) == 0
    first, second = events(folder, "ended")
    reason = first["outcome"]["reason"]
    assert reason.startswith("rank 1 hung: silent for ")
    assert "in step 3, last collective: all_reduce (number " in reason
    assert ("stopped (SIGSTOP)" in reason) == (action == "stop")
    stacks = [(folder / "logs" / "attempt-01" / f"stacks-rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert f"in _{action}" in stacks[1]
    assert all("light_rank.py" in text for text in stacks)
    assert second["outcome"]["kind"] == "complete"
    assert not any(is_alive(pid) for pid in events(folder, "attempt")[0]["pids"])
    assert not (folder / "logs" / "attempt-02" / "stacks-rank-00000.txt").exists()


def test_slow_work_in_its_own_section_is_no_hang(tmp_path: Path) -> None:
    process = start(tmp_path / "run", fault="save:step=5:rank=0:stop", hang=0.5, steps=6)
    pids = rank_pids(tmp_path / "run")
    wait_for(lambda: Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    time.sleep(3)  # a save that takes six times the patience of a step
    os.kill(pids[0], signal.SIGCONT)
    assert process.wait(30) == 0
    assert len(events(tmp_path / "run", "attempt")) == 1


def test_a_reader_that_goes_away_or_reads_nothing_harms_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:  # a pipe that is full and stays so
        try:
            os.write(writer, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = command(tmp_path / "run", nproc=1, steps=5, seconds=0)
    full = subprocess.Popen(line, env=environment, stdout=writer, stderr=writer)
    assert full.wait(30) == 0
    os.close(reader)  # and one that nobody reads any more
    line = command(tmp_path / "run", nproc=1, steps=9, seconds=0)
    gone = subprocess.Popen(line, env=environment, stdout=writer, stderr=writer)
    os.close(writer)
    assert gone.wait(30) == 0


def test_ranks_in_reserve_take_over_and_are_sent_home(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = "step:step=12:rank=1:attempt=1:kill;step:step=17:rank=0:attempt=2:kill"
    process = start(folder, fault=fault, standby=True, seconds=0.1)
    rank_pids(folder)
    assert process.wait(40) == 0
    first, second, third = (row["pids"] for row in events(folder, "attempt"))
    logs = [folder / "logs" / f"attempt-{number:02d}" for number in (1, 2, 3)]
    for path, pids in zip(logs, (first, second, third), strict=True):
        for rank in (0, 1):
            assert f"pid {pids[rank]}" in (path / f"rank-{rank:05d}.log").read_text()
    assert "called in" not in (logs[0] / "rank-00000.log").read_text()
    assert "called in" in (logs[1] / "rank-00000.log").read_text()
    assert events(folder, "attempt")[2]["reason"].startswith("rank 0 was ended by SIGKILL at step 17")
    assert not any(is_alive(pid) for pid in reserve_pids(folder))


def test_the_supervisors_death_ends_the_reserve(tmp_path: Path) -> None:
    process = start(tmp_path / "run", standby=True, steps=400, seconds=0.1)
    pids = [*rank_pids(tmp_path / "run"), *wait_for(lambda: reserve_pids(tmp_path / "run"))]
    assert len(pids) == 4
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), seconds=5)


@pytest.mark.slow
def test_a_reserve_that_died_is_no_loss(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, standby=True, steps=60, seconds=0.1, fault="step:step=50:rank=1:attempt=1:kill")
    rank_pids(folder)
    os.kill(wait_for(lambda: reserve_pids(folder))[0], signal.SIGKILL)
    assert process.wait(40) == 0
    assert "called in" not in (folder / "logs" / "attempt-02" / "rank-00000.log").read_text()


def reserve_pids(folder: Path) -> list[int]:
    """The processes in reserve, once both have begun."""
    path = folder / "logs" / "reserve.log"
    lines = path.read_text().splitlines() if path.exists() else []
    pids = [int(line.split()[-1]) for line in lines if line.startswith("in reserve")]
    return pids if len(pids) == 2 else []


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup of 200 MB, below this process's own."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if "memory" in controllers.split(","):
            parent, limit = Path("/sys/fs/cgroup/memory", own.lstrip("/")), "memory.limit_in_bytes"
            break
    else:
        parent, limit = Path("/sys/fs/cgroup", own.lstrip("/")), "memory.max"
    group = parent / f"tunesmith-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(200 << 20))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_rank_killed_for_want_of_memory_is_told_so(tmp_path: Path, small_memory: Path) -> None:
    folder = tmp_path / "run"
    enter = f'echo $$ > {small_memory / "cgroup.procs"} && exec "$@"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TUNESMITH_FAIL_POINT": "step:step=3:rank=1:memory"}
    line = ["sh", "-c", enter, "sh", *command(folder)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "out of memory: the kernel killed rank 1 at step 3 (SIGKILL)" in last
    assert "lower batch.micro_tokens" in last
    assert len(events(folder, "attempt")) == 2  # the same twice: no third time


def test_the_supervisor_imports_no_torch() -> None:
    code = (
        "import sys, launchers.supervisor, trainer.cli\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
