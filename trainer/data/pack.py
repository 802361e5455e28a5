"""Examples into micro-batches under a token limit, balanced over ranks: pure functions of lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], micro_tokens: int, world_size: int, packed: bool) -> list[list[int]]:
    """Micro-batches as lists of indices into ``lengths``; rank r takes numbers r, r + world_size, ...

    Each index occurs once. A packed micro-batch holds at most ``micro_tokens`` tokens, a padded one at most that many
    cells (rows times longest). Their number is the smallest multiple of ``world_size`` (at least one each) that a
    longest-first packing reaches; lists are empty only where there are fewer examples than micro-batches.
    Neighbouring micro-batches, which the ranks do at the same time, are alike in size.

    Raises ValueError for an example over the limit.
    """
    sizes = [int(length) for length in lengths]
    if sizes and max(sizes) > micro_tokens:
        raise ValueError(f"an example of {max(sizes)} tokens does not fit into {micro_tokens}")
    if packed:
        batches = _bins(sizes, micro_tokens, world_size)
        costs = [sum(sizes[index] for index in batch) for batch in batches]
    else:
        batches = _buckets(sizes, micro_tokens, world_size)
        costs = [len(batch) * max((sizes[index] for index in batch), default=0) for batch in batches]
    ranked = sorted(range(len(batches)), key=lambda place: (-costs[place], batches[place]))
    rounds = [ranked[start : start + world_size] for start in range(0, len(ranked), world_size)]
    # Every other round is dealt backwards, or the first rank would always have the largest.
    dealt = [place for turn, line in enumerate(rounds) for place in (line if turn % 2 == 0 else line[::-1])]
    return [sorted(batches[place]) for place in dealt]


def _bins(sizes: list[int], limit: int, multiple: int) -> list[list[int]]:
    """Longest first, each into the emptiest bin (Graham 1969); more bins where one does not fit."""
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    count = _rounded(max(1, -(-sum(sizes) // limit)), multiple)
    while (filled := _fill(sizes, order, limit, count)) is None:
        count += multiple
    return filled


def _fill(sizes: list[int], order: list[int], limit: int, count: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, place) for place in range(count)]
    for index in order:
        load, place = heap[0]
        if load + sizes[index] > limit:
            return None  # it does not fit the emptiest, so it fits none
        heapq.heapreplace(heap, (load + sizes[index], place))
        bins[place].append(index)
    return bins


def _buckets(sizes: list[int], limit: int, multiple: int) -> list[list[int]]:
    """Runs of examples of like length, as even in cells as a common limit can make them."""
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    count = _rounded(max(1, len(_runs(sizes, order, limit))), multiple)
    low, high = 1, limit
    while low < high:
        middle = (low + high) // 2
        fits = not order or (sizes[order[0]] <= middle and len(_runs(sizes, order, middle)) <= count)
        low, high = (low, middle) if fits else (middle + 1, high)
    runs = _runs(sizes, order, high)
    while len(runs) < count and any(len(run) > 1 for run in runs):
        place = max(
            range(len(runs)), key=lambda place: (len(runs[place]) > 1, len(runs[place]) * sizes[runs[place][0]])
        )
        run, half = runs[place], (len(runs[place]) + 1) // 2
        runs[place : place + 1] = [run[:half], run[half:]]
    return runs + [[] for _ in range(count - len(runs))]


def _runs(sizes: list[int], order: list[int], limit: int) -> list[list[int]]:
    """``order`` (longest first) cut where rows times the longest would pass ``limit``."""
    runs: list[list[int]] = []
    for index in order:
        if runs and (len(runs[-1]) + 1) * sizes[runs[-1][0]] <= limit:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
