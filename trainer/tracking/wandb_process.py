"""The process that tails ``metrics.jsonl`` and forwards it to W&B: ``python -m trainer.tracking.wandb_process``.

It ends when told to on its standard input, when that closes, or when its parent is gone; what is then in the journal
is forwarded first. Its output goes to ``wandb.log`` in the run's folder.
"""

from __future__ import annotations

import argparse
import base64
import json
import netrc
import os
import select
import shlex
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.tracking.journal import FILE_NAME, Row, decode_row, eval_metrics
from trainer.tracking.redact import known_secrets, redact
from trainer.tracking.run_record import replace_file
from trainer.tracking.wandb_feed import CONFIG_NAME, STATE_NAME

_REACH_SECONDS = 2.0  # for name resolution, connection and login together; with wandb's import and start under 5
_INIT_SECONDS = 15.0  # a server that has just accepted the login may take so long to open the run
_TAIL_SECONDS = 0.5
_LEAVE_PRIORITY = 10  # nice: the training processes come first


class Forwarder:
    """Turns journal rows into W&B log calls whose step never falls, as W&B requires.

    A step (or an evaluation of a suite at a step) that was sent before and is made again after a resume is not sent
    again: W&B cannot replace a point, and the journal keeps the value that counts.
    """

    def __init__(self) -> None:
        self.step = -1
        self._evaluated: set[tuple[int, str]] = set()
        self.events: dict[str, int] = {}

    def take(self, row: Row) -> tuple[int, dict[str, float]] | None:
        """``(step, {name: value})`` to log, or None where there is nothing (new) in the row."""
        step = int(row.get("step") or 0)
        if row["kind"] == "event":
            self.events[str(row.get("name"))] = self.events.get(str(row.get("name")), 0) + 1
            return None
        if row["kind"] == "step":
            if step <= self.step:
                return None
            self.step = step
            return step, dict(_flat("train", {k: v for k, v in row.items() if k not in ("step", "time")}))
        key = (step, str(row.get("suite")))
        if row["kind"] != "eval" or key in self._evaluated:
            return None
        self._evaluated.add(key)
        self.step = max(self.step, step)
        return self.step, dict(_flat(f"eval/{key[1]}", eval_metrics(row)))


class Tail:
    """New whole rows of the journal since the last call; ``consumed`` counts bytes from its start."""

    def __init__(self, path: Path) -> None:
        self.path, self.consumed = path, 0

    def read(self, until: int | None = None) -> list[Row]:
        """Rows up to byte ``until`` (default: the end). A line that is no row is reported on stdout and passed over."""
        if not self.path.exists():
            return []
        self.consumed = min(self.consumed, self.path.stat().st_size)  # rows may be lost to a power cut
        with self.path.open("rb") as file:
            file.seek(self.consumed)
            content = file.read() if until is None else file.read(max(0, until - self.consumed))
        whole = content[: content.rfind(b"\n") + 1]
        self.consumed += len(whole)
        rows = []
        for line in whole.splitlines():
            try:
                rows.append(decode_row(line))
            except ValueError as error:
                print(f"{self.path}: line passed over: {error}", flush=True)
        return rows


def reach(base_url: str, environ: Mapping[str, str]) -> str | None:
    """Why W&B cannot be used online, or None: no key, no connection, a server error or a refused login.

    Takes at most ``_REACH_SECONDS``: the request runs in a thread, as name resolution has no time limit of its own.
    """
    federated = bool(environ.get("WANDB_IDENTITY_TOKEN_FILE"))
    key = environ.get("WANDB_API_KEY") or _netrc_key(base_url)
    if not key and not federated:
        return "no API key: set WANDB_API_KEY or run 'wandb login'"
    answer: list[str | None] = []
    asking = threading.Thread(target=lambda: answer.append(_ask(base_url, key)), daemon=True)
    asking.start()
    asking.join(_REACH_SECONDS)
    return answer[0] if answer else f"no answer from {redact(base_url)} within {_REACH_SECONDS:g} s"


