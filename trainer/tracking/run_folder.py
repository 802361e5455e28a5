"""A run's folder as it is found: its own, and without a way out of it."""

from __future__ import annotations

from pathlib import Path

from trainer.config.errors import UserError
from trainer.config.owner import check_owner

INSIDE = (
    "",
    "checkpoints",
    "averages",
    "evaluation",
    "logs",
    ".lease",
)  # where a run makes files by name; wandb has links of its own


def check_run_folder(folder: Path, key: str = "output") -> None:
    """Raise UserError, naming ``key`` and the entry, where writing into a run's folder would lead out of it.

    The folder itself may be a link: whoever starts the run has made it. Nothing inside may be one, since a folder can
    come from elsewhere, as an archive, and its `metrics.jsonl` be a link to somebody's shell profile.
    """
    check_owner(folder, key)
    for name in INSIDE:
        place = folder / name
        if not place.is_dir():
            continue
        for entry in sorted(place.rglob("*") if name else place.iterdir()):
            if entry.is_symlink():
                raise UserError(
                    f"{key}: {entry}: is a link, and a run writes into its own folder alone; put what it points to in "
                    "its place, or let `output` itself be the link"
                )
