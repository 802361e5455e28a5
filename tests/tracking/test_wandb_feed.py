from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from trainer.tracking import Tracker, open_run, read_rows, read_run
from trainer.tracking.journal import Journal
from trainer.tracking.wandb_feed import STATE_NAME, start
from trainer.tracking.wandb_process import Forwarder, Tail, reach

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
KEY = "c0ffee" * 7  # 42 characters; wandb refuses shorter ones


def step(number: int, loss: float = 1.0) -> dict:
    return {
        "kind": "step",
        "step": number,
        "stage": "a",
        "loss": loss,
        "losses": {"t": loss},
        "skipped": False,
        "time": 1,
    }


def test_forwarder_sends_each_step_once_and_never_backwards() -> None:
    forwarder = Forwarder()
    rows = [step(1), step(2), {"kind": "eval", "step": 2, "suite": "s", "metrics": {"f1": 0.5}}, step(3), step(4)]
    rows += [{"kind": "event", "step": 2, "name": "resume"}, step(3, 9.0), step(4, 9.0), step(5)]
    rows += [{"kind": "eval", "step": 2, "suite": "s", "metrics": {"f1": 0.9}}]
    sent = [entry for entry in map(forwarder.take, rows) if entry is not None]
    assert [number for number, _ in sent] == [1, 2, 2, 3, 4, 5]
    assert sent[0][1] == {"train/loss": 1.0, "train/losses/t": 1.0, "train/skipped": 0.0}
    assert sent[2][1] == {"eval/s/f1": 0.5}
    assert all(values.get("train/loss", 1.0) == 1.0 for _, values in sent)  # redone steps are not sent again
    assert forwarder.events == {"resume": 1}


def test_tail_gives_whole_rows_only(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "metrics.jsonl")
    assert tail.read() == []
    journal = Journal(tmp_path)
    journal.step({"step": 1})
    with tail.path.open("ab") as file:
        file.write(b'{"kind": "st')
    assert [row["step"] for row in tail.read()] == [1]
    assert tail.read() == []
    with tail.path.open("ab") as file:
        file.write(b'ep", "step": 2}\nnonsense\n')
    assert [row["step"] for row in tail.read()] == [2]
    assert tail.consumed == tail.path.stat().st_size
    journal.close()


class _Server(http.server.BaseHTTPRequestHandler):
    status, body = 200, b"{}"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[_Server]]]:
    handler = type("Handler", (_Server,), {})
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{service.server_address[1]}", handler
    service.shutdown()
    thread.join()
    service.server_close()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b'{"data": {"viewer": {"id": "x"}}}', None),
        (200, b'{"data": {"viewer": null}}', "login refused"),
        (401, b"", "login refused"),
        (503, b"", "server error"),
        (200, b"<html>", "not reachable"),
        (200, b"[]", "not reachable"),
    ],
)
def test_reach_tells_why(server: tuple[str, type[_Server]], status: int, body: bytes, told: str | None) -> None:
    url, handler = server
    handler.status, handler.body = status, body
    reason = reach(url, {"WANDB_API_KEY": KEY})
    assert reason is None if told is None else told in str(reason)


def test_reach_has_an_end_where_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "no API key" in str(reach("http://127.0.0.1:9", {}))
    assert "not reachable" in str(reach("http://127.0.0.1:9", {"WANDB_API_KEY": KEY}))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        began = time.monotonic()
        url = f"http://user:{KEY}@127.0.0.1:{silent.getsockname()[1]}"
        reason = str(reach(url, {"WANDB_API_KEY": KEY}))
        assert time.monotonic() - began < 3 and KEY not in reason


def test_modes(tmp_path: Path) -> None:
    assert start(tmp_path, "off", "p", "n", "i") is None
    with pytest.raises(ValueError, match="sometimes"):
        start(tmp_path, "sometimes", "p", "n", "i")
    assert list(tmp_path.iterdir()) == []


def _train(folder: Path, mode: str, steps: range, wait_for_mode: bool = True) -> list[float]:
    """Seconds that each call of the training side took."""
    taken = []
    tracker = Tracker(folder, steps[-1], wandb=mode, console=False, config={"lr": 1e-4, "hub": {"token": "canary-t"}})
    for number in steps:
        began = time.perf_counter()
        tracker.step({"step": number, "loss": 1 / number, "grad_norm": float("nan")})
        taken.append(time.perf_counter() - began)
    deadline = time.monotonic() + 20
    while wait_for_mode and time.monotonic() < deadline and "mode" not in (tracker._feed.state()):
        time.sleep(0.05)
    tracker.eval({"step": steps[-1], "suite": "held-out", "metrics": {"exact_match": 0.5}})
    tracker.close("complete")
    return taken


