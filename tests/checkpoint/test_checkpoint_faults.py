"""Nothing bad is ever loaded: damage to every file, forged manifests, kills at every point of a save."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_cases import FlatEngine, checkpoints, in_threads, logical, ok, save_flat, single, train

from trainer.checkpoint import CheckpointError, load, newest, save, verify
from trainer.config.errors import UserError
from trainer.world import World

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = Path(__file__).with_name("checkpoint_cases.py")
SHARD = "rank-00000-of-00001.safetensors"


def damaged(folder: Path, name: str) -> None:
    """The newest checkpoint is refused, naming the file, and the older one is loaded in its place, bit for bit."""
    with pytest.raises(CheckpointError, match=name.replace("[", "\\[")):
        verify(folder / "step-00000004")
    engine, reference = single(7), single()
    loaded = load(folder, engine, World())
    assert loaded.step == 2 and loaded["position"] == 2
    assert len(loaded.refused) == 1 and name in loaded.refused[0]
    train(reference, 2)
    assert logical([engine]) == logical([reference])
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        load(folder / "step-00000004", engine, World())  # asked for by name: no other takes its place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4."""
    checkpoints(tmp_path, 2, 4)
    return tmp_path


def test_one_flipped_bit_anywhere_is_found(folder: Path) -> None:
    path = folder / "step-00000004"
    draw = random.Random(0)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        positions = {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(120))}
        for position in positions:
            broken = bytearray(data)
            broken[position] ^= 1 << draw.randrange(8)
            file.write_bytes(broken)
            with pytest.raises(CheckpointError, match="step-00000004"):
                verify(path)
        if file.name == SHARD:
            damaged(folder, SHARD)
        file.write_bytes(data)
    assert verify(path).step == 4


