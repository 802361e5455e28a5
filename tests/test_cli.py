"""The command line as a user meets it: exit codes, one line per mistake, nothing half-written, on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def tunesmith(*arguments: Any, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds, check=False)


def write_recipe(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    recipe = {
        "name": "run",
        "output": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32", "max_length": 96},
        "tuning": {"rank": 4},
        "sources": {"chats": {"path": str(data), "format": "messages"}},
        "batch": {"examples": 6, "micro_tokens": 128},
        "until": {"steps": 4, "epochs": None},
    }
    path = folder / "recipe.yaml"
    with path.open("w") as file:
        YAML(typ="safe").dump(recipe | changes, file)
    return path


QUIET_VERB = """
from trainer.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = {'torch', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)
assert not loaded, loaded
"""
GOOD = json.dumps({"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]})
BAD_DATA = {
    "bad json": (f"{GOOD}\n{{broken\n".encode(), ["data.jsonl:2"]),
    "cut last line": (f"{GOOD}\n{GOOD[:40]}".encode(), ["data.jsonl:2"]),
    "wrong type": (f'{GOOD}\n{{"messages": 5}}\n'.encode(), ["data.jsonl:2", "messages"]),
    "missing field": (f'{GOOD}\n{{"text": "x"}}\n'.encode(), ["data.jsonl:2", "messages"]),
    "empty file": (b"", ["data.jsonl", "empty"]),
    "wrong encoding": (GOOD.replace("1+1", "é").encode("utf-16"), ["data.jsonl", "encoding"]),
    "over-long sample": (GOOD.replace("1+1", "1" * 500).encode(), ["data.jsonl:1", "max_length"]),
    "fully masked": (GOOD.replace('"content": "2"', '"content": "2", "weight": 0').encode(), ["sources.chats"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_exit_2_before_the_model_loads(case: str, tmp_path: Path, tiny_folder: Path) -> None:
    content, fragments = BAD_DATA[case]
    (tmp_path / "data.jsonl").write_bytes(content)
    recipe = write_recipe(tmp_path, tiny_folder, tmp_path / "data.jsonl")
    done = tunesmith("train", recipe)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("tunesmith: error:")]
    assert len(lines) == 1
    assert all(fragment in lines[0] for fragment in fragments), lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (["model.path=/nowhere/model"], ["model.path", "/nowhere/model"]),
        (["output=/proc/nowhere/run"], ["output", "/proc", "cannot be written"]),
        (["sources.chats.format=chatty"], ["sources.chats.format", "chatty"]),
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean", "lr"]),
        (["sources.chats.path=/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (["evaluation.suites=[{name: a, source: chats}]"], ["mixture", "held out"]),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(
    changes: list[str], fragments: list[str], tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    started = time.monotonic()
    done = tunesmith("train", write_recipe(tmp_path, tiny_folder, chats), *changes)
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - started < 60  # 10 s on a quiet machine; the bound is for a crowded one
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tunesmith: error:")]
    assert all(fragment in line for fragment in fragments), line


def test_every_rank_says_so_and_none_hangs(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "data.jsonl").write_text(f"{GOOD}\n{{broken\n")
    recipe = write_recipe(tmp_path, tiny_folder, tmp_path / "data.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "trainer"]
    done = subprocess.run(
        [*command, "train", str(recipe)], env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("tunesmith: error:") == 2
    assert not (tmp_path / "run").exists()


def test_torchrun_trains_and_the_folder_exports_and_reloads(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    """What a user does: torchrun under FSDP2, then evaluate, export and load with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = write_recipe(
        tmp_path,
        tiny_folder,
        chats,
        mixture={"chats": 1.0},
        sources={
            "chats": {"path": str(chats), "format": "messages"},
            "held-out": {"path": str(chats), "format": "messages", "limit": 12},
        },
        evaluation={
            "suites": [
                {"name": "loss", "source": "held-out"},
                {
                    "name": "sums",
                    "source": "held-out",
                    "kind": "generate",
                    "metrics": ["exact_match"],
                    "max_new_tokens": 4,
                },
            ]
        },
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "trainer"]
    done = subprocess.run(
        [*command, "train", str(recipe)], env=ENVIRONMENT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    final = json.loads((run / "evaluation" / "loss-step-00000004.json").read_text())
    assert final["n"] == 12 and final["verdicts"][0]["n"] == 12
    assert tunesmith("evaluate", run).returncode == 0
    again = json.loads((run / "evaluation" / "loss-step-00000004.json").read_text())
    assert again["metrics"]["loss"] == pytest.approx(final["metrics"]["loss"], rel=1e-5)  # one process, two ranks
    exported = tunesmith("export", run)
    assert exported.returncode == 0, exported.stderr
    report = json.loads(exported.stdout.splitlines()[-1])
    assert report["max_difference"] <= report["tolerance"]
    network = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    with torch.no_grad():
        assert network(**tokenizer("1+1", return_tensors="pt")).logits.isfinite().all()
    assert tunesmith("compare", run, run).returncode == 0


def test_help_and_check_import_no_torch(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, chats)
    for arguments in (["--help"], ["check", str(recipe), "--no-data"]):
        code = f"import sys; sys.argv = ['tunesmith', *{arguments!r}]\n" + QUIET_VERB
        done = subprocess.run(
            [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "tunesmith" in done.stdout or "chats" in done.stdout