def _files_hold(folder: Path, needle: bytes) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


@needs_wandb
def test_offline_run_and_its_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", KEY)
    open_run(tmp_path, name="demo")
    _train(tmp_path, "offline", range(1, 9))
    identity = read_run(tmp_path)["id"]
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 1 and folders[0].name.endswith(identity)
    data = next(folders[0].glob("*.wandb")).read_bytes()
    assert b"train/loss" in data and b"eval/held-out/exact_match" in data
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in (tmp_path / "wandb.log").read_text()
    assert [row["detail"].split(":")[0] for row in read_rows(tmp_path) if row.get("name") == "wandb"] == ["offline"]
    assert read_run(tmp_path)["status"] == "complete"
    consumed = json.loads((tmp_path / STATE_NAME).read_text())["consumed"]

    open_run(tmp_path, name="demo")
    _train(tmp_path, "offline", range(5, 11))
    assert read_run(tmp_path)["id"] == identity
    second = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)[-1]
    assert second.name.endswith(identity)
    data = next(second.glob("*.wandb")).read_bytes()
    assert data.count(b"train/loss") < 6  # steps 5 to 8 were sent before; 9, 10 and the summary are new
    assert json.loads((tmp_path / STATE_NAME).read_text())["consumed"] > consumed
    assert _files_hold(tmp_path, KEY.encode()) == [] and _files_hold(tmp_path, b"canary") == []


@needs_wandb
def test_online_but_unreachable_means_offline_within_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", KEY)
    monkeypatch.setitem(os.environ, "WANDB_BASE_URL", "http://127.0.0.1:9")
    open_run(tmp_path, name="demo")
    began = time.monotonic()
    tracker = Tracker(tmp_path, 100, wandb="online", console=False)
    assert time.monotonic() - began < 1
    while not tracker._feed.state().get("mode") and time.monotonic() - began < 10:
        time.sleep(0.02)
    waited = time.monotonic() - began
    tracker.step({"step": 1, "loss": 1.0})
    tracker.close("complete")
    assert waited < 5
    event = next(row for row in read_rows(tmp_path) if row.get("name") == "wandb")
    assert event["detail"].startswith("offline: http://127.0.0.1:9 not reachable") and "wandb sync" in event["detail"]
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert _files_hold(tmp_path, KEY.encode()) == []


def _fake_feed(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A tracker whose feed process runs ``program`` instead."""
    open_run(folder, name="demo")
    real = subprocess.Popen

    def popen(command: list[str], **options: object) -> subprocess.Popen:
        return real([sys.executable, "-c", program], **options)  # type: ignore[call-overload]

    monkeypatch.setattr("trainer.tracking.wandb_feed.subprocess.Popen", popen)
    tracker = Tracker(folder, 2000, wandb="online", console=False)
    monkeypatch.undo()
    return tracker


def test_a_feed_that_hangs_or_is_stopped_blocks_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = _fake_feed(tmp_path, "import time; time.sleep(600)", monkeypatch)
    os.kill(tracker._feed.process.pid, signal.SIGSTOP)
    taken = []
    for number in range(1, 1001):
        began = time.perf_counter()
        tracker.step({"step": number, "loss": 1.0, "text": "x" * 200})
        taken.append(time.perf_counter() - began)
    assert sorted(taken)[990] < 0.01  # 200 kB written, more than any pipe holds; a shared core may pause a few
    began = time.monotonic()
    tracker.close("complete", feed_seconds=0.3)
    assert time.monotonic() - began < 3
    assert tracker._feed.process.returncode == -signal.SIGKILL
    assert "upload not finished" in read_rows(tmp_path)[-1]["detail"]
    assert read_run(tmp_path)["status"] == "complete"


def test_a_feed_that_dies_is_told_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = _fake_feed(tmp_path, "raise SystemExit(3)", monkeypatch)
    tracker._feed.process.wait()
    for number in (1, 2, 3):
        tracker._feed._looked_at = float("-inf")
        tracker.step({"step": number, "loss": 1.0})
    tracker.close("complete")
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3]
    assert [row["detail"] for row in rows if row["kind"] == "event"] == [
        "stopped (exit 3): see wandb.log; the run goes on"
    ]
