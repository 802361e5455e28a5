"""`tunesmith check`: quick and without torch where no data are read; counts, memory and warnings where they are."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.check import check_recipe, peak_lr, render, stage_row
from trainer.check import warnings as warnings_of
from trainer.config import Recipe, UserError, build_recipe

ROOT = Path(__file__).parents[1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32, "tie_word_embeddings": True,
}  # fmt: skip


def recipe_in(folder: Path, **more: Any) -> Recipe:
    """A recipe whose model is all zeros and whose data are one row."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    header = {
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [32, 8], "data_offsets": [0, 1024]},
        "model.layers.0.mlp.gate_proj.weight": {"dtype": "F32", "shape": [16, 8], "data_offsets": [1024, 1536]},
    }
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(1536))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    data = {
        "name": "x",
        "model": {"path": str(model), "max_length": 64},
        "sources": {"a": {"path": str(folder / "data.jsonl"), "format": "messages"}},
    }
    return build_recipe(
        {key: {**data.get(key, {}), **more.pop(key, {})} if isinstance(data[key], dict) else data[key] for key in data}
        | more
    )


def test_without_data(tmp_path: Path) -> None:
    result = check_recipe(recipe_in(tmp_path, until={"steps": 10}, schedule={"warmup": 0.2}), data=False)
    assert result["stages"][0]["steps"] == 10 and result["stages"][0]["warmup_steps"] == 2
    assert result["stages"][0]["tokens"] is None and result["sources"] == {}
    single = result["memory"]["ranks"][0]
    assert single["parameters"] == 32 * 8 + 16 * 8 + 16 * (16 + 8) and single["trainable"] == 16 * (16 + 8)
    json.dumps(result)
    text = render(result)
    for part in ("name: x", "stages:", "peak of a step", "optimizer state"):
        assert part in text


def test_a_model_that_is_not_here_is_said_to_be_unknown(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model={"path": "no-such-owner/no-such-model"})
    result = check_recipe(recipe, data=False)
    assert "unknown" in result["memory"]
    assert "memory: unknown (model.path: no-such-owner/no-such-model: not downloaded yet" in render(result)


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"model": {"path": "./none"}}, "model.path: './none': no such folder"),
        ({"model": {"path": "none.gguf"}}, "model.path: 'none.gguf': no such file"),
        ({"model": {"chat_template": "none.jinja"}}, "model.chat_template: 'none.jinja': no such file"),
        ({"sources": {"a": {"path": "none.jsonl", "format": "messages"}}}, "sources.a.path: none.jsonl: no such file"),
        (
            {
                "sources": {"b": {"path": "owner/data", "format": "messages"}},
                "evaluation": {"suites": [{"name": "s", "source": "b", "kind": "generate", "metrics": ["blue"]}]},
            },
            "evaluation.suites.0.metrics: metric: 'blue': did you mean 'bleu'",
        ),
        ({"tuning": {"method": "last-layers", "layers": 2}}, "tuning.layers: 2: the model has 1 blocks"),
    ],
)
def test_what_is_not_there(tmp_path: Path, change: dict[str, Any], start: str) -> None:
    with pytest.raises(UserError) as caught:
        check_recipe(recipe_in(tmp_path, **change), data=False)
    assert str(caught.value).startswith(start)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        check_recipe(recipe_in(tmp_path, model={"path": str(tmp_path)}), data=False)


COUNTS = {"rows": 100, "kept": 80, "skipped_bad": 0, "dropped_long": 0, "truncated": 0, "no_target": 0}


@pytest.mark.parametrize(
    ("row", "counts", "part"),
    [
        ({"tokens": 1000, "target_tokens": 9, "steps": 10}, {}, "0.90% of the tokens are supervised"),
        ({"tokens": 1000, "target_tokens": 11, "steps": 2}, {}, "warmup: 2 steps of 2"),
        ({}, {"truncated": 11}, "11 of 100 rows truncated"),
        ({}, {"dropped_long": 6, "no_target": 5}, "6 dropped_long, 5 no_target of 100 rows left out"),
    ],
)
def test_warnings(tmp_path: Path, row: dict[str, Any], counts: dict[str, int], part: str) -> None:
    recipe = recipe_in(tmp_path, schedule={"warmup": 2})
    stages = [stage_row(recipe.stages[0], row)]
    assert any(part in text for text in warnings_of(recipe, stages, {"a": COUNTS | counts}, None))
    quiet = [stage_row(recipe.stages[0], {"tokens": 100, "target_tokens": 50, "steps": 10})]
    assert warnings_of(recipe, quiet, {"a": COUNTS | {"truncated": 10}}, None) == []


def test_warnings_about_sources(tmp_path: Path) -> None:
    path = str(tmp_path / "data.jsonl")
    more = {name: {"path": path, "format": "messages"} for name in ("held", "idle")}
    recipe = recipe_in(
        tmp_path, sources=more, mixture={"a": 1}, evaluation={"suites": [{"name": "s", "source": "held"}]}
    )
    assert check_recipe(recipe, data=False)["warnings"] == [
        "sources.idle: used by no stage and no suite",
        "sources.held: the same data as sources.a, which is trained on",
    ]


def test_peak_lr_is_the_one_that_trains(tmp_path: Path) -> None:
    from trainer.optim import scaled_lr

    for rule in ("none", "linear", "sqrt"):
        recipe = recipe_in(tmp_path, optimizer={"lr": 1e-3, "scale_lr": {"rule": rule}}, batch={"examples": 128})
        stage = recipe.stages[0]
        assert peak_lr(stage) == scaled_lr(stage.optimizer, stage.batch)
    assert peak_lr(stage) == pytest.approx(2e-3)  # sqrt(128 / 32)


def test_the_whole_process_is_quick_and_torch_free(tmp_path: Path) -> None:
    recipe_in(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: x\nmodel: {{path: {tmp_path / 'model'}, max_length: 64}}\n"
        f"sources: {{a: {{path: {tmp_path / 'data.jsonl'}, format: messages}}}}\n"
    )
    code = (
        "import sys; sys.argv[1:] = ['check', sys.argv[1], '--no-data']\n"
        "from trainer.cli import app\n"
        "app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(2):  # the second with warm files
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert "peak of a step" in done.stdout
    assert min(seconds) < 5  # 0.4 s alone on a core; generous, since tests share the machine
