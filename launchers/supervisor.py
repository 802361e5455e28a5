"""`tunesmith launch`: starts the ranks, watches over them, and starts them again as long as the run gets on.

It imports no torch: it starts at once, holds little memory, and is no target of what kills training processes.
"""

from __future__ import annotations

import json
import re
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from launchers.hang import Verdict, ranks_text
from launchers.local import Launch, Ranks, log_path, new_attempt, rank_environment, start_ranks
from launchers.machine import KernelLog, memory_kills
from launchers.outcome import STARTING, Ending, Outcome, judge
from launchers.policy import Failure, GiveUp, decide
from launchers.reserve import Reserve
from launchers.terminal import Terminal
from launchers.watch import Watch
from trainer.config.errors import RunError, UserError
from trainer.heartbeat import stacks_path
from trainer.launched import LOGS_FOLDER
from trainer.signals import STOP_SIGNALS, STOPPED

TICK = 1.0  # seconds; what happens in between (a rank ends, a signal comes) wakes the supervisor at once
AFTER_SIGNAL = 2.0  # seconds for the others to tell what they saw, once a rank has been killed: they cannot go on
AFTER_ERROR = 10.0  # the same once a rank has left with an error: all may be telling the same one, and closing W&B
STARTING_STOP = 10.0  # seconds from a stop signal to the end of ranks that have nothing to save yet
LONGEST_STOP = 3600.0  # seconds for the last save where nobody looks for hangs (--hang-seconds 0)
SHARED_MEMORY = Path("/dev/shm")
LINES_SHOWN = 12  # of the failing rank's log
_CHECKPOINT = re.compile(r"step-(\d+)")


