"""Every source that a recipe uses, tokenised once and cached, before any process group exists."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.schema import Recipe, Source, Stage, Suite
from trainer.data.encode import Encoded, TooLong
from trainer.data.files import content_digest, is_local, source_files
from trainer.data.formats import check_source
from trainer.data.hub import offline_if_unreachable
from trainer.data.parallel import Job, process, refuse_import_time
from trainer.data.readers import BadRow, Row, is_dataset_folder, load_hub, read_rows
from trainer.data.store import TokenisedSource, Writer, cache_folder, open_or_build
from trainer.data.tokenizer import load_tokenizer, tokenizer_digest

CODE_VERSION = 1  # raise it whenever the ids or weights of an example could change
SCAN_SECONDS = 4.0  # after the first fault, how long the rest is read to count the others
SCAN_FAULTS = 1000
HASHED = (
    "format", "fields", "system", "limit", "train_on", "on_bad_row", "max_bad_rows", "truncation", "encoding",
    "subset", "split",
)  # fmt: skip  # the settings of a source that decide its examples


class Prepared(Mapping[str, TokenisedSource]):
    """The tokenised sources by name; a source used under two objectives has one form for each."""

    def __init__(self, forms: dict[tuple[str, str], TokenisedSource]) -> None:
        self.forms = forms

    def __getitem__(self, name: str) -> TokenisedSource:
        for (source, _), form in self.forms.items():
            if source == name:
                return form
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for name, _ in self.forms))

    def __len__(self) -> int:
        return len(set(self))

    def stage(self, stage: Stage) -> dict[str, TokenisedSource]:
        """The sources of a stage's mixture, under its objective."""
        return {name: self.forms[name, stage.objective.name] for name in stage.mixture}

    def suite(self, recipe: Recipe, suite: Suite) -> TokenisedSource:
        """The source of a suite, under the objective that it measures, cut to its limit."""
        return self.forms[suite.source, suite_objective(recipe, suite)].first(suite.limit)


def suite_objective(recipe: Recipe, suite: Suite) -> str:
    """What a suite's loss is of: every token for text or where all stages train so, else the answers or classes."""
    if recipe.model.kind == "classification":
        return "classification"
    kinds = {stage.objective.name for stage in recipe.stages}
    if recipe.sources[suite.source].format == "text" or kinds == {"language-modeling"}:
        return "language-modeling"
    return "supervised"


def uses(recipe: Recipe) -> list[tuple[str, str]]:
    """(source, objective) pairs that stages and suites need, each once, in order of use."""
    trained = [(name, stage.objective.name) for stage in recipe.stages for name in stage.mixture]
    held_out = [(suite.source, suite_objective(recipe, suite)) for suite in recipe.evaluation.suites]
    return list(dict.fromkeys(trained + held_out))


def prepare(recipe: Recipe, cache: Path | None = None, tokenizer: Any = None) -> Prepared:
    """Tokenise every used source, or find it in the cache (``cache`` folder; default: ``cache_folder()``).

    Call it before the process group is made: ranks that ask at the same time wait for the one that works, with no
    collective to time out. Raises UserError for the first fault in the data, the tokenizer or the cache.
    """
    refuse_import_time()
    cache = cache or cache_folder()
    for name, objective in uses(recipe):
        check_source(name, recipe.sources[name], objective, recipe.model.labels)
    prints = {name: _fingerprint(name, recipe.sources[name]) for name, _ in uses(recipe)}
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe.model)
    digest = tokenizer_digest(tokenizer)
    forms = {}
    for name, objective in uses(recipe):
        source = recipe.sources[name]
        job = Job(f"sources.{name}", source, objective, recipe.model.max_length, recipe.model.labels)
        key = _key(job, prints[name], digest)

        def build(writer: Writer, job: Job = job, fingerprint: str = prints[name]) -> dict[str, Any]:
            _fill(writer, job, tokenizer)
            return {"objective": job.objective, "fingerprint": fingerprint, "code_version": CODE_VERSION}

        forms[name, objective] = open_or_build(cache, key, name, source.task or name, build)
    return Prepared(forms)


def _fingerprint(name: str, source: Source) -> str:
    """SHA-256 of a local source's bytes; of a hub dataset, its commit, or its own fingerprint once downloaded."""
    key = f"sources.{name}.path"
    if is_local(source.path, key):
        root = Path(source.path).expanduser()
        if not is_dataset_folder(root):
            _refuse_hub_keys(name, source)
            return content_digest(source_files(source.path, key))
    if source.revision is not None and len(source.revision) == 40:
        identity = f"{source.path}@{source.revision}"
    elif source.streaming:
        identity = f"{source.path}@{_commit(source, key)}"
    else:
        identity = f"{source.path}#{load_hub(source, key)._fingerprint}"
    return hashlib.sha256(identity.encode()).hexdigest()


