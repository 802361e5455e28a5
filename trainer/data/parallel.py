"""Rows to examples over several processes, in order, with a bounded number of rows in memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from trainer.config.errors import RunError, UserError
from trainer.config.schema import Source
from trainer.data.encode import Chat, Encoded, Encoder, TooLong
from trainer.data.formats import Record, to_record
from trainer.data.readers import BadRow, Row
from trainer.heartbeat import beat
from trainer.signals import die_with_parent

CHUNK = 256  # rows that travel together
ALONE = 16384  # rows done in this process first: starting workers costs seconds, most sources are smaller
MOST_WORKERS = 16  # reading the rows is one process's work, which feeds about that many

Result = Encoded | TooLong | str  # an example, one over the limit, or a bad row's message


@dataclass(frozen=True)
class Job:
    """What is done with each row of one source."""

    key: str  # sources.<name>
    source: Source
    objective: str
    max_length: int
    labels: list[str] | None


def refuse_import_time() -> None:
    """Raise RuntimeError where a spawned worker runs this while it imports the main script again.

    It would start the whole run anew, and wait for a lock that its parent holds.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError('the main script starts a run when imported; put it under `if __name__ == "__main__":`')


def process(rows: Iterable[Row | BadRow], job: Job, tokenizer: Any) -> Iterator[tuple[Row | BadRow, Result]]:
    """(row, result) for every row, in order.

    Workers are spawned, not forked: this process may hold threads (OpenMP, the tokenizer's own), and a fork copies
    their locks in whatever state they are.
    """
    rows = iter(rows)
    alone = _Worker(job, tokenizer)
    yield from alone.stream(_chunks(islice(rows, ALONE)))
    rest = _chunks(rows)
    first = next(rest, None)
    if first is None:
        return
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    if workers < 2:
        yield from alone.stream(chain([first], rest))
        return
    yield from _spread(chain([first], rest), job, tokenizer, workers)


def _chunks(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        beat()
        yield chunk


def _spread(
    chunks: Iterator[list[Row | BadRow]], job: Job, tokenizer: Any, workers: int
) -> Iterator[tuple[Row | BadRow, Result]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job, tokenizer))
    waiting: deque[tuple[list[Row | BadRow], Future[list[Result]]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, chunk)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        while waiting:
            done, future = waiting.popleft()
            yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise RunError(
            "a tokenising process died: out of memory, or the main script lacks its `__main__` guard"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Read:
    """Rows before they are tokenised: a fault of each row, or None and, in order, its record."""

    faults: list[str | None]
    records: list[Record]
    chats: list[Chat]


class _Worker:
    def __init__(self, job: Job, tokenizer: Any) -> None:
        self.job = job
        self.encoder = Encoder(tokenizer, job.source, job.objective, job.max_length, job.key)

    def stream(self, chunks: Iterable[list[Row | BadRow]]) -> Iterator[tuple[Row | BadRow, Result]]:
        """(row, result) for every row; while one chunk is tokenised, the next one's chat templates run elsewhere."""
        with ThreadPoolExecutor(1) as ahead:
            waiting: tuple[list[Row | BadRow], Future[_Read]] | None = None
            for chunk in chunks:
                coming = chunk, ahead.submit(self.read, chunk)
                if waiting is not None:
                    yield from zip(waiting[0], self.finish(waiting[1].result()), strict=True)
                waiting = coming
            if waiting is not None:
                yield from zip(waiting[0], self.finish(waiting[1].result()), strict=True)

    def read(self, rows: list[Row | BadRow]) -> _Read:
        """The rows as records and, of conversations, their text."""
        faults: list[str | None] = []
        records = []
        for row in rows:
            try:
                if isinstance(row, BadRow):
                    faults.append(row.message)
                    continue
                records.append(to_record(row, self.job.source, self.job.labels, self.job.objective == "supervised"))
                faults.append(None)
            except UserError as error:
                faults.append(str(error))
        return _Read(faults, records, self.encoder.chats(records))

    def finish(self, read: _Read) -> list[Result]:
        """A result for each row, in order."""
        encoded = iter(self.encoder.encode(read.records, read.chats))
        results = (next(encoded) if fault is None else fault for fault in read.faults)
        return [str(result) if isinstance(result, UserError) else result for result in results]


_worker: _Worker | None = None  # of a spawned process, which serves one job


def _start(job: Job, tokenizer: Any) -> None:
    global _worker
    die_with_parent()  # else it waits for work for ever where its parent is killed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each; the processes are the parallelism
    _worker = _Worker(job, tokenizer)


def _work(rows: list[Row | BadRow]) -> list[Result]:
    assert _worker is not None
    return _worker.finish(_worker.read(rows))