def _ask(base_url: str, key: str | None) -> str | None:
    """One GraphQL question, "who am I?", to the server."""
    headers = {"Content-Type": "application/json", "User-Agent": "tunesmith"}
    if key:
        headers["Authorization"] = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
    question = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    address = redact(base_url)
    try:
        request = urllib.request.Request(f"{base_url.rstrip('/')}/graphql", data=question, headers=headers)
        with urllib.request.urlopen(request, timeout=_REACH_SECONDS) as reply:
            viewer = (json.load(reply).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        return f"{'login refused' if error.code in (401, 403) else 'server error'} by {address}: HTTP {error.code}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{address} not reachable: {redact(str(error))}"
    return f"login refused by {address}: the API key belongs to nobody there" if key and not viewer else None


def _netrc_key(base_url: str) -> str | None:
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(base_url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers under slash-joined names; text and lists have no curve."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}/{name}", value)
        elif isinstance(value, int | float):
            yield f"{prefix}/{name}", float(value)


def _open_run(options: argparse.Namespace, state: dict[str, Any]) -> Any:
    """The wandb run, online if that was asked and works; ``state`` tells what was settled on."""
    import wandb  # 1 s to import; here so that a missing wandb is a reason in the state, and no traceback

    config = json.loads((options.folder / CONFIG_NAME).read_text(encoding="utf-8"))
    arguments: dict[str, Any] = {
        "project": options.project, "name": options.name, "id": options.id, "dir": str(options.folder),
        "resume": "allow", "config": config,
    }  # fmt: skip
    mode: Any = options.mode
    reason: str | None = None
    if mode == "online":
        # the environment's server, else that of the user's wandb settings file, else wandb's default
        reason = reach(os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url), os.environ)
        mode = "offline" if reason else "online"
    try:
        run = wandb.init(mode=mode, settings=_settings(wandb), **arguments)
    except wandb.Error as error:
        if mode == "offline":
            raise
        mode, reason = "offline", f"could not start online: {redact(str(error), known_secrets(os.environ))}"
        wandb.teardown()
        run = wandb.init(mode=mode, settings=_settings(wandb), **arguments)
    # Offline, the folders of all restarts are to be uploaded; wandb puts those of one id together.
    place = Path(run.dir).parent
    upload = f"{shlex.quote(str(place.parent))}/offline-run-*" if mode == "offline" else shlex.quote(str(place))
    state.update(mode=mode, reason=reason, url=run.url if mode == "online" else None, sync=f"wandb sync {upload}")
    return run


def _settings(wandb: Any) -> Any:
    """No console capture, no command line, git remote or code: they may carry what is nobody's business."""
    return wandb.Settings(
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_save_requirements=False,
        init_timeout=_INIT_SECONDS,
        silent=True,
    )


def _told_to_end(parent: int) -> bool:
    """Wait a tail interval; true when a line or the end comes on stdin, or the parent is gone.

    The parent is asked for too, since a worker that it forked may hold the other end of the pipe after its death.
    """
    readable, _, _ = select.select([sys.stdin], [], [], _TAIL_SECONDS)
    return bool(readable) or os.getppid() != parent


def _forward(run: Any, tail: Tail, forwarder: Forwarder) -> None:
    for row in tail.read():
        entry = forwarder.take(row)
        if entry is not None:
            run.log(entry[1], step=entry[0])


def main(arguments: list[str] | None = None) -> int:
    """Forward until told to end; 0, or 1 after an error, which stands in the log and, in short, in the state."""
    parser = argparse.ArgumentParser(prog="wandb_process")
    parser.add_argument("folder", type=Path)
    for name in ("mode", "project", "name", "id"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args(arguments)
    parent = os.getppid()
    os.nice(_LEAVE_PRIORITY)
    state_path, tail, forwarder = options.folder / STATE_NAME, Tail(options.folder / FILE_NAME), Forwarder()
    before = json.loads(state_path.read_text()) if state_path.exists() else {}
    # What an earlier process of this run has sent is read again to know its steps, and not sent again.
    for row in tail.read(until=int(before.get("consumed", 0))):
        forwarder.take(row)
    state: dict[str, Any] = {"process": os.getpid(), "consumed": tail.consumed}
    began = time.monotonic()
    try:
        run = _open_run(options, state)
        print(f"{state['mode']} after {time.monotonic() - began:.1f} s. {state['reason'] or ''}".strip(), flush=True)
        if state["mode"] == "offline":
            print(f"To upload this run later: {state['sync']}", flush=True)
        ended = False
        while not ended:
            replace_file(state_path, json.dumps(state))
            ended = _told_to_end(parent)
            _forward(run, tail, forwarder)
            state["consumed"] = tail.consumed
        replace_file(state_path, json.dumps(state))
        run.summary.update({f"events/{name}": count for name, count in forwarder.events.items()})
        run.finish()
    except Exception as error:  # noqa: BLE001 - whatever wandb raises ends the feed alone; log, state and exit tell
        secrets = known_secrets(os.environ)
        print(redact(traceback.format_exc(), secrets), flush=True)
        state.update(mode="off", reason=redact(f"{type(error).__name__}: {error}", secrets))
        replace_file(state_path, json.dumps(state))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
