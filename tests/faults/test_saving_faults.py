"""Whole runs on two ranks whose saving meets a fault: they end as the calm run did, at most one interval redone."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_cases import (
    EVERY,
    STEPS,
    Outcome,
    last_step,
    launch,
    outcome,
    ranks_of,
    recipe_for,
    same_end,
    wait_for,
    write_recipe,
)

from trainer.checkpoint.manifest import newest, step_of, verify
from trainer.tracking import read_rows, read_run

SLOW_STEPS = ";".join(f"step:step={step}:slow" for step in range(8, 13))  # the run is still at work when we come
PHASES = ("before", "staged", "shard", "shards", "manifest", "rename", "renamed", "rotate")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chats: Path) -> Outcome:
    """The undisturbed run."""
    root = tmp_path_factory.mktemp("calm")
    recipe = write_recipe(recipe_for(root / "run", tiny_folder, chats), root / "recipe.yaml")
    ended = launch(recipe, log=root / "log").end()
    assert ended.code == 0, ended.output
    return outcome(root / "run")


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, chats: Path) -> Path:
    return write_recipe(recipe_for(tmp_path / "run", tiny_folder, chats), tmp_path / "recipe.yaml")


def redone(folder: Path) -> int:
    """Steps that were made more than once."""
    text = (folder / "metrics.jsonl").read_text()
    return text.count('"kind": "step"') - STEPS


def events(folder: Path, name: str) -> list[dict[str, object]]:
    return [row for row in read_rows(folder) if row["kind"] == "event" and row["name"] == name]


def test_killed_in_the_middle_of_its_file_a_rank_costs_one_interval(recipe: Path, calm: Outcome) -> None:
    folder = recipe.parent / "run"
    point = "shard:rank=1:nth=3:attempt=1"
    ended = launch(recipe, log=recipe.parent / "log", TUNESMITH_FAIL_POINT=point).end()
    assert ended.code == 0, ended.output
    same_end(folder, calm)
    assert read_run(folder)["restarts"] == 1
    assert redone(folder) <= 2 * EVERY


@pytest.mark.faults
@pytest.mark.timeout(200)
@pytest.mark.parametrize("who", ["rank=0", "rank=1", "both"])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_every_phase(phase: str, who: str, recipe: Path, calm: Outcome) -> None:
    if who == "rank=1" and phase in ("manifest", "rename", "renamed", "rotate"):
        pytest.skip("an act of rank 0 alone")
    folder = recipe.parent / "run"
    parts = [phase, *([who] if who != "both" else []), "nth=4" if phase != "rotate" else "nth=1", "attempt=1"]
    ended = launch(recipe, log=recipe.parent / "log", TUNESMITH_FAIL_POINT=":".join(parts)).end(180)
    assert ended.code == 0, ended.output
    same_end(folder, calm)
    assert read_run(folder)["restarts"] == 1
    assert redone(folder) <= 2 * EVERY


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_killed_again_while_it_recovers(recipe: Path, calm: Outcome) -> None:
    faults = "rename:nth=3:attempt=1;step:rank=1:attempt=2;shards:nth=2:attempt=3"
    ended = launch(recipe, log=recipe.parent / "log", TUNESMITH_FAIL_POINT=faults).end(180)
    assert ended.code == 0, ended.output
    same_end(recipe.parent / "run", calm)


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m,nr_inodes=200", "none", str(place)], check=False)
    if done.returncode:
        pytest.skip("needs root to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class FailingDisk:
    """An ext4 file system in a file, which can be made to fail as one with a broken device does."""

    def __init__(self, image: Path, place: Path) -> None:
        self.image, self.place = image, place

    def mount(self) -> int:
        command = ["mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.place)]
        return subprocess.run(command, check=False).returncode

    def repair(self) -> None:
        """What an administrator does: unmount, check, mount."""
        subprocess.run(["umount", str(self.place)], check=True)
        checked = subprocess.run(["fsck.ext4", "-f", "-y", str(self.image)], check=False, capture_output=True)
        assert checked.returncode < 4, checked.stdout
        assert self.mount() == 0


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[FailingDisk]:
    disk = FailingDisk(tmp_path / "image", tmp_path / "disk")
    disk.place.mkdir()
    with disk.image.open("wb") as file:
        file.truncate(32 << 20)
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", str(disk.image)], check=True)
    if disk.mount():
        pytest.skip("needs root and a loop device to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk.place)], check=True)


def fill(place: Path) -> Path:
    """Take all the room that is left."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            pass
        try:
            while True:
                file.write(b"\0" * 512)
        except OSError:
            return filler


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_a_disk_that_is_full_for_a_while(
    small_disk: Path, tmp_path: Path, tiny_folder: Path, chats: Path, calm
) -> None:
    folder = small_disk / "run"
    slower = {"checkpoint": {"every": EVERY, "failure_limit": 100}}
    recipe = write_recipe(recipe_for(folder, tiny_folder, chats, **slower), tmp_path / "recipe.yaml")
    command = launch(recipe, log=tmp_path / "log")
    wait_for(lambda: newest(folder / "checkpoints"), what="checkpoint")
    filler = fill(small_disk)
    try:
        wait_for(lambda: "checkpoint_failed" in command.text() or not ranks_of(folder), 60, "failed save")
    finally:
        filler.unlink()
    ended = command.end(150)
    for path in newest(folder / "checkpoints"):
        verify(path)
    if ended.code:
        ended = launch(recipe, log=tmp_path / "log2").end(150)
    assert ended.code == 0, ended.output
    same_end(folder, calm)


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_large_files(rank: int, recipe: Path, calm: Outcome) -> None:
    """A real EFBIG in the writer thread of one rank: the save fails on all, is told, and nothing half is published."""
    folder = recipe.parent / "run"
    command = launch(recipe, "--max-restarts", "0", log=recipe.parent / "log", TUNESMITH_FAIL_POINT=SLOW_STEPS)
    wait_for(lambda: last_step(folder) >= 4 and len(ranks_of(folder)) == 2, what="steps on two ranks")
    pid = ranks_of(folder)[rank]
    before = {path.name for path in newest(folder / "checkpoints")}
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # a shard has 155 kB
    ended = command.end(150)
    assert ended.code == 1, ended.output
    assert "checkpoints fail" in ended.output
    assert before or newest(folder / "checkpoints")
    for path in newest(folder / "checkpoints"):
        verify(path)
    again = launch(recipe, log=recipe.parent / "log2").end(150)
    assert again.code == 0, again.output
    same_end(folder, calm)


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_a_disk_that_turns_read_only(
    failing_disk: FailingDisk, tmp_path: Path, tiny_folder: Path, chats: Path, calm: Outcome
) -> None:
    """As ext4 does after an error: files that are open can be written no more."""
    folder = failing_disk.place / "run"
    recipe = write_recipe(recipe_for(folder, tiny_folder, chats), tmp_path / "recipe.yaml")
    command = launch(recipe, log=tmp_path / "log", TUNESMITH_FAIL_POINT=SLOW_STEPS)
    wait_for(lambda: len(newest(folder / "checkpoints")) > 1, what="checkpoints")
    subprocess.run(["mount", "-o", "remount,abort", str(failing_disk.place)], check=True)
    ended = command.end(150)
    assert ended.code == 1, ended.output
    assert "Read-only file system" in ended.output
    failing_disk.repair()
    for path in newest(folder / "checkpoints"):
        verify(path)
    again = launch(recipe, log=tmp_path / "log2").end(150)
    assert again.code == 0, again.output
    same_end(folder, calm)


