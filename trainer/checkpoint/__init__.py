"""Saving a run so that it goes on bit for bit, in any world size, and exporting what it learned.

``store`` saves, ``restore`` loads, ``manifest`` says what a good checkpoint is, ``export`` writes ordinary folders.
"""

from trainer.checkpoint.manifest import CheckpointError, newest, verify
from trainer.checkpoint.restore import Loaded, load
from trainer.checkpoint.store import save

__all__ = ["CheckpointError", "Loaded", "load", "newest", "save", "verify"]
