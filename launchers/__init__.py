"""Starting runs: on this machine, by torchrun, on clusters. Imports nothing of the trainer but its config."""
