"""Tokenised sources made in memory, for tests that need lengths and no tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.config import Stage
from trainer.data.store import TokenisedSource


def source(name: str, lengths: list[int], task: str | None = None, labels: list[int] | None = None) -> TokenisedSource:
    """Examples of given lengths; token t of example i is 1000 * i + t, and all but the first are targets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([1000 * number + np.arange(length) for number, length in enumerate(lengths)]).astype(np.int32)
    weights = np.ones(len(ids), np.uint8)
    weights[offsets[:-1]] = 0
    return TokenisedSource(
        name=name,
        task=task or name,
        objective="classification" if labels else "supervised",
        counts={},
        fingerprint="",
        key="",
        file_names=("f.jsonl",),
        ids=ids,
        weights=weights,
        offsets=offsets,
        labels=np.array(labels or [-1] * len(lengths), np.int32),
        files=np.zeros(len(lengths), np.int32),
        lines=np.arange(1, len(lengths) + 1),
    )


def stage(mixture: dict[str, float], batch: dict[str, Any], **until: Any) -> Stage:
    return Stage.model_validate(
        {"name": "main", "mixture": mixture, "batch": {"micro_tokens": 64, **batch}, "until": until or {"epochs": 1}}
    )
