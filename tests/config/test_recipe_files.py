"""YAML as read, overrides as applied, inheritance as resolved, and the dump that loads back."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.config import UserError, build_recipe, dump_recipe, load_recipe
from trainer.config.overrides import apply_overrides
from trainer.config.yaml_file import MAX_RECIPE_BYTES, parse_yaml, read_yaml

BASE = """\
name: base
model: {path: owner/model, max_length: 256}
sources:
  corpus: {path: corpus.jsonl, format: messages}
  tickets: {path: tickets.jsonl, format: messages}
"""
STAGES = """\
optimizer: {name: lion, lr: 1e-3, betas: [0.9, 0.99]}
mixture: {corpus: 1.0, tickets: 3.0}
batch: {examples: 8}
stages:
  - {name: first}
  - {name: second, optimizer: {name: sgd, momentum: 0.5}, mixture: {tickets: 1.0}, batch: {tokens: 9000}}
"""


def load(tmp_path: Path, text: str | bytes, overrides: list[str] | None = None) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, overrides)


def fails(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, list(overrides))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("3E4", 3e4), ("-.5", -0.5), ("017", 17), ("0o17", 15), ("no", "no"), ("on", "on"),
        ("off", "off"), ("yes", "yes"), ("true", True), ("~", None), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"),
        ("=", "="), ("'3e-4'", "3e-4"), ("[no, yes]", ["no", "yes"]), ("${HOME}", "${HOME}"), ("{a: }", {"a": None}),
    ],
)  # fmt: skip
def test_values_are_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, "x")
    assert found == value and type(found) is type(value)


def bomb() -> str:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(levels)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BASE + "seed: 1\nseed: 2\n", ":7: found duplicate key"),
        (BASE + "tuning: &t {rank: 4}\n", ":6: YAML anchors"),
        (BASE + "tuning: *t\n", ":6: YAML anchors"),
        (bomb(), ":1: YAML anchors"),
        (BASE + "seed: !!int '3'\n", ":6: YAML tags"),
        (BASE + "seed: !!python/object/apply:os.system [ls]\n", ":6: YAML tags"),
        ("%YAML 1.1\n---\n" + BASE, ":1: YAML directives"),
        (BASE + "seed: " + "[" * 5000, ":6: nested more than 20 deep"),
        (BASE + "seed: {a: b\n", "mend the YAML"),
        (BASE + "seed: [1\n---\n", "mend the YAML"),
        (BASE + "---\nname: other\n", "mend the YAML"),
        (BASE + "seed: \x01\n", "mend the YAML"),
        (BASE + "\tseed: 1\n", "mend the YAML"),
        (BASE + "seed: " + "9" * 5000 + "\n", "mend the YAML"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- name: base\n", "holds a list"),
        ("base\n", "holds one str"),
        (BASE + "1: 2\n", "1: a key must be text"),
        (BASE + "no: 2\n", "no: 2: unknown key"),
        (BASE.encode() + b"seed: \xff\n", "not UTF-8"),
        (BASE.encode("utf-16"), "not UTF-8 (byte 0)"),
        (b"# " + b"x" * MAX_RECIPE_BYTES, "a recipe points to data"),
    ],
)
def test_refused_files(tmp_path: Path, text: str | bytes, part: str) -> None:
    started = time.perf_counter()
    assert part in fails(tmp_path, text)
    assert time.perf_counter() - started < 5


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    text = "mixture: {tickets: 1}\n"
    assert load(tmp_path, b"\xef\xbb\xbf" + (BASE + text).replace("\n", "\r\n").encode()).name == "base"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, part in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=part):
            read_yaml(path)


# ---------------------------------------------------------------- overrides

DATA = {
    "name": "x",
    "sources": {"a.b": {"path": "p"}},
    "optimizer": {"lr": 1.0, "scale_lr": {"rule": "sqrt"}},
    "mixture": {"a": 1, "b": 2},
    "stages": [{"name": "one"}, {"name": "two", "until": {"steps": 1}}],
    "until": None,
}


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("optimizer.lr=1e-4", ("optimizer", "lr"), 1e-4),
        ("optimizer.clip=null", ("optimizer", "clip"), None),
        ("engine.cpu_offload=true", ("engine", "cpu_offload"), True),
        ("stages.0.until.steps=20", ("stages", 0, "until", "steps"), 20),
        ("stages.two.until.steps=20", ("stages", 1, "until", "steps"), 20),
        ("sources.a.b.path=q=r", ("sources", "a.b", "path"), "q=r"),
        ("sources.c.path=q", ("sources", "c", "path"), "q"),
        ("until.epochs=2", ("until", "epochs"), 2),
        ("optimizer={lr: 2.0}", ("optimizer",), {"lr": 2.0, "scale_lr": {"rule": "sqrt"}}),
        ("mixture={a: 3}", ("mixture",), {"a": 3}),
        ("mixture.a=3", ("mixture",), {"a": 3, "b": 2}),
        ("name=${oc.env:HOME}", ("name",), "${oc.env:HOME}"),
        ("name=${HOME} ${", ("name",), "${HOME} ${"),
        ("name='17'", ("name",), "17"),
        ("name=", ("name",), ""),
        ("stages.0={name: three}", ("stages", 0), {"name": "three"}),
    ],
)
def test_override(item: str, path: tuple[Any, ...], value: Any) -> None:
    before = copy.deepcopy(DATA)
    node: Any = apply_overrides(DATA, [item])
    for part in path:
        node = node[part]
    assert node == value
    assert before == DATA


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("optimizer.lr", "write e.g. optimizer.lr=1e-4"),
        ("=3", "write e.g."),
        ("optimizer..lr=3", "write e.g."),
        ("optimizer. lr=3", "write e.g."),
        ("name.first=3", "`first` lies below a single value"),
        ("stages.2.until.steps=20", "use an index (0 to 1)"),
        ("stages.-1.until.steps=20", "use an index (0 to 1)"),
        ("stages.tow.until.steps=20", "did you mean `two`"),
        ("name=[1", "mend the YAML"),
        ("name=&a b", "anchors"),
        ("name=!!str 3", "tags"),
        ("name=" + "[" * 100, "nested more than 20"),
    ],
)
def test_bad_override(item: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(DATA, [item])
    assert part in str(caught.value) and str(caught.value).startswith("override: ")
    assert len(str(caught.value).splitlines()) == 1


def test_override_reaches_the_one_stage_of_a_recipe_without_stages(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE, ["stages.0.until.steps=20", "mixture={tickets: 1}"])
    assert recipe.stages[0].until.steps == 20 and recipe.stages[0].name == "main"


def test_nothing_is_interpolated(tmp_path: Path) -> None:
    text = BASE + "mixture: {tickets: 1}\noutput: 'runs/${HOME}'\n"
    assert load(tmp_path, text, ["seed=3"]).output == "runs/${HOME}"


def test_unknown_key_by_override(tmp_path: Path) -> None:
    assert "optimizer.lrr: 1: unknown key; did you mean `lr`?" in fails(tmp_path, BASE + STAGES, "optimizer.lrr=1")


# ---------------------------------------------------------------- inheritance


def test_stages_inherit_key_by_key(tmp_path: Path) -> None:
    first, second = load(tmp_path, BASE + STAGES).stages
    assert (first.optimizer.name, first.optimizer.lr, first.optimizer.betas) == ("lion", 1e-3, (0.9, 0.99))
    assert (second.optimizer.name, second.optimizer.lr, second.optimizer.momentum) == ("sgd", 1e-3, 0.5)
    assert second.optimizer.betas == (0.9, 0.999)  # sgd reads none: the shared ones are not in force
    assert first.mixture == {"corpus": 1.0, "tickets": 3.0} and second.mixture == {"tickets": 1.0}
    assert (first.batch.examples, first.batch.tokens) == (8, None)
    assert (second.batch.examples, second.batch.tokens) == (None, 9000)
    assert (first.until.epochs, first.until.steps) == (1.0, None)


def test_a_shared_key_that_reaches_no_stage_is_refused(tmp_path: Path) -> None:
    text = BASE + STAGES.replace("{name: first}", "{name: first, optimizer: {name: adamw}}").replace(
        "betas", "momentum"
    )
    assert "momentum" in fails(tmp_path, text.replace("[0.9, 0.99]", "[1]"))
    text = BASE + "schedule: {name: wsd, decay: 0.5}\nmixture: {corpus: 1}\nstages: [{schedule: {name: linear}}]\n"
    assert "schedule.decay: 0.5: every stage puts it out of force" in fails(tmp_path, text)


def test_names_and_output_have_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE + "mixture: {corpus: 1}\nstages: [{}, {}]\n")
    assert [stage.name for stage in recipe.stages] == ["stage-0", "stage-1"]
    assert recipe.output == "runs/base"


def test_building_leaves_the_data_alone() -> None:
    data = parse_yaml(BASE + STAGES, "x")
    before = copy.deepcopy(data)
    recipe = build_recipe(data)
    assert data == before
    with pytest.raises(ValidationError, match="frozen"):
        recipe.stages[0].optimizer.lr = 1.0


# ---------------------------------------------------------------- round trip

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
NUMBER = st.floats(1e-12, 1e3)


@given(
    system=TEXT
    | st.sampled_from(["no", "3e-4", "017", "2024-01-01", "~", "null", "- a", "a: b", " x ", "a\n\n b\n", "%"]),
    lr=NUMBER,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    clip=st.none() | NUMBER,
    epochs=st.none() | NUMBER,
    steps=st.none() | st.integers(1, 10**9),
    names=st.lists(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"), min_size=1, max_size=4, unique=True),
)
@settings(max_examples=25, deadline=None)
def test_dump_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    system: str,
    lr: float,
    betas: Any,
    clip: Any,
    epochs: Any,
    steps: Any,
    names: Any,
) -> None:
    data = {
        "name": names[0],
        "model": {"path": "owner/model"},
        "sources": {names[-1]: {"path": "x.jsonl", "format": "messages", "system": system}},
        "optimizer": {"lr": lr, "betas": list(betas), "clip": clip},
        "until": {"epochs": epochs, "steps": steps},
        "stages": [{"name": name} for name in names],
    }
    recipe = build_recipe(data)
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_dump_is_in_the_order_of_the_schema(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE + STAGES)
    keys = [line.partition(":")[0] for line in dump_recipe(recipe).splitlines() if line[0].isalpha()]
    assert keys == list(type(recipe).model_fields)
