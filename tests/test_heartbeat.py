"""The heartbeat: what another process reads, cheap, never half written, silent where nobody asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from trainer import heartbeat
from trainer.heartbeat import IDS_SIZE, STACK_SIGNAL, Pulse, pulse_path, read_pulse, stacks_path, stretch
from trainer.launched import HEARTBEAT, LOGS


@pytest.fixture
def pulse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = pulse_path(tmp_path, 3)
    monkeypatch.setattr(heartbeat, "_pulse", Pulse(path, 3))
    return path


def test_the_place(pulse: Path) -> None:
    place = read_pulse(pulse)
    assert (place["rank"], place["pid"], place["section"], place["step"]) == (3, os.getpid(), "start", None)
    heartbeat.phase("step")
    assert stretch(read_pulse(pulse)) == "first step"
    heartbeat.step(7, lambda: ["a:1", "a:2"])
    with heartbeat.section("evaluation"), heartbeat.collective("gather"):
        place = read_pulse(pulse)
        assert (place["section"], place["waits"], place["collectives"], place["step"]) == ("evaluation", "gather", 1, 7)
    place = read_pulse(pulse)
    assert (place["section"], place["waits"], place["collective"]) == ("step", None, "gather")
    assert place["ids"] == ["a:1", "a:2"]
    heartbeat.step_done(7)
    place = read_pulse(pulse)
    assert (place["done"], place["step"], place["ids"]) == (7, None, [])
    assert stretch(place) == "step"
    with heartbeat.waiting("lock"):
        place = read_pulse(pulse)
        assert (place["waits"], place["collective"], place["collectives"]) == ("lock", "gather", 1)
    heartbeat.ended("ValueError: no")
    assert read_pulse(pulse)["ended"]["message"] == "ValueError: no"


def test_an_error_inside_leaves_the_section(pulse: Path) -> None:
    with pytest.raises(KeyError), heartbeat.section("checkpoint"):
        raise KeyError
    assert read_pulse(pulse)["section"] == "start"


def test_silence_is_learned_without_the_waiting(pulse: Path) -> None:
    heartbeat.phase("step")
    heartbeat.step_done(1)
    time.sleep(0.03)
    heartbeat.beat()
    with heartbeat.collective("all_reduce"):
        time.sleep(0.2)
    assert 0.03 <= read_pulse(pulse)["longest"]["step"] < 0.15


def test_another_thread_does_not_hide_the_main_one(pulse: Path) -> None:
    before = read_pulse(pulse)
    thread = threading.Thread(target=lambda: (heartbeat.beat(), heartbeat.phase("finish")))
    thread.start()
    thread.join()
    assert read_pulse(pulse) == before


def test_more_ids_than_there_is_room_for(pulse: Path) -> None:
    heartbeat.step(1, lambda: [f"source-ä:{n}" for n in range(10_000)])
    ids = read_pulse(pulse)["ids"]
    assert ids[:2] == ["source-ä:0", "source-ä:1"]
    assert 100 < len(ids) < IDS_SIZE
    heartbeat.ended("\n" * 10_000)  # a message cut to what fits
    assert len(read_pulse(pulse)["ended"]["message"]) == 300


def test_a_reader_never_sees_half_a_record(pulse: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom trainer.heartbeat import read_pulse\n"
        "print('ready', flush=True)\ntorn = steps = 0\nlast = -1\n"
        "while (Path(sys.argv[1]).exists()):\n"
        "    try: place = read_pulse(Path(sys.argv[1]))\n"
        "    except ValueError: torn += 1; continue\n"
        "    except FileNotFoundError: break\n"
        "    steps += place['step'] != last\n"
        "    last = place['step']\n"
        "    number, ids = place['step'], place['ids']\n"
        "    assert number is None or ids in ([], [f'a:{number}'] * (1 + number % 50)), place\n"
        "print(steps)\n"
    )
    reader = subprocess.Popen([sys.executable, "-c", code, str(pulse)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    end, step = time.monotonic() + 2, 0
    while time.monotonic() < end:
        step += 1
        heartbeat.step(step, partial(list, [f"a:{step}"] * (1 + step % 50)))
    pulse.unlink()
    assert int(reader.communicate(timeout=30)[0]) > 20
    assert reader.returncode == 0


def test_a_beat_is_cheap_and_no_beat_is_cheaper(pulse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cost() -> float:
        rounds = []
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(200):
                heartbeat.beat()
            rounds.append((time.perf_counter() - started) / 200)
        return min(rounds)  # the least disturbed round

    assert cost() < 100e-6
    monkeypatch.setattr(heartbeat, "_pulse", heartbeat.Quiet())
    assert cost() < 5e-6


def test_nobody_asked() -> None:
    code = "from trainer import heartbeat\nheartbeat.begin()\nheartbeat.step(1, lambda: 1 / 0)\nheartbeat.beat()\n"
    environment = {key: value for key, value in os.environ.items() if key not in (HEARTBEAT, LOGS)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_stacks_come_though_the_interpreters_lock_is_held(tmp_path: Path) -> None:
    code = (
        "import ctypes\nfrom trainer import heartbeat\nheartbeat.begin()\n"
        "def in_native_code():\n    print('there', flush=True)\n    while True: ctypes.PyDLL(None).sleep(60)\n"
        "in_native_code()\n"
    )
    environment = os.environ | {HEARTBEAT: str(tmp_path), LOGS: str(tmp_path), "RANK": "2"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        process.send_signal(STACK_SIGNAL)
        end = time.monotonic() + 20
        while "in in_native_code" not in stacks_path(tmp_path, 2).read_text() and time.monotonic() < end:
            time.sleep(0.02)
        process.kill()
    assert "in in_native_code" in stacks_path(tmp_path, 2).read_text()
    assert read_pulse(pulse_path(tmp_path, 2))["pid"] == process.pid


def test_signals_before_and_after_a_run_has_taken_over(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\nfrom trainer.signals import StopSignal, StoppedEarly, stop_early\nstop_early()\n"
        "stop = StopSignal().install() if sys.argv[1] == 'run' else None\n"
        "try:\n    print('ready', flush=True)\n    while not (stop and stop.raised): time.sleep(0.01)\n"
        "    time.sleep(0.3)\n    print(stop.name)\nexcept StoppedEarly as early:\n    print(early); sys.exit(75)\n"
    )
    for mode, number, code_expected, words in (
        ("start", signal.SIGUSR2, 75, "stopped by SIGUSR2 before the run had begun: nothing to save"),
        ("run", signal.SIGUSR2, 0, "SIGUSR2"),
    ):
        process = subprocess.Popen([sys.executable, "-c", code, mode], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if mode == "run":
            for _ in range(50):  # a storm of them: the handler may be interrupted by itself
                process.send_signal(signal.SIGTERM)
                process.send_signal(number)
        assert process.wait(30) == code_expected
        assert process.stdout.read().startswith(words)
