"""What `tunesmith launch` tells its ranks through the environment, beside torchrun's names. None of it is needed."""

from __future__ import annotations

ATTEMPT = "TUNESMITH_ATTEMPT"  # the how manieth start of this run, from 1
HEARTBEAT = "TUNESMITH_HEARTBEAT"  # the folder where ranks beat
LOGS = "TUNESMITH_LOGS"  # the attempt's folder, where a rank's Python stacks go when the supervisor asks for them
LOGS_FOLDER = "logs"  # in the run's folder: logs/attempt-NN
RESERVE = "TUNESMITH_RESERVE_FD"  # of a rank in reserve: the pipe on which it is called
RESTART = "TUNESMITH_RESTART"  # why the attempt before this one ended
SUPERVISOR = "TUNESMITH_SUPERVISOR"  # its pid: the ranks die with it
STORE = "TUNESMITH_STORE_FD"  # of rank 0: a socket that listens already, so that nobody takes the port first
