"""Folders and names that lead elsewhere: nothing is written outside of a run's folder, nor taken from a stranger."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_cases import launch, recipe_for, write_recipe
from finished import FinishedRun

from trainer.checkpoint.manifest import CheckpointError, newest, verify
from trainer.config import UserError, build_recipe
from trainer.data.prepare import prepare
from trainer.revisit import Choice, evaluate_run
from trainer.run import check_output
from trainer.session import preflight
from trainer.tracking.journal import Journal
from trainer.tracking.wandb_feed import start as start_feed

STRANGER = 12345


def link(name: str) -> Callable[[Path, Path], None]:
    """An entry of a run's folder that is a link to something outside."""

    def make(run: Path, outside: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).symlink_to(outside)

    return make


LINKS = {
    name: link(name)
    for name in (
        "metrics.jsonl", "ledger.jsonl", "run.json", "recipe.yaml", "report.html", "wandb", "wandb.log", "checkpoints",
        "evaluation", ".lease", "export", "checkpoints/step-00000002", "checkpoints/latest", ".lease/00000001",
        "evaluation/loss-base.json", "logs", "logs/supervisor.jsonl",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_inside_of_a_runs_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    LINKS[name](tmp_path / "run", outside)
    with pytest.raises(UserError) as caught:
        check_output(tmp_path / "run")
    assert str(caught.value).startswith(f"output: {tmp_path / 'run' / name}: is a link") and not list(outside.iterdir())


def test_a_launcher_writes_no_log_through_a_link(tmp_path: Path, tiny_folder: Path, chats: Path) -> None:
    recipe = write_recipe(recipe_for(tmp_path / "run", tiny_folder, chats), tmp_path / "recipe.yaml")
    outside = tmp_path / "outside"
    outside.mkdir()
    link("logs")(tmp_path / "run", outside)
    ended = launch(recipe, ranks=1, log=tmp_path / "log").end(60)
    assert ended.code == 2, ended.output
    assert f"{tmp_path / 'run' / 'logs'}: is a link" in ended.output
    assert not list(outside.iterdir())


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    check_output(tmp_path / "run")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="a link to nothing"):
        check_output(tmp_path / "nowhere")


def test_verbs_on_a_run_look_first(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "evaluation").symlink_to("/etc")
    with pytest.raises(UserError, match=r"run: .*evaluation: is a link"):
        evaluate_run(tmp_path, [], Choice())


def test_the_journal_follows_no_link_that_came_later(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("export A=1\n")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "profile")
    with pytest.raises(OSError, match="symbolic"):
        Journal(tmp_path)
    (tmp_path / "wandb.log").symlink_to(tmp_path / "profile")
    with pytest.raises(OSError, match="symbolic"):
        start_feed(tmp_path, "offline", "p", "n", "i")
    assert (tmp_path / "profile").read_text() == "export A=1\n"


@pytest.mark.parametrize(
    "name", ["step-00000001", "step-00000001x", "step-../../x", "step-1", ".replaced-step-00000009"]
)
def test_only_names_of_steps_are_checkpoints_and_links_are_none(name: str, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    place.mkdir()
    if "/" not in name:
        (place / name).symlink_to("/etc")
    for path in newest(place):
        with pytest.raises(CheckpointError, match="not a folder"):
            verify(path)


@pytest.mark.parametrize("output", ["x" * 300, "/proc/run", "/dev/null/run"])
def test_places_that_cannot_be_written_to(output: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output: "):
        check_output(tmp_path / output)


@pytest.mark.timeout(400)
def test_nothing_is_made_outside_of_the_runs_folder(finished_run: FinishedRun) -> None:
    """Beside the folders that the test itself made, there are the run's and the cache alone."""
    known = {"run", "cache", "train.jsonl", "held.jsonl", "recipe.yaml", "output.txt"}
    assert {path.name for path in finished_run.folder.parent.iterdir()} == known


# ---------------------------------------------------------------- owners and modes


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a stranger's folder")
@pytest.mark.parametrize("what", ["folder", "link", "private"])
def test_a_strangers_folder_where_everybody_can_write(
    what: str, tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    """As another user makes it in /tmp before us: he would choose what is read and written."""
    place = tmp_path / "open"
    place.mkdir(mode=0o777)
    place.chmod(0o755 if what == "private" else 0o1777)
    (tmp_path / "elsewhere").mkdir()
    mine = place / "run"
    if what == "link":
        mine.symlink_to(tmp_path / "elsewhere")
    else:
        mine.mkdir()
    os.chown(mine, STRANGER, STRANGER, follow_symlinks=False)
    sources = {"s": {"path": str(chats), "format": "messages"}}
    recipe = build_recipe({"name": "x", "output": str(mine), "model": {"path": str(tiny_folder)}, "sources": sources})
    if what == "private":  # a colleague's folder in a place of their own is their own affair
        check_output(mine)
        return
    with pytest.raises(UserError, match=f"output: {mine}: belongs to user {STRANGER}"):
        preflight(recipe)
    with pytest.raises(UserError, match=f"cache: {mine}: belongs to user {STRANGER}"):
        prepare(recipe, mine)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_everybody_can_write_to_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with caplog.at_level(logging.WARNING):
        check_output(tmp_path / "run")
    assert "everybody can write" in caplog.text


def test_modes_under_an_open_umask(finished_run: FinishedRun) -> None:
    """It ran under `umask 000`: what it wrote is not for everybody to change, and wandb's log for nobody else."""
    made = [path for place in (finished_run.folder, finished_run.cache) for path in (place, *place.rglob("*"))]
    assert len(made) > 20
    assert [str(path) for path in made if not path.is_symlink() and path.stat().st_mode & 0o002] == []
    assert (finished_run.folder / "wandb.log").stat().st_mode & 0o777 == 0o600
