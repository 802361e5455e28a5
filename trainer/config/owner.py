"""Folders before they are written: can they be, and whose is what is there already, where everybody can write?"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

from trainer.config.errors import UserError

log = logging.getLogger(__name__)


def check_owner(folder: Path, key: str) -> None:
    """Raise UserError, naming ``key``, for a folder or link that another user made where everybody can write.

    Whoever owns it chooses what is read from it and where writing leads. A folder of our own that everybody can write
    into is warned of: some file systems (of Windows, of containers) know no other. A folder that is not there is fine.
    """
    ours = (os.geteuid(), 0)
    try:
        itself = folder.lstat()
        target = folder.stat()
        around = folder.absolute().parent.stat()
    except (FileNotFoundError, NotADirectoryError):  # whoever makes it will tell
        if folder.is_symlink():
            raise UserError(f"{key}: {folder}: a link to nothing; mend or remove it") from None
        return
    except OSError as error:
        raise UserError(f"{key}: {folder}: cannot be looked at ({error.strerror}); choose another") from error
    open_place = stat.S_IWOTH & (around.st_mode | target.st_mode)
    foreign = next((status.st_uid for status in (itself, target) if status.st_uid not in ours), None)
    if foreign is not None and open_place:
        raise UserError(
            f"{key}: {folder}: belongs to user {foreign} in a place where everybody can write; choose one of your own"
        )
    if target.st_mode & stat.S_IWOTH:
        log.warning("%s: everybody can write into %s; run `chmod o-w` on it", key, folder)


def check_writable(folder: Path, key: str) -> None:
    """Raise UserError, naming ``key``, where a folder could not be made or written; makes nothing that stays."""
    ancestor = folder.absolute()
    try:
        while not ancestor.exists():
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise NotADirectoryError(20, "not a directory")
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise UserError(
            f"{key}: {folder}: {ancestor} cannot be written ({error.strerror}); choose another `{key}`"
        ) from error