def _refuse_hub_keys(name: str, source: Source) -> None:
    for key, default in (("split", "train"), ("subset", None), ("revision", None), ("streaming", False)):
        value = getattr(source, key)
        if value != default:
            raise UserError(
                f"sources.{name}.{key}: {value}: only read for hub datasets, {source.path} is local; remove it"
            )


def _commit(source: Source, key: str) -> str:
    offline_if_unreachable()
    from huggingface_hub import HfApi  # only streamed hub data needs the hub itself

    try:
        return str(HfApi().dataset_info(source.path, revision=source.revision, timeout=8.0).sha)
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}: {source.path}: not found on the hub ({reason[:160]}); check the id or network"
        ) from error


def _key(job: Job, fingerprint: str, tokenizer: str) -> str:
    settings = {name: getattr(job.source, name) for name in HASHED}
    parts = [CODE_VERSION, fingerprint, tokenizer, job.objective, job.max_length, job.labels, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class _Faults:
    """Bad rows of one source: the first is told, the others counted."""

    first: str = ""
    count: int = 0
    since: float = 0.0

    def add(self, message: str) -> None:
        self.first = self.first or message
        self.since = self.since or time.monotonic()
        self.count += 1

    @property
    def enough(self) -> bool:
        return self.count >= SCAN_FAULTS or (self.count > 0 and time.monotonic() - self.since > SCAN_SECONDS)


def _fill(writer: Writer, job: Job, tokenizer: Any) -> None:
    """Read, check, tokenise and write one source. Raises UserError by the source's policies."""
    source, counts, faults, long = job.source, writer.counts, _Faults(), _Faults()
    rows = read_rows(source, f"{job.key}.path")
    started = False
    for row, result in process(rows, job, tokenizer):
        started = True
        counts["rows"] += 1
        if isinstance(result, str):
            faults.add(result)
        elif isinstance(result, TooLong) and source.truncation == "error":
            long.add(_long(row, result, job))
        else:
            _keep(writer, job, row, result)
        counts["skipped_bad"] = faults.count
        failed = faults.count > (0 if source.on_bad_row == "error" else source.max_bad_rows)
        if (failed and faults.enough) or long.enough:
            break
    if not started:
        raise UserError(f"{job.key}.path: {source.path}: no rows; give a source that has some")
    _judge(writer, job, faults, long)


def _keep(writer: Writer, job: Job, row: Row | BadRow, result: Encoded | TooLong) -> None:
    counts = writer.counts
    if isinstance(result, TooLong):
        counts["dropped_long"] += 1
        return
    counts["truncated"] += result.length > len(result.ids)
    if job.objective != "classification" and not result.weights.any():
        counts["no_target"] += 1
        return
    writer.add(result, row.file, row.line)


def _long(row: Row | BadRow, result: TooLong, job: Job) -> str:
    size = f"{result.length}" if result.sure else f"over {result.length}"
    return (
        f"{row.file}:{row.line}: {size} tokens, model.max_length is {job.max_length}; raise it, or set "
        f"`{job.key}.truncation` to drop, left or right"
    )


def _judge(writer: Writer, job: Job, faults: _Faults, long: _Faults) -> None:
    """Raise what the policies call an error, once the whole (or enough) has been read."""
    counts, source = writer.counts, job.source
    more = f" ({{}} in {counts['rows']} rows read)"
    if faults.count and source.on_bad_row == "error":
        raise UserError(faults.first + f", or set `{job.key}.on_bad_row: skip`" + more.format(f"{faults.count} bad"))
    if faults.count > source.max_bad_rows:
        raise UserError(
            f"{job.key}.max_bad_rows: {source.max_bad_rows}: more rows than that are bad{more.format(faults.count)}; "
            f"the first: {faults.first}"
        )
    if long.count:
        raise UserError(long.first + more.format(f"{long.count} too long"))
    if counts["kept"]:
        return
    if counts["no_target"]:
        raise UserError(
            f"{job.key}.path: {source.path}: no example has a target left ({counts['no_target']} fully masked, "
            f"{counts['truncated']} truncated); check `weight`, `train_on`, `truncation` and model.max_length"
        )
    raise UserError(
        f"{job.key}.path: {source.path}: empty after filtering ({counts['rows']} rows, {faults.count} bad, "
        f"{counts['dropped_long']} over model.max_length); check `truncation` and the rows"
    )
