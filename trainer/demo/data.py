"""Write the demo's data: support tickets with known faults, several annotators' labels, and help-desk prose.

``python -m trainer.demo.data OUT --seed 7`` writes the same bytes for the same seed everywhere.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.demo import phrases
from trainer.demo.faults import Entry, injected
from trainer.demo.tickets import SYSTEM_PROMPT, Ticket, compose

SEED = 7
SIZES = {"train": 1395, "validation": 150, "test": 200}  # train before duplicates: 1395 + 30 exact + 75 near = 1500
DOMAIN_PASSAGES = 240
ANNOTATED = 300
LABEL_MISSING = 0.2
# The probability that the annotator gives the true label, otherwise one of the others at random.
ANNOTATORS = {"ann-1": 0.97, "ann-2": 0.93, "ann-3": 0.88, "ann-4": 0.8, "ann-5": 0.68, "ann-6": 0.35}


@dataclass(frozen=True)
class Row:
    """One line of a tickets file: its id, and the entry it holds."""

    id: str
    entry: Entry

    def record(self) -> dict[str, Any]:
        """Give the line in the ``messages`` format."""
        ticket = self.entry.ticket
        turns = (("system", SYSTEM_PROMPT), ("user", ticket.text), ("assistant", ticket.labels.answer()))
        return {"id": self.id, "messages": [{"role": role, "content": content} for role, content in turns]}


def write_demo_data(folder: Path, seed: int = SEED) -> dict[str, Any]:
    """Write the demo's files into ``folder`` and give the manifest that is also written as ``manifest.json``.

    The files: ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (``{"id", "messages"}``),
    ``annotations.jsonl``, ``domain.jsonl`` (``{"id", "text"}``), ``manifest.json``, ``README.md``.

    Raises ``UserError`` where ``folder`` cannot be written.
    """
    tickets = distinct_tickets(random.Random(f"tickets {seed}"), SIZES)
    entries = {
        split: [Entry(ticket, place) for place, ticket in enumerate(tickets[split])] for split in ("validation", "test")
    }
    entries["train"] = injected(tickets["train"], random.Random(f"faults {seed}"))
    rows = {
        split: [Row(f"{split}-{number:04d}", entry) for number, entry in enumerate(entries[split])] for split in SIZES
    }
    annotations, gold = annotated(rows["train"], random.Random(f"annotators {seed}"))
    domain = domain_passages(random.Random(f"domain {seed}"))
    manifest = _manifest(seed, rows, annotations, gold, domain)
    files = {f"{split}.jsonl": _lines(row.record() for row in split_rows) for split, split_rows in rows.items()}
    files["annotations.jsonl"] = _lines(annotations)
    files["domain.jsonl"] = _lines(domain)
    files["manifest.json"] = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    files["README.md"] = _readme(manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_bytes(text.encode("utf-8"))
    except OSError as error:
        raise UserError(f"demo data: {folder}: {error.strerror}: give a folder that can be written") from error
    return manifest


def distinct_tickets(source: random.Random, sizes: dict[str, int]) -> dict[str, list[Ticket]]:
    """Draw the splits so that no two tickets, of any split, share a text; the order number does not tell them apart."""
    seen: set[str] = set()
    splits: dict[str, list[Ticket]] = {}
    for split, size in sizes.items():
        splits[split] = []
        while len(splits[split]) < size:
            ticket = compose(source)
            if ticket.skeleton not in seen:
                seen.add(ticket.skeleton)
                splits[split].append(ticket)
    return splits


def annotated(rows: list[Row], source: random.Random) -> tuple[list[dict[str, str]], dict[str, dict[str, str]]]:
    """Let the annotators label team and priority of some clean tickets.

    Returns the annotations, one ``{"item", "annotator", "field", "label"}`` a label, about a fifth of them missing
    (every item keeps two labels or more in each field), and the true labels ``{item: {field: label}}``.
    """
    items = source.sample([row for row in rows if row.entry.fault is None], ANNOTATED)
    gold = {
        row.id: {"team": row.entry.ticket.labels.team, "priority": row.entry.ticket.labels.priority} for row in items
    }
    annotations = []
    for item, labels in gold.items():
        for field, options in (("team", phrases.TEAMS), ("priority", phrases.PRIORITIES)):
            present = [name for name in ANNOTATORS if source.random() >= LABEL_MISSING]
            while len(present) < 2:
                present = sorted({*present, source.choice(list(ANNOTATORS))})
            for annotator in present:
                true = source.random() < ANNOTATORS[annotator]
                wrong = [option for option in options if option != labels[field]]
                label = labels[field] if true else source.choice(wrong)
                annotations.append({"item": item, "annotator": annotator, "field": field, "label": label})
    return annotations, gold


def domain_passages(source: random.Random) -> list[dict[str, str]]:
    """Give short passages of a help desk's handbook, no two alike, for a domain-pretraining stage."""
    passages: list[str] = []
    while len(passages) < DOMAIN_PASSAGES:
        team = source.choice(phrases.TEAMS)
        product = source.choice(source.choice(list(phrases.PRODUCTS.values())))
        advice = source.sample(phrases.ADVICE[team], source.choice((1, 2)))
        parts = [f"{phrases.HANDBOOK[team]}.", *(line.replace("{product}", product) for line in advice)]
        if source.random() < 0.6:
            parts.append(source.choice(phrases.PRIORITY_RULES))
        passage = " ".join(parts)
        if passage not in passages:
            passages.append(passage)
    return [{"id": f"domain-{number:04d}", "text": text} for number, text in enumerate(passages)]