@pytest.mark.parametrize("name", [SHARD, "manifest.json", "manifest.sha256"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_file_is_found(folder: Path, name: str, share: float) -> None:
    file = folder / "step-00000004" / name
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    damaged(folder, "manifest.json" if name == "manifest.sha256" else name)


@pytest.mark.parametrize("name", [SHARD, "manifest.json", "manifest.sha256"])
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    (folder / "step-00000004" / name).unlink()
    damaged(folder, name)


def test_shards_missing_swapped_or_foreign_are_found(tmp_path: Path) -> None:
    for step in (2, 4):
        ok(in_threads(2, lambda world, step=step: save_flat(tmp_path, step, world)))
    path, names = tmp_path / "step-00000004", [f"rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    copy = shutil.copytree(path, tmp_path / "copy")

    def refused(name: str) -> None:
        for size in (1, 2, 3):
            for loaded in ok(in_threads(size, lambda world: load(tmp_path, FlatEngine(world), world))):
                assert loaded.step == 2 and name in loaded.refused[0]
        shutil.rmtree(path)
        shutil.copytree(copy, path)

    (path / names[0]).unlink()
    refused(f"{names[0]}: missing")
    (path / names[0]).write_bytes((copy / names[1]).read_bytes())
    (path / names[1]).write_bytes((copy / names[0]).read_bytes())
    refused(names[0])
    shutil.copy(tmp_path / "step-00000002" / names[1], path / names[1])
    refused(f"{names[1]}: SHA-256 differs")
    shutil.copy(path / names[1], path / "rank-00002-of-00003.safetensors")
    refused("rank-00002-of-00003.safetensors: foreign")


def test_links_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, outside = folder / "step-00000004", tmp_path_factory.mktemp("outside")
    shutil.move(path / SHARD, outside / SHARD)
    (path / SHARD).symlink_to(outside / SHARD)
    damaged(folder, f"{SHARD}: not a regular file")
    shutil.move(path, outside / "moved")
    path.symlink_to(outside / "moved")
    with pytest.raises(CheckpointError, match="step-00000004: not a folder"):
        verify(path)


def forged(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the newest manifest and seal it anew, as an attacker can; verification must not trust the seal alone."""
    path = folder / "step-00000004"
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    data = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


def weight(manifest: dict) -> dict:
    """The record of a matrix of 30 elements."""
    return next(t for t in manifest["tensors"] if (t["kind"], t["name"]) == ("param", "body.weight"))


FORGERIES: dict[str, tuple[Callable[[dict], None], str]] = {
    "gap": (lambda m: weight(m)["ranges"][0].update(start=1), "gap at element 0"),
    "short": (lambda m: weight(m)["ranges"][0].update(numel=2), "2 of 30 elements"),
    "overlap": (lambda m: weight(m)["ranges"].append(weight(m)["ranges"][0]), "overlap at element 30"),
    "no ranges": (lambda m: weight(m).update(ranges=[]), "0 of 30 elements"),
    "listed twice": (lambda m: m["tensors"].append(weight(m)), "listed twice"),
    "traversal": (lambda m: m["files"].update({"../../../etc/passwd": m["files"][SHARD]}), "not the name of a shard"),
    "absolute": (lambda m: weight(m)["ranges"][0].update(file="/etc/passwd"), "ranges.0.file"),
    "unknown file": (
        lambda m: weight(m)["ranges"][0].update(file="rank-00009-of-00010.safetensors"),
        "not a file of this checkpoint",
    ),
    "no digest": (lambda m: m["files"][SHARD].update(sha256=""), "sha256"),
    "unknown key": (lambda m: m.update(hook="os.system"), "hook"),
    "negative": (lambda m: weight(m)["ranges"][0].update(start=-1), "ranges.0.start"),
    "not an object": (lambda m: m.clear(), "format"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused(folder: Path, name: str) -> None:
    change, message = FORGERIES[name]
    forged(folder, change)
    damaged(folder, message)


def test_a_later_format_is_the_users_to_solve_not_skipped(folder: Path) -> None:
    forged(folder, lambda m: m.update(format=3, novelty=1))
    with pytest.raises(UserError, match="later version"):
        load(folder, single(), World())


def test_every_one_bad_is_an_error_that_names_each_and_touches_nothing(folder: Path) -> None:
    for path in newest(folder):
        (path / SHARD).write_bytes(b"")
    engine = single(3)
    before = logical([engine])
    with pytest.raises(CheckpointError, match=r"step-00000004.*0 bytes.*step-00000002.*0 bytes"):
        load(folder, engine, World())
    assert logical([engine]) == before
    with pytest.raises(CheckpointError, match="there is none"):
        load(folder / "elsewhere", engine, World())


@pytest.mark.parametrize("hint", [None, "", "step-00000009\n", "../../etc\n"])
def test_the_hint_is_only_a_hint(folder: Path, hint: str | None) -> None:
    (folder / "latest").unlink() if hint is None else (folder / "latest").write_text(hint)
    assert load(folder, single(), World()).step == 4


POINTS = {"before": 4, "staged": 4, "shard": 4, "shards": 4, "manifest": 4, "rename": 4, "renamed": 6, "rotate": 6}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run a fail point, each killed (-9) there while it saved step 6."""
    parent = tmp_path_factory.mktemp("killed")
    checkpoints(parent / "model", 2, 4)
    folders = [shutil.copytree(parent / "model", parent / point) for point in POINTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(CASES), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["-9"] * len(POINTS), done.stdout + done.stderr
    return parent


@pytest.mark.parametrize("point", POINTS)
def test_killed_in_a_save_the_run_goes_on_from_a_whole_one(killed: Path, point: str) -> None:
    """What loads is bit for bit the uninterrupted run, and the next save cleans up."""
    folder = killed / point
    engine, reference = single(5), single()
    loaded = load(folder, engine, World())
    assert (loaded.step, loaded.refused) == (POINTS[point], ())
    train(reference, loaded.step)
    assert logical([engine]) == logical([reference])
    train(engine, 8 - loaded.step, loaded.step)
    train(reference, 8 - loaded.step, loaded.step)
    save(folder, 8, engine, World(), {"position": 8}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", f"step-{loaded.step:08d}", "step-00000008"]
    resumed = single(6)
    assert load(folder, resumed, World()).step == 8
    assert logical([resumed]) == logical([reference])


def test_staging_of_a_live_writer_and_of_another_host_stays(folder: Path) -> None:
    started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    live = folder / f".staging-step-00000005@{os.uname().nodename}+{os.getppid()}+{started}"
    other = folder / ".staging-step-00000005@another-host+1+1"
    dead = folder / f".staging-step-00000005@{os.uname().nodename}+{os.getppid()}+1"
    for path in (live, other, dead):
        path.mkdir()
    save(folder, 6, single(), World(), {})
    assert live.exists() and other.exists() and not dead.exists()
