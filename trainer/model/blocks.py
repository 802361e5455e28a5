"""The repeated transformer blocks of a network."""

from __future__ import annotations

from torch import nn


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks in order: the units of sharding, of last-layers tuning and of residual dropout."""
    base = getattr(network, "get_base_model", lambda: network)()
    names = set(getattr(base, "_no_split_modules", None) or ())
    found = [module for module in base.modules() if type(module).__name__ in names]
    if not found:
        lists = [list(m) for m in base.modules() if isinstance(m, nn.ModuleList)]
        alike = [items for items in lists if len({type(item) for item in items}) == 1]
        found = max(alike, key=len, default=[])
    return found
