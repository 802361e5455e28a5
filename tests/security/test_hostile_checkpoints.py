"""Checkpoints that mean harm are refused although every digest agrees: in time, in little memory, running nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from bounds import bounded
from hostile_checkpoints import CHECKPOINTS, good, shard_of, write

from trainer.checkpoint.manifest import CheckpointError, verify
from trainer.checkpoint.reader import Reader
from trainer.config import UserError


def test_the_good_one_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    write(folder, shard_of(), good())
    with Reader(folder, verify(folder)) as reader:
        assert reader.tensor("param", "w").tolist() == [0.0] * 4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_refused(name: str, tmp_path: Path) -> None:
    make, part = CHECKPOINTS[name]
    folder, canary = tmp_path / "step-00000001", tmp_path / "canary"
    make(folder, canary)
    with bounded(), pytest.raises((CheckpointError, UserError)) as caught:
        verify(folder)
    message = str(caught.value)
    assert part in message and str(folder) in message and "\n" not in message and len(message) < 1000
    assert not canary.exists()
