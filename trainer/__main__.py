"""`python -m trainer` is the command `tunesmith`."""

from trainer.cli import main

main()
