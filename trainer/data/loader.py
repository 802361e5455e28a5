"""This rank's micro-batches: the plan's examples, packed, dealt and collated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data.batch import Batch
from trainer.data.collate import collate, example_of
from trainer.data.pack import pack
from trainer.data.plan import Plan, State, check_lengths, stage_tasks
from trainer.data.store import TokenisedSource


class Loader:
    """Gives each optimizer step's micro-batches for one rank. The state is the plan's, the same on every rank."""

    def __init__(
        self, plan: Plan, *, rank: int, size: int, packed: bool, pad_id: int, classification: bool = False
    ) -> None:
        self.plan, self.rank, self.size = plan, rank, size
        self.packed, self.pad_id, self.classification = packed, pad_id, classification
        self.tasks = stage_tasks(plan.sources)
        self.position: State = plan.start()
        self.chosen: list[tuple[str, int]] = []
        check_lengths(list(plan.sources.values()), plan.stage.batch.micro_tokens, "batch.micro_tokens")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.plan.total_steps

    @property
    def done(self) -> bool:
        """Whether the stage has given its last step."""
        return self.plan.is_done(self.position)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global step, at least one, as many as every other rank gets.

        Raises StopIteration behind the last step.
        """
        if self.done:
            raise StopIteration("the stage has no further step")
        self.chosen, self.position = self.plan.next_step(self.position)
        sources = self.plan.sources
        lengths = [int(sources[name].offsets[index + 1] - sources[name].offsets[index]) for name, index in self.chosen]
        batches = pack(lengths, self.plan.stage.batch.micro_tokens, self.size, self.packed)
        return [self._collated([self.chosen[place] for place in batch]) for batch in batches[self.rank :: self.size]]

    def _collated(self, chosen: list[tuple[str, int]]) -> Batch:
        examples = [example_of(self.plan.sources[name], index) for name, index in chosen]
        return collate(examples, self.tasks, self.packed, self.pad_id, self.classification)

    def step_ids(self) -> list[str]:
        """The names of all examples of the step given last, over all ranks, in the plan's order."""
        return [self.plan.sources[name].example_id(index) for name, index in self.chosen]

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON; the same on every rank and for every number of ranks."""
        return {"step": self.position["step"], "drawn": dict(self.position["drawn"])}

    def load(self, state: Mapping[str, Any], missing_ok: bool = False) -> None:
        """Go on behind the step at which ``state`` was taken.

        Raises ValueError for another stage's state, whose sources this stage lacks; with ``missing_ok`` they are
        dropped.
        """
        foreign = sorted(set(state["drawn"]) - set(self.plan.sources))
        if foreign and not missing_ok:
            raise ValueError(f"the saved position has sources that this stage lacks: {', '.join(foreign)}")
        self.position = {
            "step": int(state["step"]),
            "drawn": {name: int(count) for name, count in state["drawn"].items() if name not in foreign},
        }
        self.chosen = []


def evaluation_batches(
    source: TokenisedSource,
    micro_tokens: int,
    *,
    rank: int,
    size: int,
    packed: bool,
    pad_id: int,
    classification: bool = False,
) -> Iterator[Batch]:
    """This rank's share of a whole source, ordered by lengths alone; every rank gets the same number of batches.

    Batches carry `example_ids`, so that sums can be put back in the source's order. Raises UserError where an example
    is over ``micro_tokens``.
    """
    check_lengths([source], micro_tokens, "batch.micro_tokens")
    batches = pack(source.lengths.tolist(), micro_tokens, size, packed)
    for batch in batches[rank::size]:
        yield collate([example_of(source, index) for index in batch], (source.task,), packed, pad_id, classification)