@pytest.mark.faults
def test_a_read_only_disk_is_told_before_the_model_loads(
    small_disk: Path, tmp_path: Path, tiny_folder: Path, chats: Path
) -> None:
    recipe = write_recipe(recipe_for(small_disk / "run", tiny_folder, chats), tmp_path / "recipe.yaml")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = launch(recipe, log=tmp_path / "log").end(60)
    assert ended.code == 2
    assert "output" in ended.output and "cannot be written" in ended.output


# ---------------------------------------------------------------- signals, launchers, neighbours


@pytest.mark.faults
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_during_a_save(number: signal.Signals, recipe: Path, calm: Outcome) -> None:
    folder = recipe.parent / "run"
    command = launch(recipe, log=recipe.parent / "log")
    wait_for(lambda: any((folder / "checkpoints").glob(".staging-*")), what="save in flight")
    assert command.process is not None
    command.process.send_signal(number)
    command.process.send_signal(number)
    ended = command.end()
    assert ended.code == 75, ended.output
    assert read_run(folder)["status"] == "preempted"
    saved = step_of(newest(folder / "checkpoints")[0])
    assert saved == last_step(folder)  # no completed step is lost
    again = launch(recipe, log=recipe.parent / "log2").end()
    assert again.code == 0, again.output
    same_end(folder, calm)
    assert redone(folder) == 0


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_only_the_launcher_is_killed(recipe: Path, calm: Outcome) -> None:
    folder = recipe.parent / "run"
    command = launch(recipe, log=recipe.parent / "log")
    wait_for(lambda: last_step(folder) >= 4 and len(ranks_of(folder)) == 2, what="steps on two ranks")
    assert command.process is not None
    os.kill(command.process.pid, signal.SIGKILL)
    wait_for(lambda: not ranks_of(folder), 5, "end of the orphans")
    ended = launch(recipe, log=recipe.parent / "log2").end()
    assert ended.code == 0, ended.output
    same_end(folder, calm)


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_a_second_run_in_one_folder_is_refused_and_harms_nothing(recipe: Path, calm: Outcome) -> None:
    folder = recipe.parent / "run"
    first = launch(recipe, log=recipe.parent / "log", TUNESMITH_FAIL_POINT=SLOW_STEPS)
    wait_for(lambda: last_step(folder) >= 2, what="steps")
    second = launch(recipe, log=recipe.parent / "log2").end(60)
    assert second.code == 2, second.output
    assert "another run is working in it" in second.output
    ended = first.end()
    assert ended.code == 0, ended.output
    same_end(folder, calm)
    assert redone(folder) == 0


