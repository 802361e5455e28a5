"""Nothing that a run writes is a pickle, or holds one; and nothing that could be one is read."""

from __future__ import annotations

import io
import pickletools
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import pickled_command
from finished import FinishedRun

from trainer.config import UserError, build_recipe
from trainer.data.prepare import prepare
from trainer.data.readers import read_rows
from trainer.data.store import read


def pickle_in(data: bytes) -> str:
    """What of a pickle these bytes are: a whole one from their start, or an archive that holds one; else empty."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return next((f"zip of {name}" for name in archive.namelist() if pickle_in(archive.read(name))), "")
    if data[:8] and data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return "tar" if any(pickle_in(file.read()) for m in archive if (file := archive.extractfile(m))) else ""
    if data.startswith(b"\x93NUMPY"):
        return "objects in .npy" if b"'|O'" in data[:256] else ""
    try:
        operations = [opcode.name for opcode, _, _ in pickletools.genops(data)]
    except Exception:  # noqa: BLE001 - not a pickle, in one of many ways
        return ""
    return "pickle" if operations and operations[-1] == "STOP" else ""


def test_the_scanner_sees_pickles(tmp_path: Path) -> None:
    whole = pickled_command(tmp_path / "canary")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", whole)
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        member = tarfile.TarInfo("pickle")
        member.size = len(whole)
        file.addfile(member, io.BytesIO(whole))
    for data in (whole, archive.getvalue(), objects.getvalue(), tar.getvalue()):
        assert pickle_in(data)
    assert not pickle_in(b"{}") and not pickle_in(b"") and not pickle_in(np.zeros(3).tobytes())


@pytest.mark.timeout(400)
def test_a_finished_run_holds_no_pickle(finished_run: FinishedRun) -> None:
    """Checkpoints, evaluation, wandb's files, the cache of tokenised data."""
    names = scanned(finished_run)
    assert {"manifest.json", "metrics.jsonl", "report.html", "ids.npy"} <= names
    assert any(name.endswith(".wandb") for name in names) and any(name.startswith("rank-") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_export_holds_no_pickle(exported_run: FinishedRun) -> None:
    assert {"export.json", "adapter_model.safetensors", "model.safetensors"} <= scanned(exported_run)


def scanned(run: FinishedRun) -> set[str]:
    """The names of all files, none of which is a pickle."""
    files = [path for place in (run.folder, run.cache) for path in place.rglob("*") if path.is_file()]
    assert {str(path): kind for path in files if (kind := pickle_in(path.read_bytes()))} == {}
    return {path.name for path in files}


# ---------------------------------------------------------------- read: the cache, and data by other libraries


@pytest.fixture
def cached(tiny_folder: Path, chats: Path, tmp_path: Path) -> tuple[Any, Path, Path]:
    """(recipe, cache, the folder of its one source in it)."""
    data = {
        "name": "x",
        "model": {"path": str(tiny_folder)},
        "sources": {"s": {"path": str(chats), "format": "messages"}},
    }
    recipe, cache = build_recipe(data), tmp_path / "cache"
    prepare(recipe, cache)
    return recipe, cache, next(path for path in cache.iterdir() if path.is_dir())


def test_objects_in_the_cache_are_made_again(cached: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """A cached array of Python objects, of the recorded size, in place of one of numbers."""
    recipe, cache, folder = cached
    canary = tmp_path / "canary"
    good = (folder / "ids.npy").read_bytes()
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    evil = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + pickled_command(canary)
    (folder / "ids.npy").write_bytes(evil.ljust(len(good), b"\0"))
    assert read(folder, "s", "s") is None and not canary.exists()
    prepare(recipe, cache)
    assert (folder / "ids.npy").read_bytes() == good and not canary.exists()


def arrow_with_extension(canary: Path) -> Any:
    """A table whose column claims pyarrow's extension type that is kept as a pickle (CVE-2023-47248)."""
    import pyarrow as pa

    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled_command(canary),
    }
    field = pa.field("text", pa.string(), metadata=metadata)
    return pa.table([pa.array(["a"])], schema=pa.schema([field]))


@pytest.mark.parametrize("kind", ["parquet", "saved dataset"])
def test_arrow_extension_types_stay_asleep(kind: str, tmp_path: Path, tiny_folder: Path) -> None:
    canary = tmp_path / "canary"
    if kind == "parquet":
        import pyarrow.parquet as pq

        path = tmp_path / "d.parquet"
        pq.write_table(arrow_with_extension(canary), path)
    else:
        import datasets
        import pyarrow as pa

        path = tmp_path / "saved"
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(path))
        (file,) = path.glob("*.arrow")
        table = arrow_with_extension(canary)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    source = build_recipe({
        "name": "x", "model": {"path": str(tiny_folder)}, "objective": {"name": "language-modeling"},
        "sources": {"s": {"path": str(path), "format": "text"}},
    }).sources["s"]  # fmt: skip
    try:
        list(read_rows(source, "sources.s.path"))
    except UserError as error:
        assert str(path) in str(error)
    assert not canary.exists()


def test_scripts_and_pickles_as_data_sets_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    """A loading script of datasets' earlier days, pickled rows, and a script beside a saved data set."""
    canary = tmp_path / "canary"
    script = f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n"
    (tmp_path / "evil.py").write_text(script)
    (tmp_path / "rows.pkl").write_bytes(pickled_command(canary))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "folder.py").write_text(script)
    for path in (tmp_path / "evil.py", tmp_path / "rows.pkl", tmp_path / "folder"):
        data = {
            "name": "x",
            "model": {"path": str(tiny_folder)},
            "sources": {"s": {"path": str(path), "format": "messages"}},
        }
        with pytest.raises(UserError, match=r"sources\.s\.path"):
            prepare(build_recipe(data), tmp_path / "cache")
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    shutil.copy(tmp_path / "evil.py", tmp_path / "saved" / "saved.py")
    data["sources"]["s"] |= {"path": str(tmp_path / "saved"), "format": "text"}
    assert (
        len(list(read_rows(build_recipe({**data, "objective": {"name": "language-modeling"}}).sources["s"], "s"))) == 1
    )
    assert not canary.exists()
