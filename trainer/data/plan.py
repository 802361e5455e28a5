"""Which examples make up global step k: from seed and position alone, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.config.schema import Recipe, Stage
from trainer.data.order import MixtureOrder, Order
from trainer.data.prepare import Prepared
from trainer.data.store import TokenisedSource

BLOCK = 1 << 16  # draws looked at together where whole stages are measured

State = dict[str, Any]  # JSON: {"step": int, "drawn": {source: int}}


def stage_tasks(sources: Mapping[str, TokenisedSource]) -> tuple[str, ...]:
    """The tasks of a stage's sources, sorted: the same on every rank and in every step."""
    return tuple(sorted({source.task for source in sources.values()}))


class Plan:
    """The global batches of one stage."""

    def __init__(
        self,
        stage: Stage,
        sources: Mapping[str, TokenisedSource],
        seed: int,
        stage_index: int,
        order: Order | None = None,
    ) -> None:
        self.stage = stage
        self.sources = {name: sources[name] for name in sorted(stage.mixture)}
        sizes = {name: len(source) for name, source in self.sources.items()}
        # The seat of curriculum and replay: another Order given here changes what comes next, and nothing else does.
        self.order: Order = order or MixtureOrder(sizes, stage.mixture, seed, stage_index)
        self.lengths = [self.sources[name].lengths for name in self.order.names]
        self.limit = self.order.total(stage.until.epochs) if stage.until.epochs is not None else None

    @staticmethod
    def start() -> State:
        """The state before the first step."""
        return {"step": 0, "drawn": {}}

    def next_step(self, state: State) -> tuple[list[tuple[str, int]], State]:
        """([(source, example index)] of the global step that follows ``state``, state after it).

        The list is empty once the stage has ended. The state is JSON and is not changed in place.
        """
        if self.is_done(state):
            return [], state
        drawn = state["drawn"]
        sources, examples = self._draw(drawn)
        after = dict(drawn)
        for index, count in enumerate(np.bincount(sources, minlength=len(self.order.names)).tolist()):
            name = self.order.names[index]
            after[name] = after.get(name, 0) + count
        names = [self.order.names[index] for index in sources.tolist()]
        return list(zip(names, examples.tolist(), strict=True)), {"step": state["step"] + 1, "drawn": after}

    def is_done(self, state: State) -> bool:
        """Whether the stage has no step after ``state``."""
        steps = self.stage.until.steps
        if steps is not None and state["step"] >= steps:
            return True
        return self.limit is not None and sum(state["drawn"].values()) >= self.limit

    def _draw(self, drawn: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        left = None if self.limit is None else self.limit - sum(drawn.values())
        batch = self.stage.batch
        if batch.examples is not None:
            return self.order.block(drawn, batch.examples if left is None else min(batch.examples, left))
        assert batch.tokens is not None
        count = 16
        while True:
            count = count if left is None else min(count, left)
            sources, examples = self.order.block(drawn, count)
            totals = np.cumsum(self._lengths(sources, examples))
            if totals[-1] > batch.tokens or count == left:
                fit = max(1, int(np.searchsorted(totals, batch.tokens, side="right")))
                return sources[:fit], examples[:fit]
            count *= 2

    def _lengths(self, sources: np.ndarray, examples: np.ndarray) -> np.ndarray:
        lengths = np.empty(len(sources), np.int64)
        for index, own in enumerate(self.lengths):
            here = sources == index
            lengths[here] = own[examples[here]]
        return lengths

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the stage: what `until.epochs` gives, `until.steps`, or the smaller of the two."""
        steps, batch = self.stage.until.steps, self.stage.batch
        if self.limit is None:
            assert steps is not None
            return steps
        if batch.examples is not None:
            needed = -(-self.limit // batch.examples)
        else:
            assert batch.tokens is not None
            needed = count_token_steps(
                (self._lengths(*block) for block in self._blocks(self.limit)), batch.tokens, steps
            )
        return needed if steps is None else min(steps, needed)

    def _blocks(self, draws: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The first ``draws`` draws of the stage, in blocks."""
        drawn: dict[str, int] = {}
        while draws > 0:
            sources, examples = self.order.block(drawn, min(draws, BLOCK))
            yield sources, examples
            draws -= len(sources)
            for index, count in enumerate(np.bincount(sources, minlength=len(self.order.names)).tolist()):
                drawn[self.order.names[index]] = drawn.get(self.order.names[index], 0) + count

    def totals(self) -> dict[str, Any]:
        """{examples, tokens, target_tokens, steps, epochs {source: passes}} of the whole stage, counted exactly."""
        draws = self._total_draws()
        targets = [self.sources[name].targets for name in self.order.names]
        tokens = target_tokens = 0
        drawn = np.zeros(len(self.order.names), np.int64)
        for sources, examples in self._blocks(draws):
            drawn += np.bincount(sources, minlength=len(drawn))
            tokens += int(self._lengths(sources, examples).sum())
            target_tokens += sum(int(own[examples[sources == index]].sum()) for index, own in enumerate(targets))
        passes = {
            name: count / len(self.sources[name]) for name, count in zip(self.order.names, drawn.tolist(), strict=True)
        }
        return {
            "examples": draws,
            "tokens": tokens,
            "target_tokens": target_tokens,
            "steps": self.total_steps,
            "epochs": passes,
        }

    def _total_draws(self) -> int:
        batch = self.stage.batch
        if self.limit is not None and self.stage.until.steps is None:
            return self.limit
        if batch.examples is not None:
            draws = self.total_steps * batch.examples
            return draws if self.limit is None else min(draws, self.limit)
        state = self.start()
        while not self.is_done(state):
            _, state = self.next_step(state)
        return sum(state["drawn"].values())


def count_token_steps(lengths: Iterator[np.ndarray], tokens: int, most: int | None = None) -> int:
    """Steps that fill up to ``tokens`` each with examples in order, at least one example a step; stops at ``most``."""
    steps, carried = 0, np.empty(0, np.int64)
    for block in lengths:
        carried = np.concatenate([carried, block])
        totals, at, base = np.cumsum(carried), 0, 0
        while at < len(carried) and totals[-1] - base > tokens:
            at = max(at + 1, int(np.searchsorted(totals, base + tokens, side="right")))
            base, steps = int(totals[at - 1]), steps + 1
            if most is not None and steps >= most:
                return steps
        carried = carried[at:]
    return steps + (len(carried) > 0)


def summary(recipe: Recipe, prepared: Prepared) -> list[dict[str, Any]]:
    """For each stage: name, examples, tokens, target_tokens, steps, epochs per source, and its sources' counts."""
    rows = []
    for index, stage in enumerate(recipe.stages):
        sources = prepared.stage(stage)
        plan = Plan(stage, sources, recipe.seed, index)
        rows.append(
            {"stage": stage.name, **plan.totals(), "sources": {name: form.counts for name, form in sources.items()}}
        )
    return rows


def check_lengths(sources: Sequence[TokenisedSource], micro_tokens: int, key: str) -> None:
    """Raise UserError where an example is longer than one forward may hold."""
    for source in sources:
        longest = int(source.lengths.max())
        if longest > micro_tokens:
            name = source.example_id(int(source.lengths.argmax()))
            raise UserError(
                f"{key}: {micro_tokens}: {name} has {longest} tokens; raise `batch.micro_tokens` or lower max_length"
            )
