"""The demo's data: the same bytes for a seed, no leak, valid rows, and a manifest that tells the truth."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from trainer.config.errors import UserError
from trainer.demo import data, faults, phrases, tickets

FILES = (
    "train.jsonl",
    "validation.jsonl",
    "test.jsonl",
    "annotations.jsonl",
    "domain.jsonl",
    "manifest.json",
    "README.md",
)
ORDER = re.compile(r"A-?\d{5}")


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def message(row: dict) -> str:
    return row["messages"][1]["content"]


def answer(row: dict) -> dict:
    return json.loads(row["messages"][2]["content"])


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    data.write_demo_data(folder, seed=7)
    return folder


@pytest.fixture(scope="module")
def manifest(demo) -> dict:
    return json.loads((demo / "manifest.json").read_text(encoding="utf-8"))


def test_same_seed_same_bytes(demo, tmp_path):
    assert data.main([str(tmp_path / "again"), "--seed", "7"]) == 0
    assert data.main([str(tmp_path / "other"), "--seed", "8"]) == 0
    assert digests(tmp_path / "again") == digests(demo)
    other = digests(tmp_path / "other")
    assert all(other[name] != digest for name, digest in digests(demo).items())


def test_rows_are_valid_messages_with_a_fixed_answer(demo):
    for name, count in (("train.jsonl", 1500), ("validation.jsonl", 150), ("test.jsonl", 200)):
        found = rows(demo, name)
        assert len(found) == count == len({row["id"] for row in found})
        for row in found:
            assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
            assert message(row).strip()
            labels = answer(row)
            assert list(labels) == ["team", "priority", "product", "order"]
            assert row["messages"][2]["content"] == json.dumps(labels, separators=(",", ":"))
            assert labels["team"] in phrases.TEAMS and labels["priority"] in phrases.PRIORITIES
            assert labels["product"] is None or labels["product"] in phrases.PRODUCTS


def test_no_message_of_one_split_is_in_another(demo):
    masked = {
        name: {ORDER.sub("#", message(row)).replace("##", "#") for row in rows(demo, name)}
        for name in ("train.jsonl", "validation.jsonl", "test.jsonl")
    }
    assert not masked["test.jsonl"] & (masked["train.jsonl"] | masked["validation.jsonl"])
    assert not masked["validation.jsonl"] & masked["train.jsonl"]


def test_held_out_labels_follow_from_the_message(demo):
    """The order is the one number of its form; the cue phrase, if any survives its typing slip, is of the priority."""
    for row in rows(demo, "test.jsonl") + rows(demo, "validation.jsonl"):
        labels, text = answer(row), message(row)
        numbers = ORDER.findall(text)
        assert len(numbers) == (labels["order"] is not None)
        if numbers:
            assert numbers[0].replace("-", "") == labels["order"].replace("-", "")
        cues = {priority for priority in ("high", "low") for cue in phrases.CUES[priority] if cue in text}
        assert cues <= {labels["priority"]}


def test_manifest_tells_every_injected_fault(demo, manifest):
    train = {row["id"]: row for row in rows(demo, "train.jsonl")}
    found = manifest["faults"]
    assert {name: len(entries) for name, entries in found.items()} == {
        "exact_duplicates": 30, "near_duplicates": 75, "wrong_labels": 60, "mojibake": 15, "empty_rows": 0,
    }  # fmt: skip
    ids = [entry["id"] for entries in found.values() for entry in entries]
    assert len(ids) == len(set(ids))
    for entry in found["exact_duplicates"]:
        assert train[entry["id"]]["messages"] == train[entry["of"]]["messages"]
    for entry in found["near_duplicates"]:
        copy, original = train[entry["id"]], train[entry["of"]]
        assert message(copy) != message(original) and answer(copy) == answer(original)
    for entry in found["wrong_labels"]:
        assert answer(train[entry["id"]])[entry["field"]] != entry["true"]
    for entry in found["mojibake"]:
        assert re.search("[ÃâÂäåæèéçï¿¡]", message(train[entry["id"]]))
    copies = Counter(message(row) for row in train.values())
    assert sum(count - 1 for count in copies.values()) == 30  # no exact duplicate beyond the injected ones


def test_annotators_differ_as_the_manifest_says(demo, manifest):
    gold, right, given = manifest["annotation_gold"], Counter(), Counter()
    labels_of = defaultdict(set)
    for row in rows(demo, "annotations.jsonl"):
        given[row["annotator"]] += 1
        right[row["annotator"]] += row["label"] == gold[row["item"]][row["field"]]
        key = (row["item"], row["field"], row["annotator"])
        assert row["annotator"] not in labels_of[key[:2]]
        labels_of[key[:2]].add(row["annotator"])
    assert len(gold) == 300 and set(given) == set(manifest["annotators"])
    assert min(len(names) for names in labels_of.values()) >= 2 and len(labels_of) == 600
    assert 0.75 < sum(given.values()) / (600 * len(given)) < 0.85
    for annotator, reliability in manifest["annotators"].items():
        assert right[annotator] / given[annotator] == pytest.approx(reliability, abs=0.07)  # 3.2 s.e. of 480 labels


def test_annotated_items_are_clean_rows_of_train(demo, manifest):
    train = {row["id"]: answer(row) for row in rows(demo, "train.jsonl")}
    for item, labels in manifest["annotation_gold"].items():
        assert {field: train[item][field] for field in ("team", "priority")} == labels


def test_domain_passages_are_distinct_prose(demo):
    texts = [row["text"] for row in rows(demo, "domain.jsonl")]
    assert len(texts) == len(set(texts)) == 240
    assert all(20 < len(text) < 600 and text.endswith(".") and "{" not in text for text in texts)


def test_messages_stay_short_and_varied():
    source = random.Random(1)
    drawn = [tickets.compose(source) for _ in range(2000)]
    assert len({ticket.skeleton for ticket in drawn}) > 1900
    assert sum(len(ticket.text) for ticket in drawn) / 2000 < 160  # characters: about 33 tokens
    assert 0.02 < sum(ticket.language != "en" for ticket in drawn) / 2000 < 0.06
    assert not any("{" in ticket.text for ticket in drawn)


def test_misspelling_changes_one_word_and_no_order():
    source = random.Random(3)
    for _ in range(200):
        given = "Order A-48213 should arrive before tomorrow morning."
        slipped = tickets.misspelled(source, given)
        changed = [pair for pair in zip(given.split(), slipped.split(), strict=True) if pair[0] != pair[1]]
        assert len(changed) <= 1 and "A-48213" in slipped


def test_garbled_text_reads_back_from_windows_1252():
    ticket = tickets.compose(random.Random(5)).reworded("I’m waiting, A-48213")
    garbled = faults.garbled(ticket, random.Random(0)).text
    assert garbled == "Iâ€™m waiting, A-48213"
    assert garbled.encode("cp1252").decode("utf-8") == "I’m waiting, A-48213"


def test_unwritable_folder_is_the_users_to_mend(tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match="demo data"):
        data.write_demo_data(blocker / "inside")
    assert data.main([str(blocker / "inside")]) == 2
    assert "error: demo data" in capsys.readouterr().err
