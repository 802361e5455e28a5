"""The house rules that a machine can check: sizes, forbidden calls, light imports, names of modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("trainer", "launchers") for path in (ROOT / package).rglob("*.py"))
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}  # yaml: PyYAML reads YAML 1.1
UNSAFE_CALLS = {
    "torch.load", "torch.save", "os.system", "os.popen", "eval", "exec",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
UNFINISHED = ("TO" + "DO", "FIX" + "ME", "XX" + "X")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(node: ast.expr) -> str:
    """Give ``a.b.c`` of an attribute chain, or an empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (stem := dotted(node.value)):
        return f"{stem}.{node.attr}"
    return ""


def unsafe(tree: ast.AST) -> list[str]:
    """Give the forbidden imports and calls of a module, with their lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            found += [f"{node.lineno}: import {name}" for name in names if name in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            found.append(f"{node.lineno}: from {node.module}")
        elif isinstance(node, ast.Call):
            if dotted(node.func) in UNSAFE_CALLS:
                found.append(f"{node.lineno}: {dotted(node.func)}()")
            found += [f"{node.lineno}: typ=unsafe" for word in node.keywords if ast.unparse(word) == "typ='unsafe'"]
            shells = [word for word in node.keywords if word.arg == "shell"]
            found += [f"{node.lineno}: shell=" for word in shells if getattr(word.value, "value", True) is not False]
    return found


def swallowed(tree: ast.AST) -> list[int]:
    """Give the lines of handlers that catch everything and do nothing."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or dotted(node.type) in {"Exception", "BaseException"})
        and all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
    ]


def long_functions(tree: ast.AST) -> list[str]:
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    ]


def test_there_is_code_to_check():
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_house_rules(path: Path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    assert long_functions(tree) == []
    assert unsafe(tree) == []
    assert swallowed(tree) == []
    assert [word for word in UNFINISHED if word in text] == []
    assert path.stem not in VAGUE_NAMES and path.parent.name not in VAGUE_NAMES


def test_the_rules_can_fail():
    bad = (
        "import pickle\nfrom dill import loads\ntorch.load(f)\nrun(c, shell=True)\nrun(c, shell=False)\n"
        "YAML(typ='unsafe')\n"
        "try:\n    f()\nexcept Exception:\n    pass\n"
    )
    assert len(unsafe(ast.parse(bad))) == 5
    assert swallowed(ast.parse(bad)) == [9]
    assert long_functions(ast.parse("def f():\n" + "    x = 1\n" * 60)) == ["f (61 lines)"]


@pytest.mark.parametrize("module", ["trainer", "trainer.config", "trainer.config.resources", "trainer.measures"])
def test_import_is_light(module: str):
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'wandb', 'matplotlib', 'bitsandbytes', 'deepspeed'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
