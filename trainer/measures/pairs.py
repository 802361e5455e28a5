"""The check that every measure begins with: two sequences of the same length, and not empty."""

from __future__ import annotations

from collections.abc import Sized

from trainer.config.errors import UserError


def check_pairs(
    left: Sized, right: Sized, left_name: str = "predictions", right_name: str = "references", *, empty: bool = True
) -> int:
    """Number of pairs. Raises UserError where the lengths differ, or where there are none and ``empty`` is False."""
    if len(left) != len(right):
        raise UserError(f"{left_name}: {len(left)} for {len(right)} {right_name}: give exactly one for each")
    if not empty and len(left) == 0:
        raise UserError(f"{left_name}: 0 examples: a corpus value needs at least one")
    return len(left)
