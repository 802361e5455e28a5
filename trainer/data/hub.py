"""Whether the hub can be reached, found out once and quickly: its own client retries for most of a minute."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import threading
import urllib.request
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

SECONDS = 4.0


@functools.cache
def offline_if_unreachable() -> bool:
    """Put the hub's client into its offline mode where the hub does not answer; True where it is offline.

    Cached models and data sets still load then, others fail at once. With a proxy the hub counts as reachable.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if urllib.request.getproxies() or _answers(endpoint.hostname or "", endpoint.port or 443):
        return False
    log.warning("%s cannot be reached: only what is in the local cache can be used", endpoint.hostname)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for modules yet to be imported and for child processes
    for name in ("huggingface_hub.constants", "datasets.config"):  # those already imported have read it
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return True


def _answers(host: str, port: int) -> bool:
    """Whether a connection opens within SECONDS; in a thread, since name resolution knows no time limit."""
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS).close()
        except OSError as error:
            log.debug("%s:%s: %s", host, port, error)
        else:
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()
