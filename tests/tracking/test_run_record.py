from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.errors import UserError
from trainer.tracking import run_record
from trainer.tracking.run_record import describe_environment, open_run, read_run, update_run, write_run


def test_open_run_keeps_identity_and_counts_restarts(tmp_path: Path) -> None:
    first = open_run(tmp_path / "run", name="triage", data={"tickets": {"examples": 3}})
    assert first["status"] == "running" and first["restarts"] == 0
    update_run(tmp_path / "run", status="preempted")
    second = open_run(tmp_path / "run", name="triage")
    assert (second["id"], second["started"], second["restarts"]) == (first["id"], first["started"], 1)
    assert second["data"] == {"tickets": {"examples": 3}} and second["status"] == "running"
    assert read_run(tmp_path / "run") == second
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json"]


def test_status_is_one_of_four(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="done"):
        write_run(tmp_path, {"status": "done"})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, {"status": "running"})

    def broken(file: int) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(run_record.os, "fsync", broken)
    with pytest.raises(OSError, match="disk gone"):
        update_run(tmp_path, status="complete")
    assert read_run(tmp_path) == {"status": "running"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(("content", "told"), [(None, "missing"), ("{", "not JSON"), ("[]", "not a JSON object")])
def test_unreadable_records_name_file_and_remedy(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=rf"run\.json: {told}.*: "):
        read_run(tmp_path)


def test_secrets_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_TOKEN", "canary-from-environment")
    open_run(tmp_path, command="train --x canary-from-environment", hub={"token": "canary-b"}, url="http://u:canary@h")
    assert "canary" not in (tmp_path / "run.json").read_text()


def test_environment_is_told_without_heavy_imports() -> None:
    program = (
        "import sys, json; from trainer.tracking import describe_environment; found = describe_environment();"
        "heavy = [m for m in ('torch', 'transformers', 'matplotlib', 'wandb', 'rich') if m in sys.modules];"
        "print(json.dumps([found, heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    assert found["versions"]["torch"] and found["versions"]["tunesmith"] and found["versions"]["python"]
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_bytes"] > 2**28
    assert found["hardware"]["gpus"] == []


def test_code_version_is_the_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(run_record.trainer, "__file__", str(package / "__init__.py"))
    assert describe_environment()["code"] is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(package.parent), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    assert describe_environment()["code"] is None  # no commit yet
    git("add", "-A")
    git("commit", "-qm", "first")
    assert describe_environment()["code"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("x = 1\n")
    assert describe_environment()["code"]["dirty"] is True
    installed = package.parent / "venv" / "trainer"  # below somebody's checkout, but not of it
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(run_record.trainer, "__file__", str(installed / "__init__.py"))
    assert describe_environment()["code"] is None