class Stop:
    """The first stop signal of this process; it wakes whoever waits, as does the end of a rank."""

    def __init__(self) -> None:
        self.number = 0
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._before: list[tuple[int, Any]] = []

    @property
    def name(self) -> str:
        """The signal's name; empty as long as none came."""
        return signal.Signals(self.number).name if self.number else ""

    def __enter__(self) -> Stop:
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._take(signal.SIGCHLD, lambda number, frame: None)
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:  # nohup stays nohup
                self._take(number, self._set)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> None:
        """Return after so long, or at once when a signal came or a child ended."""
        if select.select([self._reader], [], [], seconds)[0]:
            self._reader.recv(4096)

    def _take(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        self._before.append((number, signal.signal(number, handler)))

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number


class Supervisor:
    """One `tunesmith launch`, from its first attempt to its last."""

    def __init__(self, launch: Launch, stop: Stop, terminal: Terminal) -> None:
        self.launch, self.stop, self.terminal = launch, stop, terminal
        self.failures: list[Failure] = []
        self.old_run = self._run_id() if launch.fresh else None
        self.kernel = KernelLog()
        self.reserve: Reserve | None = None

    def run(self) -> int:
        """0 or 75. Raises UserError where the ranks refused the recipe, RunError where the run failed for good."""
        try:
            return self._run()
        finally:
            if self.reserve is not None:
                self.reserve.dismiss()

    def _run(self) -> int:
        reason = ""
        while True:
            outcome, failure, logs = self._attempt(reason)
            if outcome.kind == "complete":
                return 0
            if outcome.kind == "preempted":
                self.terminal.say(f"stopped by {outcome.reason or 'a signal to a rank'}; the same command goes on")
                return STOPPED
            if outcome.kind == "refused":
                raise UserError(outcome.reason)
            self.failures.append(failure)
            reason = outcome.reason
            decision = decide(self.failures, self.launch.max_restarts)
            self._record("gives_up" if isinstance(decision, GiveUp) else "restarts", decision=vars(decision))
            if isinstance(decision, GiveUp):
                self._show_log(logs, failure.rank)
                raise RunError(f"{decision.reason}; {reason}; logs: {logs}")
            self.terminal.say(f"{reason}; starting again from {self._from()} (logs: {logs})")
            if not self._rest(decision.delay):
                self.terminal.say(f"stopped by {self.stop.name} between two attempts; the same command goes on")
                return STOPPED

    def _attempt(self, reason: str) -> tuple[Outcome, Failure, Path]:
        number, logs = new_attempt(self.launch.folder)
        pulses = Path(tempfile.mkdtemp(prefix="tunesmith-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
        record, kills = self._run_record(), memory_kills()
        self.kernel.killed()
        try:
            ranks = self._start(number, logs, pulses, reason)
            self.terminal.follow(log_path(logs, 0))
            self._record("attempt", number=number, pids=[process.pid for process in ranks.processes], reason=reason)
            watch = Watch(ranks, self.launch.hang_seconds)
            try:
                ours, hung = self._stand_by(ranks, watch)
            finally:
                ranks.kill()
            exits = ranks.exits.values()
            endings = [Ending(end.rank, end.code, end.time, watch.place(end.rank), end.rank in ours) for end in exits]
            victims = self._out_of_memory(ranks, endings, memory_kills() > kills)
            after = self._run_record()
            complete = json.loads(after or b"{}").get("status") == "complete"
            outcome = judge(
                endings,
                completed=complete and after != record,
                already=complete,
                stop=self.stop.name,
                hung=hung,
                out_of_memory=victims,
            )
            failure = self._failure(outcome, endings)
            self._record("ended", number=number, outcome=vars(outcome), ranks=[vars(ending) for ending in endings])
            self._tell_oddities(outcome, endings, hung)
            return outcome, failure, logs
        finally:
            shutil.rmtree(pulses, ignore_errors=True)
            self._drop_empty_stacks(logs)

    def _start(self, number: int, logs: Path, pulses: Path, reason: str) -> Ranks:
        """The ranks of an attempt, out of the reserve where there is one.

        With --fresh as long as the old run is still in the folder, whatever an attempt died of.
        """
        launch, reserve = self.launch, self.reserve
        if launch.fresh and self._run_id() == self.old_run:
            launch = replace(launch, arguments=(*launch.arguments, "--fresh"))
        elif reserve is not None:
            self.reserve = None
            if reserve.ready:
                return reserve.call(number, logs, pulses, reason)
            reserve.dismiss()
        size = range(launch.nproc)
        environments = [rank_environment(launch, rank, number, logs, pulses, reason) for rank in size]
        return Ranks(start_ranks(launch, environments, [log_path(logs, rank) for rank in size]), logs, pulses)

    def _fill_reserve(self, ranks: Ranks, watch: Watch) -> None:
        """Start the next attempt's ranks once this one's have all made a step."""
        going = self.launch.standby and self.reserve is None and not self.stop.number
        if going and all(watch.place(rank)["done"] is not None for rank in ranks.alive):
            self.reserve = Reserve(self.launch)

    def _stand_by(self, ranks: Ranks, watch: Watch) -> tuple[set[int], Verdict | None]:
        """Wait until every rank has ended, of itself or killed: by a stop that there is nothing to save for, because
        another one failed, because one hangs. Returns the ranks killed for another's sake, and who hung."""
        told, ours, end, stop_end = False, set[int](), float("inf"), float("inf")
        while True:
            for ended in ranks.poll():
                if ended.code == STOPPED:  # it may have been told to stop before it could tell the others
                    starting = [rank for rank in ranks.alive if watch.place(rank)["section"] in STARTING]
                    ranks.signal(signal.SIGTERM, starting)
                    stop_end = min(stop_end, time.monotonic() + STARTING_STOP)
                if watch.place(ended.rank)["section"] != "finish":  # the others cannot go on without it
                    end = min(end, time.monotonic() + (AFTER_SIGNAL if ended.code < 0 else AFTER_ERROR))
            if not ranks.alive:
                return ours, None
            now = time.monotonic()
            if self.stop.number and not told:
                told, stop_end = True, min(stop_end, now + STARTING_STOP)
                ranks.signal(self.stop.number if self.stop.number != signal.SIGHUP else signal.SIGTERM)
            if end < float("inf") and all(watch.place(rank)["ended"] for rank in ranks.alive):
                end = now  # all have told what there was to tell
            doomed = ranks.alive if now >= end else self._nothing_to_save(ranks, watch, now, stop_end)
            if doomed:
                ours |= set(doomed)
                self._kill(ranks, doomed)
            elif verdict := watch.look():
                for line in verdict.details:
                    self.terminal.say(line)
                self._kill(ranks, ranks.alive)
                return ours, verdict
            else:
                self._fill_reserve(ranks, watch)
                self.stop.wait(TICK if end == float("inf") else min(0.1, end - now))

    def _nothing_to_save(self, ranks: Ranks, watch: Watch, now: float, stop_end: float) -> list[int]:
        """Ranks that were told to stop and have not done so in time, in C code that no signal breaks into."""
        if now < stop_end:
            return []
        if self.stop.number and self.launch.hang_seconds <= 0 and now > stop_end + LONGEST_STOP:
            return ranks.alive
        return [rank for rank in ranks.alive if watch.place(rank)["section"] in STARTING]

    def _kill(self, ranks: Ranks, doomed: list[int]) -> None:
        if left := ranks.kill(doomed):
            raise RunError(
                f"{ranks_text(left)} cannot be killed: blocked in the kernel, as by a file system that does not "
                "answer; mend that, or restart the machine"
            )

    def _out_of_memory(self, ranks: Ranks, endings: list[Ending], counted: bool) -> set[int]:
        killed = {e.rank for e in endings if e.code == -signal.SIGKILL and not e.killed}
        named = self.kernel.killed()
        known = {rank for rank in killed if ranks.pid(rank) in named}
        return known or (killed if counted else set())

    def _failure(self, outcome: Outcome, endings: list[Ending]) -> Failure:
        first = next((ending for ending in endings if ending.rank == outcome.rank), None)
        place = first.place if first else {}
        return Failure(
            outcome.rank,
            outcome.reason,
            str(place.get("section", "start")),
            place.get("step"),
            tuple(place.get("ids", ())),
            min((ending.place.get("done") or 0 for ending in endings), default=0),
            self._saved(),
        )

    def _saved(self) -> int:
        """The step of the newest checkpoint that looks whole; -1 if there is none."""
        found = (self.launch.folder / "checkpoints").glob("step-*/manifest.json")
        names = (_CHECKPOINT.fullmatch(path.parent.name) for path in found)
        return max((int(name[1]) for name in names if name), default=-1)

    def _from(self) -> str:
        return "the beginning" if self._saved() < 0 else f"step {self._saved()}"

    def _run_record(self) -> bytes:
        try:
            return (self.launch.folder / "run.json").read_bytes()
        except FileNotFoundError:
            return b""

    def _run_id(self) -> str | None:
        return json.loads(self._run_record() or b"{}").get("id")

    def _rest(self, seconds: float) -> bool:
        """Wait before a restart; False where a signal came."""
        end = time.monotonic() + seconds
        while not self.stop.number and (left := end - time.monotonic()) > 0:
            self.stop.wait(left)
        return not self.stop.number

    def _tell_oddities(self, outcome: Outcome, endings: list[Ending], hung: Verdict | None) -> None:
        odd = [ending for ending in endings if ending.code]
        if outcome.kind == "complete" and odd:
            codes = ", ".join(f"rank {ending.rank} with {ending.code}" for ending in odd)
            self.terminal.say(f"the run is complete; after that ended {codes}")
        if hung is not None:
            self.terminal.say(f"Python stacks of all ranks: {stacks_path(Path('stacks'), 0).name} and its like")

    def _show_log(self, logs: Path, rank: int | None) -> None:
        """The last lines of the failing rank's log, where they are not on the terminal already."""
        if rank:
            lines = log_path(logs, rank).read_text(errors="replace").splitlines()[-LINES_SHOWN:]
            for line in lines:
                self.terminal.say(f"rank {rank} | {line}")

    def _drop_empty_stacks(self, logs: Path) -> None:
        for rank in range(self.launch.nproc):
            path = stacks_path(logs, rank)
            if path.exists() and not path.stat().st_size:
                path.unlink()

    def _record(self, event: str, **facts: Any) -> None:
        row = {"time": round(time.time(), 3), "event": event, **facts}
        path = self.launch.folder / LOGS_FOLDER / "supervisor.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)  # --fresh moves the whole folder aside
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")


def supervise(launch: Launch) -> int:
    """Run to the end: 0 where the run is complete, 75 where it was stopped and is to be started again.

    Raises UserError where the ranks refused recipe or data, RunError where the run failed and no restart helps.
    """
    with Stop() as stop:
        terminal = Terminal()
        try:
            return Supervisor(launch, stop, terminal).run()
        finally:
            terminal.close()
