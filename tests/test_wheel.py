"""A wheel built from the repository works from any folder: recipes, DeepSpeed settings and templates come with it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from trainer.config import resources
from trainer.config.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """Give a folder with a fresh interpreter, ``venv/bin/python``, that has the wheel and sees this one's packages."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (wheel,) = folder.glob("tunesmith-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    (Path(site) / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def ask(elsewhere: Path, code: str) -> str:
    return run(elsewhere / "venv/bin/python", "-c", code, cwd=elsewhere).strip()


def test_installed_wheel_finds_its_own_recipes(elsewhere):
    found = Path(ask(elsewhere, "from trainer.config.resources import find; print(find('recipes', 'demo.yaml'))"))
    assert found.is_relative_to(elsewhere / "venv")
    assert found.read_bytes() == (ROOT / "recipes/demo.yaml").read_bytes()


@pytest.mark.parametrize("kind", resources.KINDS)
def test_installed_wheel_has_every_resource_of_the_checkout(elsewhere, kind):
    installed = ask(elsewhere, f"from trainer.config.resources import names; print(names({kind!r}))")
    assert installed == str(resources.names(kind))


def test_installed_wheel_has_the_launchers_and_the_command(elsewhere):
    code = "import launchers; from importlib.metadata import entry_points as e; print(e(name='tunesmith'))"
    assert "trainer.cli:main" in ask(elsewhere, code)
    assert (elsewhere / "venv/bin/tunesmith").is_file()


def test_wheel_holds_no_tests_and_no_data(elsewhere):
    files = ask(elsewhere, "from importlib.metadata import files; print(*files('tunesmith'), sep='\\n')").split()
    tops = {Path(name).parts[0] for name in files} - {".."}
    assert tops == {"trainer", "launchers"} | {top for top in tops if top.endswith(".dist-info")}


def test_unknown_resource_names_those_there_are():
    with pytest.raises(UserError, match=r"recipes: nothing\.yaml: no such file: choose one of .*demo\.yaml"):
        resources.find("recipes", "nothing.yaml")
    with pytest.raises(UserError, match="resource kind: pictures: use one of recipes, ds_configs, slurm"):
        resources.folder("pictures")
    with pytest.raises(UserError, match="no such file"):
        resources.find("recipes", "../pyproject.toml")
