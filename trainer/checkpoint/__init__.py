"""Saving a run so that it goes on bit for bit, in any world size, and exporting what it learned.

``saver`` saves, in the background or at once, by the acts of ``store``; ``restore`` loads; ``reader`` reads one tensor
after another without an engine; ``manifest`` says what a good checkpoint is; ``lease`` keeps two runs out of one
folder; ``retention`` says what stays; ``export`` writes ordinary folders.
"""

from trainer.checkpoint.manifest import CheckpointError, newest, verify
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.restore import Loaded, load, open_checkpoint
from trainer.checkpoint.store import save

__all__ = ["CheckpointError", "Loaded", "Reader", "load", "newest", "open_checkpoint", "save", "verify"]