def _manifest(
    seed: int,
    rows: dict[str, list[Row]],
    annotations: list[dict[str, str]],
    gold: dict[str, dict[str, str]],
    domain: list[dict[str, str]],
) -> dict[str, Any]:
    """Give the ground truth: every injected fault by id, and the annotators with their true labels."""
    train = rows["train"]
    original = {row.entry.origin: row.id for row in train if row.entry.fault not in ("exact", "near")}
    of_kind = {
        kind: [row for row in train if row.entry.fault == kind] for kind in ("exact", "near", "label", "mojibake")
    }
    faults: dict[str, list[dict[str, str | None]]] = {
        "exact_duplicates": [{"id": row.id, "of": original[row.entry.origin]} for row in of_kind["exact"]],
        "near_duplicates": [{"id": row.id, "of": original[row.entry.origin]} for row in of_kind["near"]],
        "wrong_labels": [
            {"id": row.id, "field": row.entry.field, "true": row.entry.true_label} for row in of_kind["label"]
        ],
        "mojibake": [{"id": row.id} for row in of_kind["mojibake"]],
        "empty_rows": [],
    }
    languages = {row.id: row.entry.ticket.language for split in rows.values() for row in split}
    return {
        "seed": seed,
        "rows": {split: len(split_rows) for split, split_rows in rows.items()}
        | {"annotations": len(annotations), "domain": len(domain)},
        "shares": {name: round(len(found) / len(train), 4) for name, found in faults.items()},
        "faults": faults,
        "other_languages": {row: language for row, language in languages.items() if language != "en"},
        "annotators": ANNOTATORS,
        "annotation_gold": gold,
    }


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


README = """# Support tickets, made by a seeded generator

Written by `python -m trainer.demo.data OUT --seed {seed}`; the same seed gives the same bytes.
Apache-2.0; no real person or shop.

The task: read a customer's message, answer with compact JSON of four fields in this order:

* `team`: {teams}
* `priority`: {priorities}; normal where nothing is said about time
* `product`: {products}; null where none is named
* `order`: `A-` and five digits; null where none is given

| file | rows | fields |
|---|---|---|
| train.jsonl | {rows[train]} | `id`, `messages` (system, user, assistant); has the faults below |
| validation.jsonl | {rows[validation]} | the same; no faults |
| test.jsonl | {rows[test]} | the same; no faults |
| annotations.jsonl | {rows[annotations]} | `item` (a train id), `annotator`, `field`, `label`; a fifth is missing |
| domain.jsonl | {rows[domain]} | `id`, `text`: pages of a help desk's handbook |

No message of one split is in another, whatever the order number. `manifest.json` is the truth: seed, rows, every
fault by row id, the true labels of the annotated items, the reliability of each annotator.

Faults in train.jsonl, as shares of its rows: exact duplicates {shares[exact_duplicates]:.1%}, near duplicates
{shares[near_duplicates]:.1%}, wrong labels {shares[wrong_labels]:.1%}, mojibake {shares[mojibake]:.1%};
no empty rows. Messages in all splits carry typing slips, quoted threads, signatures, chatter, and in a few rows
another language (es, de, fr, zh).
"""


def _readme(manifest: dict[str, Any]) -> str:
    names = {"teams": phrases.TEAMS, "priorities": phrases.PRIORITIES, "products": phrases.PRODUCTS}
    return README.format(**{name: ", ".join(words) for name, words in names.items()}, **manifest)


def main(arguments: list[str] | None = None) -> int:
    """Write the demo data from the command line; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.demo.data", description="Write the demo data.")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    try:
        manifest = write_demo_data(options.folder, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.folder}: " + ", ".join(f"{name} {count}" for name, count in manifest["rows"].items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
