"""The suites of a recipe, run on a model: held-out loss, answers, classes; the same on any number of ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import Recipe, RunError, Suite, UserError
from trainer.config.schema import Evaluation
from trainer.data.loader import evaluation_batches
from trainer.data.prompts import Prompt, generation_prompts
from trainer.data.store import TokenisedSource
from trainer.evaluation.generation import generate_answers
from trainer.evaluation.likelihood import Likelihoods, corpus_loss, joined, likelihoods, perplexity
from trainer.evaluation.mode import evaluating
from trainer.evaluation.results import Model, Result, base_result, result_path, write_result
from trainer.evaluation.verdicts import verdict
from trainer.heartbeat import section
from trainer.measures import metric_named, score
from trainer.model.build import can_pack
from trainer.model.root import Trainee
from trainer.world import World

log = logging.getLogger(__name__)

EXAMPLES_SHOWN = 500  # rows that a result shows in full
JSON_METRICS = frozenset({"json_match", "field_accuracy", "field_f1"})
CLASSIFY_METRICS = ("accuracy", "macro_f1")


def due_suites(settings: Evaluation, step: int, final: bool) -> list[Suite]:
    """The suites that run after optimizer step `step`: each by its own `every` or the recipe's; all at the end."""
    due = []
    for suite in settings.suites:
        every = suite.every or settings.every
        if final or (every is not None and step > 0 and step % every == 0):
            due.append(suite)
    return due


class Evaluator:
    """Runs suites on all ranks together; the main rank keeps the results in `<folder>/evaluation`."""

    def __init__(
        self, recipe: Recipe, sources: Mapping[str, TokenisedSource], tokenizer: Any, world: World, folder: Path
    ) -> None:
        self.recipe = recipe
        self.sources = sources
        self.tokenizer = tokenizer
        self.world = world
        self.folder = Path(folder)
        self._prompts: dict[str, list[Prompt]] = {}

    def check(self) -> None:
        """Find what is wrong with the prompts and references of the generation suites without a model, in seconds.

        Raises UserError for a row without an answer, no prompt at all, or a reference that a JSON metric cannot read.
        """
        for suite in self.recipe.evaluation.suites:
            for prompt in self._asked(suite) if suite.kind == "generate" else ():
                for name in JSON_METRICS.intersection(suite.metrics):
                    try:
                        score(name, [prompt.reference], [prompt.reference])
                    except UserError as error:
                        raise UserError(f"{prompt.name}: {name} of suite {suite.name!r}: {error}") from error

    @section("evaluation")
    def run(
        self, trainee: Trainee, step: int | None, model: Model, suites: Sequence[Suite] | None = None, variant: str = ""
    ) -> dict[str, Result]:
        """{suite: result} (see `results`) of the suites, default all, the same on every rank; written as they end.

        `variant` names weights that are not the run's at this step (an average) and the folder of their results.
        A run's result holds its verdicts against the base model where that was evaluated. Raises UserError for a suite
        without examples or a baseline of other examples, RunError where a result cannot be written: on every rank.
        """
        results = {}
        for suite in self.recipe.evaluation.suites if suites is None else suites:
            started = time.perf_counter()
            measured = self.measure(trainee, suite)
            head = {"suite": suite.name, "step": step, "model": model, "source": suite.source, "kind": suite.kind}
            result = head | measured | {"seconds": self.world.max(time.perf_counter() - started)}
            results[suite.name] = self._keep(result | ({"variant": variant} if variant else {}))
            log.info("evaluation %s (%s): %s", suite.name, model, _line(result))
        return results

    def measure(self, trainee: Trainee, suite: Suite) -> Result:
        """What a suite gives on a model, kept nowhere. Raises UserError for a suite without examples."""
        with evaluating(trainee):
            return self._measured(trainee, suite)

    def _measured(self, trainee: Trainee, suite: Suite) -> Result:
        if suite.kind == "generate":
            return self._generated(trainee, suite)
        source = self.sources[suite.source].first(suite.limit)
        if not len(source):
            raise UserError(f"evaluation.suites: {suite.name!r}: source {suite.source!r} has no examples; give it some")
        found = self._likelihoods(trainee, source)
        return loss_result(found) if suite.kind == "loss" else self._classified(suite, source, found)

    def _likelihoods(self, trainee: Trainee, source: TokenisedSource) -> Likelihoods:
        """Likelihoods of all examples, in the order of the source, on every rank."""
        batches = evaluation_batches(
            source,
            max(stage.batch.micro_tokens for stage in self.recipe.stages),
            rank=self.world.rank,
            size=self.world.size,
            packed=can_pack(trainee),
            pad_id=self.tokenizer.pad_token_id,
            classification=trainee.classifies,
        )
        parts = self.world.gather(asdict(likelihoods(trainee, batches, self.world.device)))
        ids = [source.example_id(index) for index in range(len(source))]
        return joined([Likelihoods(**part) for part in parts], ids)

    def _generated(self, trainee: Trainee, suite: Suite) -> Result:
        prompts = self._asked(suite)
        answers = generate_answers(trainee, prompts, self.tokenizer, suite.batch, suite.max_new_tokens, self.world)
        asked = [self._readable(prompt.ids) for prompt in prompts[:EXAMPLES_SHOWN]]
        ids, references = [prompt.name for prompt in prompts], [prompt.reference for prompt in prompts]
        return text_result(suite.metrics, ids, asked, references, answers)

    def _asked(self, suite: Suite) -> list[Prompt]:
        if suite.name not in self._prompts:  # read once: every evaluation of a run asks the same
            self._prompts[suite.name] = generation_prompts(self.recipe, suite, self.tokenizer)
        return self._prompts[suite.name]

    def _classified(self, suite: Suite, source: TokenisedSource, found: Likelihoods) -> Result:
        labels = self.recipe.model.labels or []
        asked = [self._readable(source.example(index)[0]) for index in range(min(len(source), EXAMPLES_SHOWN))]
        references, answers = ([labels[index] for index in side] for side in (found.expected, found.predicted))
        texts = text_result(suite.metrics or CLASSIFY_METRICS, found.ids, asked, references, answers)
        loss = loss_result(found)
        for part in ("metrics", "directions", "per_example"):
            texts[part] |= {name: value for name, value in loss[part].items() if name != "perplexity"}
        return texts

    def _readable(self, ids: Any) -> str:
        return self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def _keep(self, result: Result) -> Result:
        """Verdicts and the file, by the main rank; what it came to, on every rank."""
        news: dict[str, Any] = {}
        if self.world.is_main:
            try:
                news = self._verdicts(result)
                path = result_path(
                    self.folder, result["suite"], result["step"], result["model"], result.get("variant", "")
                )
                write_result(path, result | news)
            except UserError as error:
                news = {"user_error": str(error)}
            except OSError as error:
                news = {"run_error": f"evaluation {result['suite']}: its result cannot be written: {error}; make room"}
        news = self.world.gather(news)[0]  # a main rank that raised alone would leave the others waiting
        if "user_error" in news:
            raise UserError(news["user_error"])
        if "run_error" in news:
            raise RunError(news["run_error"])
        return result | news

    def _verdicts(self, result: Result) -> dict[str, Any]:
        """{"verdicts": [...]} of a run whose base was evaluated; nothing else can be compared."""
        base = base_result(self.folder, result["suite"]) if result["model"] == "run" else None
        if base is None:
            return {}
        settings = self.recipe.evaluation
        found = verdict(base, result, settings.confidence, settings.resamples, self.recipe.seed)
        return {"verdicts": [asdict(entry) for entry in found]}