@pytest.mark.faults
@pytest.mark.timeout(200)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "swapped", "hint", "all"])
def test_damaged_checkpoints_are_passed_over(damage: str, recipe: Path, calm: Outcome) -> None:
    folder = recipe.parent / "run"
    point = f"step:rank=0:step={3 * EVERY + 2}"
    ended = launch(recipe, "--max-restarts", "0", log=recipe.parent / "log", TUNESMITH_FAIL_POINT=point).end()
    assert ended.code == 1, ended.output
    found = newest(folder / "checkpoints")
    harm(found, damage)
    again = launch(recipe, "--max-restarts", "0", log=recipe.parent / "log2").end()
    if damage == "all":
        assert again.code == 1, again.output
        assert all(path.name in again.output for path in found)  # each, with its reason
        assert "step 1 " not in again.output
        return
    assert again.code == 0, again.output
    same_end(folder, calm)
    refused = events(folder, "checkpoint_refused")
    assert bool(refused) == (damage != "hint")
    if refused:
        assert found[0].name in str(refused[0]["detail"])


def harm(found: list[Path], damage: str) -> None:
    newest_one = found[0]
    shards = sorted(newest_one.glob("*.safetensors"))
    if damage == "flip":
        data = bytearray(shards[1].read_bytes())
        data[len(data) // 2] ^= 4
        shards[1].write_bytes(data)
    elif damage == "cut":
        shards[0].write_bytes(shards[0].read_bytes()[:-7])
    elif damage == "missing":
        shards[1].unlink()
    elif damage == "swapped":
        first, second = (path.read_bytes() for path in shards)
        shards[0].write_bytes(second)
        shards[1].write_bytes(first)
    elif damage == "hint":
        (newest_one.parent / "latest").write_text("step-00009999\n")
    else:
        for path in found:
            (path / "manifest.json").write_text("{}")
