"""Rows to examples over several processes, in order, with a bounded number of rows in memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from trainer.config.errors import RunError, UserError
from trainer.config.schema import Source
from trainer.data.encode import Encoded, Encoder, TooLong
from trainer.data.formats import to_record
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
    for chunk in _chunks(islice(rows, ALONE)):
        yield from zip(chunk, alone.results(chunk), strict=True)
    rest = _chunks(rows)
    first = next(rest, None)
    if first is None:
        return
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    if workers < 2:
        for chunk in chain([first], rest):
            yield from zip(chunk, alone.results(chunk), strict=True)
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


class _Worker:
    def __init__(self, job: Job, tokenizer: Any) -> None:
        self.job = job
        self.encoder = Encoder(tokenizer, job.source, job.objective, job.max_length, job.key)

    def results(self, rows: list[Row | BadRow]) -> list[Result]:
        """A result for each row, in order."""
        results: list[Result | None] = []
        records = []
        for row in rows:
            try:
                if isinstance(row, BadRow):
                    results.append(row.message)
                    continue
                records.append(to_record(row, self.job.source, self.job.labels, self.job.objective == "supervised"))
                results.append(None)
            except UserError as error:
                results.append(str(error))
        encoded = iter(self.encoder.encode(records))
        filled = (next(encoded) if result is None else result for result in results)
        return [str(result) if isinstance(result, UserError) else result for result in filled]


_worker: _Worker | None = None  # of a spawned process, which serves one job


def _start(job: Job, tokenizer: Any) -> None:
    global _worker
    die_with_parent()  # else it waits for work for ever where its parent is killed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each; the processes are the parallelism
    _worker = _Worker(job, tokenizer)


def _work(rows: list[Row | BadRow]) -> list[Result]:
    assert _worker is not None
    return _worker.results(rows)