def loss_result(found: Likelihoods) -> Result:
    """Loss and perplexity of the corpus, and each example's mean loss with the weight of its targets.

    Examples whose targets all weigh nothing have no loss and are left out. Raises UserError where none is left.
    """
    kept = [index for index, weight in enumerate(found.weight) if weight > 0]
    if not kept:
        raise UserError(
            f"evaluation: none of {len(found.ids)} examples has a target that weighs anything; check `weight`"
        )
    ids = [found.ids[index] for index in kept]
    nll, weight = [found.nll[index] for index in kept], [found.weight[index] for index in kept]
    loss = corpus_loss(nll, weight)
    metrics = {"loss": loss, "perplexity": perplexity(loss)}
    means = [total / share for total, share in zip(nll, weight, strict=True)]
    return {
        "metrics": metrics,
        "directions": {name: metric_named(name).direction for name in metrics},
        "n": len(ids),
        "ids": ids,
        "per_example": {"loss": means, "weight": weight},
        "examples": [],
    }


def text_result(
    metrics: Sequence[str], ids: Sequence[str], asked: Sequence[str], references: Sequence[str], answers: Sequence[str]
) -> Result:
    """What answers are worth by each metric; as many examples in full as there are readable prompts (`asked`)."""
    scores = {name: score(name, answers, references) for name in metrics}
    per_example = {name: found.per_example for name, found in scores.items() if found.per_example is not None}
    shown = [
        {
            "id": ids[index],
            "prompt": prompt,
            "reference": references[index],
            "prediction": answers[index],
            "scores": {name: values[index] for name, values in per_example.items()},
        }
        for index, prompt in enumerate(asked)
    ]
    return {
        "metrics": {name: found.value for name, found in scores.items()},
        "directions": {name: found.direction for name, found in scores.items()},
        "n": len(ids),
        "ids": list(ids),
        "per_example": per_example,
        "examples": shown,
        "predictions": list(answers),
        "references": list(references),
    }


def _line(result: Result) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
