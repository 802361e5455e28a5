"""Saving in the background: a thread copies the state to host memory, then checks, writes and publishes the copy.

Training goes on meanwhile and waits for the copy only where it is about to change something: `copied`, before an
update. A forward and a backward lie between.

The thread's agreement with the other ranks runs over a process group of its own (gloo), so it never meets a collective
of the training; a rank that dies breaks its connections, and everybody's save fails. What the thread found is told by
the main thread, since the journal has one writer: `poll` when a save has succeeded, `failed` and `raise_failure` when
one has not.

At most one save is in flight, and one copy is in memory. A save that falls due meanwhile waits up to PATIENCE seconds
for it, once; if that is not enough it is skipped, counted and told, so slow storage costs checkpoints, not training.
A checkpoint that must stay for ever (`keep_every`) is waited for instead, and so is the last one.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from trainer import heartbeat
from trainer.checkpoint.durable import clean
from trainer.checkpoint.image import HostBuffer, Layout, Snapshot, mark
from trainer.checkpoint.lease import LeaseLostError
from trainer.checkpoint.manifest import STEP_PREFIX, CheckpointError, step_name
from trainer.checkpoint.ranges import Shadows, owned
from trainer.checkpoint.store import Content, Counters, Store, direct, publish, tidy
from trainer.config.errors import UserError
from trainer.engine.base import Engine
from trainer.world import World

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds that a save which is due waits for the one in flight
ABANDON = 30.0  # seconds that a failing run gives the save in flight

Tell = Callable[[int, str, Any], None]
"""step, name, detail of an event."""


class Saver:
    """Publishes the checkpoints of a run. Every rank calls the same methods at the same steps.

    Raises CheckpointError where `checkpoint.failure_limit` saves in a row have failed, LeaseLostError where another run
    has taken the folder over, UserError where the optimizer's state cannot be cut into ranges.
    """

    def __init__(self, store: Store, world: World, tell: Tell) -> None:
        self.store, self.world, self.tell = store, world, tell
        self.published = -1  # the last step that is durable
        self.scores: dict[int, float] = {}  # checkpoint.metric by step
        self.failures = 0  # in a row
        self.skipped = 0  # in all
        self._apart = world.apart()
        self._flight: _Flight | None = None
        self._buffer: HostBuffer | None = None
        self._touching: threading.Thread | None = None
        if world.is_main:
            clean(store.folder, STEP_PREFIX, store.lease.generation)  # whoever had the folder before publishes nothing

    # -- between steps

    @property
    def failed(self) -> bool:
        """Whether something is to be raised or told by `raise_failure`: cheap, for every step; ranks differ in it."""
        flight = self._flight
        return self.store.lease.lost or (flight is not None and flight.done and flight.error is not None)

    def raise_failure(self) -> None:
        """Tell and count the failed save on all ranks; raise where the limit is reached or the lease lost.

        Called by every rank once any has `failed`; they agree on the reason.
        """
        flight = self._flight
        if flight is not None:
            self._join(flight)
        error = flight.error if flight is not None else None
        rows = self.world.gather([self.store.lease.lost, str(error or ""), isinstance(error, UserError)])
        if any(lost for lost, _, _ in rows):
            raise LeaseLostError(self.store.lease.lost_message)
        self.poll()
        self._flight = None
        told = [(reason, users) for _, reason, users in rows if reason]
        if told and told[0][1]:
            raise UserError(told[0][0])
        if told and flight is not None:
            self._count(flight.step, told[0][0])

    def copied(self) -> None:
        """Return once the save in flight has its copy. To be called before anything changes a weight or a moment."""
        flight = self._flight
        if flight is not None and not flight.copied.is_set():
            started = time.perf_counter()
            flight.copied.wait()
            flight.blocking += time.perf_counter() - started

    def poll(self) -> None:
        """Tell of a save that has succeeded. No collective: each rank may find that at another step."""
        flight = self._flight
        if flight is not None and flight.done and flight.error is None and self.published != flight.step:
            self._succeed(flight.step, flight.seconds, flight.blocking)

    # -- saving

    def save(self, step: int, engine: Engine, state: Mapping[str, Any], shadows: Shadows | None = None) -> None:
        """Save this step, in the background unless `checkpoint.asynchronous` is off; `state` is rank 0's, JSON."""
        if step == self.published or (self._flight is not None and self._flight.step == step):
            return
        if not self.store.settings.asynchronous:
            self._now(step, engine, state, shadows or {})
        elif self._free(step):
            self._begin(step, engine, state, shadows or {})

    def save_last(self, step: int, engine: Engine, state: Mapping[str, Any], shadows: Shadows | None = None) -> None:
        """Return once this step is durable: the end of a run, or its preemption. A failed save is tried once more.

        Raises CheckpointError where that fails too.
        """
        self.wait(last=True)
        if step == self.published:
            return
        for attempt in (1, 2):
            if self._now(step, engine, state, shadows or {}, last=attempt == 2):
                return

    def wait(self, *, last: bool = False) -> None:
        """Return once nothing is in flight, having told how it ended; with `last` a failure is told but not raised."""
        if self._flight is None:
            return
        self._join(self._flight)
        try:
            self._settle(self.world.any(self.failed))
        except LeaseLostError:
            raise
        except CheckpointError:
            if not last:
                raise

    def score(self, step: int, value: float | None) -> None:
        """Take the metric of a step into account for retention; of a published step at once."""
        if value is None:
            return
        self.scores = {**self.scores, step: value}  # never changed in place: the thread reads it
        if step == self.published and self._flight is None and self.world.is_main:
            tidy(self.store, step, self.scores)

    def reserve(self, engine: Engine, shadows: Shadows | None = None) -> None:
        """Get the host memory of the copy beside the training, once the optimizer has its state.

        First use of memory is slow on some machines: 1.6 s for a first copy of 200 MB on a busy one, 0.05 s afterwards.
        """
        waits = self._buffer is None and self.store.settings.asynchronous
        if not waits or not any(slot.state for slot in engine.slots()):
            return
        parts, _ = owned(engine, shadows or {})
        self._buffer = HostBuffer(Layout(parts).size, self.world.device)
        self._touching = threading.Thread(target=self._buffer.touch, name="checkpoint-memory", daemon=True)
        self._touching.start()

    def close(self) -> None:
        """End, whatever happened before: the save in flight gets ABANDON seconds, and nothing is raised."""
        flight = self._flight
        if flight is not None:
            flight.thread.join(ABANDON)
            if not flight.done:
                log.error("checkpoint of step %d: given up after %.0f s: not saved", flight.step, ABANDON)
            elif flight.error is not None:
                log.error("checkpoint of step %d: not saved: %s", flight.step, flight.error)
            self.poll()
        if self._buffer is not None and (flight is None or flight.done):
            self._buffer.release()

    # -- the acts

    def _free(self, step: int) -> bool:
        """Whether a new save may begin, the same on all ranks; tells of the one before or of the skip."""
        flight, forever = self._flight, self.store.settings.keep_every
        if flight is not None:
            if forever and step % forever == 0:
                self._join(flight)
            else:
                flight.thread.join(flight.patience)
                flight.patience = 0.0
        busy = flight is not None and not flight.done
        signs = self.world.sum({"busy": float(busy), "failed": float(self.failed)})
        if flight is not None and signs["busy"]:
            self.skipped += 1
            self.tell(step, "checkpoint_skipped", {"in_flight": flight.step, "skipped": self.skipped})
            return False
        self._settle(bool(signs["failed"]))
        return True

    def _settle(self, failed: bool) -> None:
        """Tell how the save in flight ended, which all ranks know to have ended; raise as `raise_failure` does."""
        if failed:
            self.raise_failure()
        self.poll()
        self._flight = None

    def _begin(self, step: int, engine: Engine, state: Mapping[str, Any], shadows: Shadows) -> None:
        started = time.perf_counter()
        kept, after = copy.deepcopy(dict(state)), mark(self.world.device)
        held: tuple[Layout, Counters] | Exception
        try:
            parts, steps = owned(engine, shadows)
            held = Layout(parts), steps
        except (CheckpointError, UserError) as error:
            held = error  # this rank's; raised where all ranks learn of it

        def work(copied: threading.Event) -> None:
            content: Content | Exception
            try:
                content = held if isinstance(held, Exception) else self._snapshot(*held, after)
            except Exception as error:  # noqa: BLE001  as above
                content = error
            finally:
                copied.set()

            def make() -> Content:
                if isinstance(content, Exception):
                    raise content
                return content

            publish(self.store, step, make, self._apart, kept, list(shadows))
            if self.world.is_main:
                tidy(self.store, step, self.scores)

        self._flight = _Flight(step, work, started)

    def _snapshot(self, layout: Layout, steps: Counters, after: Any) -> Content:
        if self._touching is not None:
            self._touching.join()  # it writes into the same memory
        if self._buffer is None or self._buffer.bytes.numel() < layout.size:
            if self._buffer is not None:
                self._buffer.release()
            self._buffer = None  # the old one goes before the new one comes
            self._buffer = HostBuffer(layout.size, self.world.device)
        return Content(Snapshot(layout, self._buffer, after), steps)

    def _now(
        self, step: int, engine: Engine, state: Mapping[str, Any], shadows: Shadows, *, last: bool | None = None
    ) -> bool:
        """Save while training waits; False where it failed and the run may go on. `last`: whether there is no retry."""
        started = time.perf_counter()
        try:
            publish(self.store, step, lambda: direct(engine, shadows), self.world, dict(state), list(shadows))
            if self.world.is_main:
                tidy(self.store, step, self.scores)
        except CheckpointError as error:
            self._count(step, str(error), limit=None if last is None else 1 if last else 0)
            return False
        seconds = time.perf_counter() - started
        self._succeed(step, seconds, seconds)
        return True

    def _join(self, flight: _Flight) -> None:
        with heartbeat.section("checkpoint"):
            while flight.thread.is_alive():
                flight.thread.join(1.0)

    def _succeed(self, step: int, seconds: float, blocking: float) -> None:
        self.published, self.failures = step, 0
        detail = {"path": step_name(step), "seconds": round(seconds, 3), "blocking": round(blocking, 3)}
        self.tell(step, "checkpoint", detail)

    def _count(self, step: int, reason: str, limit: int | None = None) -> None:
        """A failure, the same on all ranks. `limit` in place of the recipe's: 0 never raises, 1 always."""
        self.failures += 1
        self.tell(step, "checkpoint_failed", {"error": reason, "in_row": self.failures})
        log.warning("checkpoint of step %d not saved: %s", step, reason)
        most = self.store.settings.failure_limit if limit is None else limit
        if most and self.failures >= most:
            many = "the last one" if limit else f"{self.failures} in a row"
            raise CheckpointError(f"step {step}: checkpoints fail, {many}: {reason}")


class _Flight:
    """A save in the background."""

    def __init__(self, step: int, work: Callable[[threading.Event], None], started: float) -> None:
        self.step, self.patience = step, PATIENCE
        self.error: Exception | None = None
        self.done = False
        self.copied = threading.Event()
        self.seconds = 0.0
        self._work, self._started = work, started
        self.thread = threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)
        self.thread.start()
        self.blocking = time.perf_counter() - started

    def _run(self) -> None:
        try:
            self._work(self.copied)
        except Exception as error:  # noqa: BLE001  kept for the main thread, which tells and raises it
            self.error = error
        self.seconds = time.perf_counter() - self._started
        self.done = True
