"""Tunesmith: one recipe declares a whole fine-tuning practice, from data to verdict."""

__version__ = "0.1.0"
